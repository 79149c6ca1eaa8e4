"""Scripts of this folder, run in processes of their own with as many simulated devices as a test asks for."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def in_a_process(script: str, *words: object, count: int = 1) -> list[dict]:
    """The lines of JSON that a script prints on so many devices.

    Args:
        script: a module of the tests, as "planning.really_held".
        words: its arguments.
    """
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "LVLM_JAX_COMPILATION_CACHE": "0"}
    variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{script}", *map(str, words)],
        env=os.environ | variables, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
