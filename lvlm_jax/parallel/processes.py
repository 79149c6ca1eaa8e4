"""Several processes as one: each runs the same program on its own devices, and JAX joins them.

If SLURM, Open MPI, GKE or a TPU slice started the processes, JAX reads their number and index from the environment.
Anywhere else, three variables set them: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
JAX_PROCESS_ID.

If one process dies, JAX ends the others (`last_words` says why in one line), because their common computation cannot
finish without it. All of them must be started again.
"""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import traceback
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from lvlm_jax.errors import LVLMError
from lvlm_jax.parallel import last_words

# The exit code with which JAX itself ends a process (128 + SIGABRT) if another one is missing, so that the code does
# not depend on who notices first. It is neither 2, a mistake that another start would repeat, nor 137, the code of the
# process that was killed.
LOST = 134

PEER_TIMEOUT = "LVLM_JAX_PEER_TIMEOUT"  # seconds after which a silent process counts as dead
JOIN_TIMEOUT = "LVLM_JAX_JOIN_TIMEOUT"  # seconds that the processes have to join

# JAX's own 100 s are long for a machine paid by the hour. A C++ thread sends signs of life twice in this time; only a
# frozen machine or a broken network is silent for so long.
PEER_SECONDS = 30
JOIN_SECONDS = 300

_BROKEN = re.compile(
    "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (reset|closed)|Socket closed|Broken pipe"
    "|[Cc]oordination ?[Ss]ervice|Barrier(Error| failed)"
)

_beside: tuple[subprocess.Popen, int] | None = None  # the program `last_words`, and the original standard error


def start(join: bool | None = None) -> bool:
    """Joins the other processes of the run. Call it once, before anything uses a device.

    If a process cannot be reached or dies later, JAX ends this process with code `LOST`. From here on, standard error
    passes through a program beside this one (`last_words`).

    Args:
        join: None means: join if the environment describes several processes, see `several`.

    Returns:
        Whether this process is now one of several.

    Raises:
        LVLMError: JAX finds no other process, or an environment variable is malformed.
    """
    if not (several() if join is None else join):
        return False
    timeout, patience = _number(PEER_TIMEOUT) or PEER_SECONDS, _number(JOIN_TIMEOUT) or JOIN_SECONDS
    count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    _pass_errors_on(timeout, patience)
    try:
        jax.distributed.initialize(
            num_processes=count, process_id=index, initialization_timeout=patience, heartbeat_timeout_seconds=timeout
        )
    except (ValueError, RuntimeError) as error:
        _take_errors_back()
        raise LVLMError(
            f"the processes of this run cannot be joined ({_brief(error)}); start them with "
            "SLURM, Open MPI or on GKE, or give each JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    # Connections are made by the first program in which all take part. All processes are here now, so a network that
    # blocks connections shows before a model is loaded. (On CPUs, a process that is 30 s late would find nobody.)
    multihost_utils.sync_global_devices("start")
    return jax.process_count() > 1


def several() -> bool:
    """Whether the environment says that this process is one of several; contacts no other process."""
    environment = os.environ
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        # A step of srun; a batch script has no step, and its own process has no siblings.
        or ("SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1)
        or int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def joined() -> bool:
    """Whether `start` has made this process one of several."""
    return jax.distributed.is_initialized()


def lost(error: BaseException | None) -> bool:
    """Whether an exception, or its cause, says that another process of the run cannot be reached."""
    if error is None or not joined():
        return False
    return bool(_BROKEN.search(str(error))) or lost(error.__cause__ or error.__context__)


def account_for(error: Exception) -> int:
    """In a run of several processes, reports an exception that ends this process; returns the exit code.

    A broken connection does not say which process died. JAX does, a little later, when it ends this process itself.
    """
    if not lost(error):
        traceback.print_exception(error)
        return 1
    timeout = _number(PEER_TIMEOUT) or PEER_SECONDS
    time.sleep(1.5 * timeout)
    print(
        f"{pathlib.Path(sys.argv[0]).name}: the connection to another process of this run broke ({_brief(error)}), "
        f"though all of them gave signs of life for the next {1.5 * timeout:g} s; check that their hosts reach each "
        "other, and start all again with the same command: training resumes from the newest checkpoint in --workdir",
        file=sys.stderr,
    )
    return LOST


def leave(code: int) -> NoReturn:
    """Ends this process at once; the others follow.

    Skips the interpreter's shutdown, in which JAX would wait for the others while they wait for this one.
    """
    sys.stdout.flush()
    _take_errors_back()
    os._exit(code)


def _pass_errors_on(timeout: int, patience: int) -> None:
    global _beside
    program = pathlib.Path(sys.argv[0]).name
    facts = [program, socket.gethostname(), str(timeout), str(patience)]
    reading, writing = os.pipe()
    words = [sys.executable, "-I", "-S", last_words.__file__, *facts]
    process = subprocess.Popen(words, stdin=reading, stdout=subprocess.DEVNULL)
    sys.stderr.flush()
    _beside = process, os.dup(2)
    os.dup2(writing, 2)
    os.close(reading)
    os.close(writing)


def _take_errors_back() -> None:
    """Restores standard error; returns when everything is written, because a container ends with this process."""
    global _beside
    sys.stderr.flush()
    if _beside is not None:
        process, direct = _beside
        os.dup2(direct, 2)
        os.close(direct)
        _beside = None
        with contextlib.suppress(subprocess.TimeoutExpired):  # data-loading processes may still have the pipe open
            process.wait(1)


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise LVLMError(f"the environment variable {name} is {value!r}; expected a number")
    return None if value is None else int(value)


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
