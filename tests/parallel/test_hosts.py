"""Several processes on one machine, like many hosts: results of one process, and the death of one of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from lvlm_jax import parallel
from lvlm_jax.parallel import last_words, processes
from lvlm_jax.pocket.splits import write_split
from tests import checkpoints
from tests import small as small_model
from tests.parallel import load_over_processes, small_run, train_over_processes
from tests.parallel.simulated import COMMON, PATIENCE, SILENCE, begin, codes, finish, said
from tests.weights.test_resources import MB, write_large

TRAIN = train_over_processes.__name__


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(losses, trained kernel) of the miniature on one device, which nobody kills."""
    workdir = tmp_path_factory.mktemp("alone")
    trained = small_run.train(None, workdir)
    return small_run.losses(workdir), trained["language_model"]["lm_head"]["kernel"]


def kill_in_the_middle(begun, victim, log):
    """Kills a process once eight steps of twenty are in the log."""
    deadline = time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count("\n") < 8:
        assert time.monotonic() < deadline and all(process.poll() is None for process in begun)
        time.sleep(0.05)
    begun[victim].kill()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(2, 1), (2, 0), (4, 2)], ids=str)
def test_one_is_killed_the_others_say_so_and_all_go_on(alone, tmp_path, count, victim):
    workdir, errors = tmp_path / "run", tmp_path / "errors"
    begun = begin(TRAIN, count, workdir, 0.3, errors=errors)
    kill_in_the_middle(begun, victim, workdir / "log.jsonl")
    killed = time.monotonic()
    ended = codes(begun)
    # Twice, because the signs of life of all processes share two busy cores.
    assert time.monotonic() - killed < 2 * SILENCE + 30
    assert ended.pop(victim) == -signal.SIGKILL
    assert all(code in (processes.LOST, -signal.SIGABRT) for code in ended)  # 134 in the words of a shell
    for index in set(range(count)) - {victim}:
        (line,) = said(errors, index)
        assert re.match(rf"train_over_processes.py: process ({victim}|0) of this run.* died or cannot be reached", line)
        assert "start all again with the same command" in line and "newest checkpoint" in line
    saved = [int(path.name) for path in (workdir / "talk").iterdir() if path.name.isdigit()]
    assert saved and max(saved) < 20
    finish(TRAIN, count, workdir, 0, errors=errors)
    np.testing.assert_allclose(small_run.losses(workdir), alone[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_all_stop_together_when_one_is_asked_to_and_learn_what_one_learns(alone, tmp_path):
    """Their checkpoint is then read by one process."""
    finish(TRAIN, 2, tmp_path, 0, "--fault", "stop", errors=tmp_path / "errors")
    stopped = small_run.losses(tmp_path)
    assert 11 <= len(stopped) < 20 and (tmp_path / "talk" / str(len(stopped))).is_dir()
    finish(TRAIN, 2, tmp_path, 0, errors=tmp_path / "errors")
    np.testing.assert_allclose(small_run.losses(tmp_path), alone[0], rtol=0, atol=1e-5)
    kernel = np.load(tmp_path / "kernel.npy")
    np.testing.assert_allclose(kernel, alone[1], rtol=0, atol=1e-5)
    again = small_run.train(None, tmp_path, save_every=3, keep=2)
    np.testing.assert_array_equal(again["language_model"]["lm_head"]["kernel"], kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "words"), [("error", 1, "ZeroDivisionError: of"), ("mistake", 2, "a mistake that")]
)
def test_an_error_of_one_alone_ends_all(tmp_path, fault, code, words):
    """The process with the error ends without waiting for the others."""
    ended = codes(begin(TRAIN, 2, tmp_path, 0.1, "--fault", fault, errors=tmp_path / "errors"))
    assert ended[0] in (processes.LOST, -signal.SIGABRT) and ended[1] == code
    assert words in said(tmp_path / "errors", 1)[-1]
    (line,) = said(tmp_path / "errors", 0)
    assert "process 1 of this run died or cannot be reached" in line


JOINED = """
from lvlm_jax import parallel
assert parallel.start()
import jax
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


@pytest.mark.slow
def test_the_variables_of_slurm_are_enough():
    def free(port):
        with socket.socket() as one:
            return one.connect_ex(("localhost", port)) != 0

    job = next(job for job in range(100, 4096) if free(61440 + job))  # as JAX chooses the port
    common = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    common |= os.environ | COMMON | {"SLURM_STEP_NUM_NODES": "1", processes.JOIN_TIMEOUT: str(PATIENCE)}
    begun = []
    for index in "01":
        own = common | {"SLURM_PROCID": index, "SLURM_LOCALID": index}
        begun.append(subprocess.Popen([sys.executable, "-c", JOINED], env=own, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=PATIENCE)[0].splitlines()[-1] for process in begun]
    assert printed == ["0 2 2", "1 2 2"]


WATCH = "E1121 17:13:59.829274   19475 coordination_service.cc:1549] [287] Use error polling to propagate"
FATAL = "F1121 17:13:59.830006   19486 client.h:80] " + last_words.REPORT.decode() + ". This most likely"
TRACE = "*** Check failure stack trace: ***\n    @     0x7f51d6840634  absl::LogMessage::SendToLog()\n"
SILENT = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe tasks have crashed."
LEADER = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died"
APART = "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask\n"


def passed_on(*pieces, pause=0.0):
    """What `last_words` writes when it reads pieces one after the other."""
    words = [sys.executable, "-I", "-S", last_words.__file__, "train.py", "node7", "30", "300"]
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(words, **pipes) as process:
        for piece in pieces:
            process.stdin.write(piece.encode())
            process.stdin.flush()
            time.sleep(pause)
        process.stdin.close()
        return process.stderr.read().decode()


@pytest.mark.parametrize(
    ("report", "what"),
    [
        (SILENT.format(3), "process 3 of this run died or cannot be reached (no sign of life for 30 s)"),
        (SILENT.format("/job:jax_worker/replica:0/task:12"), "process 12 of this run died"),
        (SILENT.format("11\n2"), "process 2 and 11 of this run died"),
        ("Barrier failed because: UNAVAILABLE: Task 1 heartbeat timeout. This", "process 1 of this run died"),
        (LEADER, "process 0 of this run, to which all others are connected, died"),
        (APART, "not all processes of this run joined within 300 s"),
        ("INTERNAL: of a kind unseen so far", "another process of this run died"),
    ],
)
def test_a_report_of_jax_becomes_one_line(report, what):
    bar = "step 6\rstep 7 "
    text = passed_on(f"{bar}{WATCH}: {report}\n{FATAL} {report}\n", TRACE, "Traceback\n", pause=0.02)
    assert text.startswith(f"{bar}\ntrain.py: {what}") and text.count("\n") == 2
    assert "this one on node7 ends too (exit code 134)" in text


def test_everything_else_is_passed_on_as_it_comes():
    lines = ["a bar \r 1/2", "E1121 17:13:59.8 1 other.cc:1] x\n", "é", "\n", f"{WATCH}\nalone\n", "end"]
    assert passed_on(*lines) == "".join(lines)
    # A sign without a report is held back for a moment only.
    assert passed_on("before\n", WATCH + "\n", "after\n", pause=0.8) == f"before\n{WATCH}\nafter\n"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Read error [::1]:4: Connection reset by peer"), True),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (ValueError("shapes do not match"), False),
        (None, False),
    ],
)
def test_what_says_that_a_process_is_gone(monkeypatch, error, lost):
    assert parallel.lost(error) is False  # alone, nobody can be gone
    monkeypatch.setattr(processes, "joined", lambda: True)
    assert parallel.lost(error) is lost
    wrapped = OSError("cannot be written")
    wrapped.__cause__ = error
    assert parallel.lost(wrapped) is lost


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_each_process_loads_its_half(tmp_path):
    checkpoints.make_llava(tmp_path / "small", seed=3)
    large = write_large(tmp_path / "large", "F32")
    finish(load_over_processes.__name__, 2, tmp_path / "small", large, tmp_path, errors=tmp_path / "errors")
    for index in range(2):
        found = json.loads((tmp_path / f"{index}.json").read_text())
        print(json.dumps(found, indent=1))  # the figures of docs/scaling.md, with pytest -s
        for name, one in found.items():
            assert one["model"] > 150 * MB
            if name != "one device":
                assert one["held"] == one["slices"] < 0.52 * one["model"]
            # As on one device: what stays, and one tensor as it is in the file and as it goes to the device.
            assert one["peak"] < one["held"] + 3 * one["largest"] + 25 * MB, (name, one)
            assert one["resident"] < one["held"] + 15 * MB, (name, one)


@pytest.mark.slow
def test_a_benchmark_over_processes_is_that_of_one(tmp_path):
    """Stopped once and not killed: when the run resumes, all processes know what process 0 has logged."""
    text = small_model.OVERRIDES["text"] | {"max_position_embeddings": 512}
    checkpoints.make_llava(tmp_path / "model", seed=3, text=text)
    small_model.write_processor(tmp_path / "model")
    write_split(tmp_path / "world", "test", 3)

    def evaluate(count, out):
        flags = f"--protocol pope/strict --batch-size 4 --resamples 10 --dtype float32 --tensor-parallel {count}"
        places = {"--data": "world", "--model": "model", "--out": out}
        words = [str(word) for pair in places.items() for word in (pair[0], tmp_path / pair[1])]
        finish("lvlm_jax", count, "evaluate", *flags.split(), *words, errors=tmp_path / "errors")

    def answers(text):
        rows = map(json.loads, text.splitlines()[1:])
        return {(row["group"], row["id"]): row["text"] for row in rows if "batch" not in row}

    evaluate(2, "two")
    log = tmp_path / "two" / "log.0.jsonl"
    whole = log.read_text()
    lines = whole.splitlines(keepends=True)
    log.write_text("".join(lines[: len(lines) // 2]))
    evaluate(2, "two")
    assert answers(log.read_text()) == answers(whole) and not (tmp_path / "two" / "log.1.jsonl").exists()
    evaluate(1, "one")
    for split in ("random", "popular", "adversarial"):
        one, two = (tmp_path / out / f"{split}.jsonl" for out in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
