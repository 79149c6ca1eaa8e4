"""Several processes, and several devices, give the results of one."""

import json
import shutil

import jax
import pytest

from lvlm_jax import methods
from lvlm_jax.cli import evaluate
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.evaluation.shares import Share
from tests.evaluation.fakes import Oracle
from tests.refusals import refused
from tests.weights.test_resources import run as run_on_devices


def run(world, out, share, oracle, name="pope/strict", method=None, controls=None):
    options = Options(4, controls=controls, share=share, resamples=20)
    one = Run("oracle", "float32", get(name), Data(world), out, method, options)
    one.ask(oracle)
    return one.score()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("name", ["pope/vcd", "chair/512"])
def test_shares_in_any_order_give_the_totals_of_one(world, tmp_path, name, order):
    """Each process also answers its share of the controls."""
    oracles = [Oracle(caption="A dog and a cat on a chair." if name.startswith("chair") else "") for _ in range(4)]
    one, out = tmp_path / "one", tmp_path / "three"
    alone = run(world, one, Share(), oracles[3], name, methods.VCD(), one / "controls")
    assert alone is not None and set(alone["controls"]) >= {"greedy", "temperature", "plausibility"}
    parts = [run(world, out, Share(k, 3), oracles[k], name, methods.VCD(), out / "controls") for k in order]
    assert parts[:2] == [None, None]
    for key in ("figures", "per_image", "correct", "controls", "notes"):
        assert parts[2][key] == alone[key], key
    assert (out / "scores.json").is_file() and all(oracle.asked for oracle in oracles)
    assert [path.name for path in sorted(out.glob("log.*"))] == [f"log.{k}.jsonl" for k in range(3)]
    for path in one.glob("*.jsonl"):
        if not path.name.startswith("log"):
            assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_run_may_go_on_with_another_number_of_processes(world, tmp_path):
    alone = run(world, tmp_path / "one", Share(), Oracle())
    assert run(world, tmp_path / "two", Share(1, 2), Oracle()) is None
    found = run(world, tmp_path / "two", Share(), Oracle())
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
    refused("process 4 of 4 was asked for; processes are counted from 0 to 3", Share.of, 4, 4)
    refused("give both the number of processes and the index of this one", Share.of, 4)


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
    path = shutil.copytree(world, tmp_path / "data") / path
    path.unlink() if change is None else path.write_text(change(path.read_text()))
    monkeypatch.setattr(evaluate.LVLM, "from_pretrained", None)
    out = tmp_path / "out"
    words = ["--protocol", name, "--data", str(tmp_path / "data"), "--model", "pocket", "--out", str(out)]
    refused(message, evaluate.main, words)
    assert not out.exists()


SPREAD = """
import json, sys
import numpy as np
from lvlm_jax import LVLM
from lvlm_jax.parallel import make_mesh
from tests import small
from tests.compiler import compile_quickly

compile_quickly()
conversations, found = [small.conversation("Is it so?", seed=seed) for seed in range(4)], {}
for name, mesh in (("alone", None), ("spread", make_mesh(data=2, fsdp=1, tensor=1))):
    model = LVLM.from_pretrained(sys.argv[1], mesh=mesh)
    messages = small.encoded(model, conversations)
    (_, _, prompt, _), _ = model.prefill_arguments(messages)
    shards = prompt.embeddings.addressable_shards
    found[f"{name} rows"] = sorted((str(shard.device.id), shard.data.shape[0]) for shard in shards)
    images = [one[0]["content"][0]["image"] for one in messages]
    found[f"{name} image tokens"] = float(np.abs([image.tokens for image in images]).sum())
    found[name] = model.generate(messages, max_new_tokens=4).tokens
print(json.dumps(found))
"""


def test_a_batch_of_encoded_images_over_two_devices(checkpoint):
    found = run_on_devices(SPREAD, checkpoint, devices=2)
    assert (found["alone rows"], found["spread rows"]) == ([["0", 4]], [["0", 2], ["1", 2]])
    assert found["spread"] == found["alone"]
    assert found["spread image tokens"] == pytest.approx(found["alone image tokens"], rel=1e-4)


def test_processes_of_the_command(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.LVLM, "from_pretrained", lambda *_, **__: Oracle())

    def figures(out, *more):
        words = ["--protocol", "pope/pocket", "--data", str(world), "--model", "pocket", "--resamples", "20"]
        assert evaluate.main([*words, "--out", str(tmp_path / out), *more]) == 0
        return "written to" in capsys.readouterr().out and json.loads((tmp_path / out / "scores.json").read_text())

    assert not figures("two", "--processes", "2", "--process-index", "1")
    two, one = figures("two", "--processes", "2", "--process-index", "0"), figures("one")
    assert two["figures"] == one["figures"] and two["correct"] == one["correct"]
