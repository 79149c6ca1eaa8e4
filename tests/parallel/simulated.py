"""Scripts of the tests in processes of their own: with simulated devices, or several processes that JAX joins."""

import json
import os
import pathlib
import socket
import subprocess
import sys

from lvlm_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 600  # seconds for what takes ten: the machine may be busy
SILENCE = 10  # seconds after which JAX counts a process as gone, in these tests
COMMON = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "LVLM_JAX_COMPILATION_CACHE": "0"}
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def in_a_process(script: str, *words: object, count: int = 1, quick: bool = False) -> list[dict]:
    """The lines of JSON that a script prints on so many devices.

    Args:
        script: a module of the tests, as "planning.really_held".
        words: its arguments.
        quick: its programs are hardly optimised.
    """
    variables = COMMON | (QUICK if quick else {}) | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    command = [sys.executable, "-m", f"tests.{script}", *map(str, words)]
    done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def begin(module: str, count: int, *words: object, errors: pathlib.Path) -> list[subprocess.Popen]:
    """`count` processes of a module that JAX joins; standard error of each goes to a file in the folder `errors`."""
    errors.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = COMMON | QUICK | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    variables |= {processes.PEER_TIMEOUT: str(SILENCE), processes.JOIN_TIMEOUT: str(PATIENCE)}
    command, begun = [sys.executable, "-m", module, *map(str, words)], []
    for index in range(count):
        own = os.environ | variables | {"JAX_PROCESS_ID": str(index)}
        with (errors / str(index)).open("w") as file:
            begun.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file))
    return begun


def codes(begun: list[subprocess.Popen]) -> list[int]:
    """Exit codes; none of them outlives the test."""
    try:
        return [process.wait(PATIENCE) for process in begun]
    finally:
        for process in begun:
            process.kill()


def said(errors: pathlib.Path, index: int) -> list[str]:
    """The lines on standard error of a process, without its progress bar."""
    text = (errors / str(index)).read_text().replace("\r", "\n")
    return [line for line in text.splitlines() if line and not line.startswith("talk: ")]


def finish(module: str, count: int, *words: object, errors: pathlib.Path) -> None:
    """Runs processes that JAX joins, and checks that all succeed."""
    assert set(codes(begin(module, count, *words, errors=errors))) == {0}, said(errors, 0)[-20:]
