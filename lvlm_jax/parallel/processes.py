"""Several processes as one: each runs the same program on its own devices, and JAX joins them.

Where the processes were started by SLURM, Open MPI, GKE or as a TPU slice, JAX reads from the environment who and how
many they are. Anywhere else three variables tell it: JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID.

They live and die together. JAX notices when one is gone and ends the others (`last_words` says why in a line), because
what they compute in common cannot be finished without it; whoever started them starts all of them again.
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

# What JAX itself ends with (128 + SIGABRT) when it misses a process: one event, one code, whoever notices first. It is
# neither 2, a mistake that another start repeats, nor 137, the code of the process that was killed.
LOST = 134

PEER_TIMEOUT = "LVLM_JAX_PEER_TIMEOUT"  # seconds after which a silent process counts as gone
JOIN_TIMEOUT = "LVLM_JAX_JOIN_TIMEOUT"  # seconds that the processes have to come together

# JAX's own 100 s are long for a machine by the hour. Signs of life come from a thread of C++ every half of this, and
# only a machine that stands still, or a network that is away, is silent for so long.
PEER_SECONDS = 30
JOIN_SECONDS = 300

_BROKEN = re.compile(
    "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (reset|closed)|Socket closed|Broken pipe"
    "|[Cc]oordination ?[Ss]ervice|Barrier(Error| failed)"
)

_beside: tuple[subprocess.Popen, int] | None = None  # `last_words`, and standard error as it was


def start(wanted: bool | None = None) -> bool:
    """Joins the processes. To be called once, before anything touches a device.

    When one of them cannot be reached or is gone later, JAX ends the process with code `LOST`. Standard error passes
    through a program beside this one from here on (`last_words`).

    Args:
        wanted: None: when the environment shows several processes, see `several`.

    Returns:
        Whether this process is now one of several.

    Raises:
        LVLMError: JAX finds nobody to join, or a variable of the environment is malformed.
    """
    if not (several() if wanted is None else wanted):
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
    # Connections are made by the first program that all take part in. Now they are all here, and a network that lets
    # none through shows before a model is loaded. (On CPUs whoever comes 30 s late would find nobody there any more.)
    multihost_utils.sync_global_devices("start")
    return jax.process_count() > 1


def several() -> bool:
    """Whether the environment says that this process is one of several, without asking anybody."""
    environment = os.environ
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        # A step of srun; a batch script alone has no step, and its own process no siblings.
        or ("SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1)
        or int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def joined() -> bool:
    """Whether `start` has made this process one of several."""
    return jax.distributed.is_initialized()


def lost(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that another process of the run cannot be reached."""
    if error is None or not joined():
        return False
    return bool(_BROKEN.search(str(error))) or lost(error.__cause__ or error.__context__)


def account_for(error: Exception) -> int:
    """The exit code for an exception that ends this process, one of several; what there is to say is said.

    A connection that breaks does not say whose it was. JAX does, a little later, when it ends this process itself.
    """
    if not lost(error):
        traceback.print_exception(error)
        return 1
    timeout = _number(PEER_TIMEOUT) or PEER_SECONDS
    time.sleep(1.5 * timeout)
    print(
        f"{pathlib.Path(sys.argv[0]).name}: the connection to another process of this run broke ({_brief(error)}), "
        f"though all of them gave signs of life for the next {1.5 * timeout:g} s; see that their hosts reach each "
        "other, and start all of them again as before: training goes on from the newest checkpoint in --workdir",
        file=sys.stderr,
    )
    return LOST


def leave(code: int) -> NoReturn:
    """Ends this process at once; the others follow.

    Without the interpreter's own farewell: JAX would wait there for the others, which wait for this one.
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
    """Standard error as it was; returns when everything said so far is out, for a container ends with this process."""
    global _beside
    sys.stderr.flush()
    if _beside is not None:
        process, direct = _beside
        os.dup2(direct, 2)
        os.close(direct)
        _beside = None
        with contextlib.suppress(subprocess.TimeoutExpired):  # processes that make batches may still hold the pipe
            process.wait(1)


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise LVLMError(f"the environment variable {name} is {value!r}; expected a number")
    return None if value is None else int(value)


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
