"""The scripts of docs/scaling.md, run with stand-ins for the programs of a cluster."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest
import yaml

from lvlm_jax.parallel import processes
from lvlm_jax.training import settings

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
BASH, YAML = (re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.S | re.M) for kind in ("bash", "yaml"))
SBATCH, TPU_VM = BASH


def run(script, folder, programs, **variables):
    """Runs a script with stand-ins, bodies of shell scripts by name, before all else in PATH; begins, does not wait."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | variables
    return subprocess.Popen(["bash", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("script", [*BASH, *YAML], ids=["sbatch", "tpu-vm", "gpu", "tpu"])
def test_their_settings_are_known(script):
    """A config read with them, as train.py reads it."""
    flags = re.findall(r"--config\.(\S+?)=(\S+)", script.partition("train.py")[2])
    assert len(flags) == 5
    settings.check(settings.read(ROOT / "configs" / "capl.py", [f"--config.{name}={value}" for name, value in flags]))
    for name in re.findall(r"LVLM_JAX_\w+", script):
        assert name in (processes.PEER_TIMEOUT, processes.JOIN_TIMEOUT)


@pytest.mark.parametrize(
    ("code", "restarts", "finished", "ended", "requeued"),
    [
        (134, 0, False, 0, True),
        (137, 19, False, 0, True),
        (0, 0, False, 0, True),  # stopped before the time limit
        (0, 0, True, 0, False),
        (2, 0, False, 2, False),
        (134, 20, False, 1, False),
    ],
)
def test_slurm_starts_again_what_is_worth_it(tmp_path, code, restarts, finished, ended, requeued):
    finish = "mkdir -p runs/capl/export; touch runs/capl/export/config.json; " if finished else ""
    programs = {"srun": f"{finish}exit {code}", "scontrol": "echo scontrol $@"}
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    process = run(SBATCH, tmp_path, programs, **variables)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == ended and (printed == "scontrol requeue 7\n") == requeued


def pod(page, folder):
    """The shell script of the one container of a JobSet; what must fit together does."""
    jobset = yaml.safe_load(page)
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    inner = spec["template"]["spec"]
    (box,), (rule,) = inner["containers"], spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": box["name"], "operator": "In", "values": [2]}
    assert {mount["name"] for mount in box["volumeMounts"]} == {volume["name"] for volume in inner["volumes"]}
    environment = {one["name"]: one.get("value") for one in box["env"]}
    if "JAX_NUM_PROCESSES" in environment:
        name = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
        assert environment["JAX_COORDINATOR_ADDRESS"] == f"{name}:{box['ports'][0]['containerPort']}"
        assert environment["JAX_NUM_PROCESSES"] == str(spec["parallelism"]) and "JAX_PROCESS_ID" in environment
    assert box["command"] == ["bash", "-c"]
    return box["args"][0].replace("/shared", str(folder))


@pytest.mark.parametrize("page", YAML, ids=["gpu", "tpu"])
def test_a_pod_says_what_is_worth_another_start(tmp_path, page):
    for code, finished, ended in ((0, False, 1), (2, False, 2), (0, True, 0), (134, True, 134)):
        if finished:
            (tmp_path / "runs" / "capl" / "export").mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / "capl" / "export" / "config.json").touch()
        process = run(pod(page, tmp_path), tmp_path, {"python": f"exit {code}"})
        process.communicate(timeout=60)
        assert process.returncode == ended, (code, finished)


@pytest.mark.parametrize("page", YAML, ids=["gpu", "tpu"])
def test_a_pod_that_is_evicted_lets_the_training_save(tmp_path, page):
    saving = "trap 'sleep 0.3; touch saved; exit 0' TERM\ntouch begun\nwhile true; do sleep 0.05; done"
    process = run(pod(page, tmp_path), tmp_path, {"python": saving})
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1 and (tmp_path / "saved").exists()


def test_a_tpu_vm_is_rented_once_and_trains_until_it_is_done(tmp_path):
    """The stand-in for gcloud keeps the state of the request, and runs what it is to run on the hosts here."""
    cloud = """case "$*" in
        *describe*) cat state 2> /dev/null ;;
        *delete*) rm state ;;
        *create*) echo create >> log; echo ACTIVE > state ;;
        *train.py*) last="${@: -1}"; bash -c "${last#--command=}" ;;
        esac"""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/bash\necho train >> ../log\n[ $(grep -c train ../log) -lt 3 ] && exit 134\n"
        "mkdir -p ../runs/capl/export; touch ../runs/capl/export/config.json\n"
    )
    python.chmod(0o755)
    (tmp_path / "lvlm_jax").mkdir()
    (tmp_path / "state").write_text("SUSPENDED\n")
    script = TPU_VM.replace("/shared", str(tmp_path)).replace("sleep 10", "sleep 0.01")
    process = run(script, tmp_path, {"gcloud": cloud}, HOME=str(tmp_path))
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "log").read_text().split() == ["create", "train", "train", "train"]
