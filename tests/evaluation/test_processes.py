"""Several processes, and several devices, give what one gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lvlm_jax import methods
from lvlm_jax.cli import evaluate
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.evaluation.shares import Share
from lvlm_jax.pocket.splits import write_split
from tests.evaluation.fakes import Oracle

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.full_compiler  # the answers of other processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket") / "world"
    write_split(folder, "test", 12)
    return folder


def run(world, out, share, oracle, name="pope/strict", method=None, controls=None):
    options = Options(4, controls=controls, share=share, resamples=20)
    one = Run("oracle", "float32", get(name), Data(world), out, method, options)
    one.ask(oracle)
    return one.score()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("name", ["pope/vcd", "chair/512"])
def test_shares_in_any_order_give_the_totals_of_one(world, tmp_path, name, order):
    """Controls too, which are asked in shares of their own."""
    caption = "A dog and a cat on a chair." if name.startswith("chair") else ""
    oracles = [Oracle(caption=caption) for _ in range(4)]
    one = tmp_path / "one"
    alone = run(world, one, Share(), oracles[3], name, methods.VCD(), one / "controls")
    assert alone is not None and set(alone["controls"]) >= {"greedy", "temperature", "plausibility"}
    out = tmp_path / "three"
    parts = [run(world, out, Share(k, 3), oracles[k], name, methods.VCD(), out / "controls") for k in order]
    assert parts[:2] == [None, None]
    for key in ("figures", "per_image", "correct", "controls", "notes"):
        assert parts[2][key] == alone[key], key
    assert (out / "scores.json").is_file()
    assert [path.name for path in sorted(out.glob("log.*"))] == [f"log.{k}.jsonl" for k in range(3)]
    assert all(oracle.asked for oracle in oracles)
    for path in one.glob("*.jsonl"):
        if not path.name.startswith("log"):
            assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_run_may_go_on_with_another_number_of_processes(world, tmp_path):
    alone = run(world, tmp_path / "one", Share(), Oracle())
    assert run(world, tmp_path / "two", Share(1, 2), Oracle()) is None
    oracle = Oracle()
    found = run(world, tmp_path / "two", Share(), oracle)
    assert found["figures"] == alone["figures"] and found["per_image"] == alone["per_image"]
    logs = [path.read_text().splitlines()[1:] for path in (tmp_path / "two").glob("log.*.jsonl")]
    lines = [json.loads(line) for log in logs for line in log]
    keys = [(line["group"], line["id"]) for line in lines if "batch" not in line]
    assert len(keys) == len(set(keys)) == alone["record"]["questions"]


def test_which_share(monkeypatch):
    assert Share.of() == Share(0, 1) and Share.of(4, 3) == Share(3, 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 5)
    assert Share.of() == Share(2, 5)  # jax.distributed was set up
    with pytest.raises(LVLMError, match="process 4 of 4 was asked for; processes are counted from 0 to 3"):
        Share.of(4, 4)
    with pytest.raises(LVLMError, match="give both the number of processes and the index of this one"):
        Share.of(4)


@pytest.mark.parametrize(
    ("name", "path", "change", "message"),
    [
        ("pope", "pope/pope_random.json", lambda text: text + '{"question_id": 9', "is not JSON .*; repair or remove"),
        ("pope", "pope/pope_random.json", lambda text: text + text.splitlines()[0], "id random 1 occurs twice"),
        ("pope", "pope/pope_popular.json", lambda text: "", "is empty"),
        ("pope", "images/pocket_test_000003.png", None, "1 of .* images of POPE are missing"),
        ("chair", "annotations/instances_test.json", lambda text: text.replace('"category_id"', '"kategorie"', 1),
         "has no category_id"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing(world, tmp_path, monkeypatch, name, path, change, message):
    """One line that says what is wrong, before a model is loaded or anything written."""
    data = shutil.copytree(world, tmp_path / "data")
    path = data / path
    path.unlink() if change is None else path.write_text(change(path.read_text()))
    monkeypatch.setattr(evaluate.LVLM, "from_pretrained", None)
    words = ["--protocol", name, "--data", str(data), "--model", "pocket", "--out", str(tmp_path / "out")]
    with pytest.raises(LVLMError, match=message) as caught:
        evaluate.main(words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_processes_are_about_a_model(world):
    words = ["--protocol", "pope", "--data", str(world), "--rescore", "a.jsonl", "--processes", "2"]
    with pytest.raises(LVLMError, match="--controls and --processes are about a model that answers"):
        evaluate.main(words)


def test_a_batch_over_two_devices(checkpoint):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    script = ROOT / "tests" / "evaluation" / "two_devices.py"
    done = subprocess.run(
        [sys.executable, script, checkpoint], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["rows"] == [["0", 2], ["1", 2]]
    assert found["spread"] == found["alone"]
    assert found["spread image tokens"] == pytest.approx(found["alone image tokens"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_of_the_tool(world, tmp_path):
    """Started at the same time, with the pocket model."""

    def start(out, *more):
        words = ["--protocol", "pope/pocket", "--data", world, "--model", "pocket", "--resamples", "20"]
        return subprocess.Popen(
            [sys.executable, ROOT / "tools" / "evaluate.py", *words, "--out", tmp_path / out, *more], cwd=ROOT,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    started = [start("two", "--processes", "2", "--process-index", str(k)) for k in range(2)]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert any("written to" in text for text in said)
    assert start("one").wait() == 0
    found = [json.loads((tmp_path / out / "scores.json").read_text()) for out in ("one", "two")]
    assert found[0]["figures"] == found[1]["figures"] and found[0]["correct"] == found[1]["correct"]
