"""`lvlm verify` on the small checkpoint and on files alone, and that each check can fail."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_jax import methods
from lvlm_jax.processors import load
from lvlm_jax.verification import answers, off, peer, processors, results, tensors
from lvlm_jax.verification.conversations import forms
from lvlm_jax.weights import model_config, names
from tests.cli.command import run, write_small

CONFIG, TENSORS, IDS, SAVED, LOGITS, GREEDY, OFF, COST = (
    "config", tensors.NAME, processors.NAME, "save and load", answers.LOGITS, answers.GREEDY, off.NAME, answers.COST,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pocket model with two decoder layers."""
    return write_small(tmp_path_factory.mktemp("verify") / "model")


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "model"))


def verify(monkeypatch, capsys, model, tmp_path, *words):
    """Exit code, the record's checks by name, and what was printed."""
    record = tmp_path / "record.json"
    code, out, err = run(monkeypatch, capsys, "verify", model, "--record", record, "--scratch", tmp_path, *words)
    made = json.loads(record.read_text()) if record.is_file() else {"checks": []}
    return code, {check["name"]: check for check in made["checks"]}, out, err


@pytest.mark.slow
def test_a_whole_checkpoint(folder, monkeypatch, capsys, tmp_path):
    code, checks, out, _ = verify(monkeypatch, capsys, folder, tmp_path, "--methods", "vaf,deco,opera")
    statuses = {name: check["status"] for name, check in checks.items()}
    passed = dict.fromkeys((CONFIG, TENSORS, IDS, SAVED, LOGITS, GREEDY, OFF), "passed")
    assert (code, statuses) == (0, passed | {COST: "measured"}), out
    assert checks[OFF]["figures"]["ran"] == ["deco"]
    assert set(checks[OFF]["figures"]["left_out"]) == {"vaf", "opera"}  # layers that are not there; a search
    assert checks[GREEDY]["figures"]["different_tokens"] > 5
    assert "transformers' model of it gives the same bits" in checks[SAVED]["words"]
    assert all(name in out for name in checks)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["model"] == "model" and str(folder) not in json.dumps(record)
    assert record["versions"]["torch"] == torch.__version__


def test_files_alone(copy, monkeypatch, capsys, tmp_path):
    (copy / "model.safetensors").unlink()
    code, checks, out, _ = verify(monkeypatch, capsys, copy, tmp_path)
    assert code == 0 and checks[IDS]["status"] == "passed"
    assert {name for name, check in checks.items() if check["status"] == "left out"} == {*checks} - {CONFIG, IDS}
    assert "no weights in the folder" in out
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    code, checks, _, _ = verify(monkeypatch, capsys, copy, tmp_path)
    assert code == 1 and checks[CONFIG]["status"] == "failed" and "AWQ" in checks[CONFIG]["words"]


def test_what_does_not_fit_fails(copy, monkeypatch, capsys, tmp_path):
    state = load_file(copy / "model.safetensors")
    stray = state | {"stray.weight": torch.zeros(2)}
    save_file(stray, copy / "model.safetensors", metadata={"format": "pt"})
    code, checks, _, _ = verify(monkeypatch, capsys, copy, tmp_path, "--methods", "none")
    assert code == 1 and "1 unexpected: stray.weight" in checks[TENSORS]["words"]
    assert "the tensors of model do not fit" in checks[TENSORS]["words"]  # and no path of this machine
    assert checks[LOGITS]["status"] == "left out"


@pytest.mark.parametrize(
    ("words", "said"),
    [(("nowhere/at/all",), "no such folder"), (("pocket", "--methods", "nothing"), "nothing"),
     (("pocket", "--scratch", "/nowhere"), "--scratch '/nowhere' is not a folder")],
)  # fmt: skip
def test_what_cannot_be_checked_is_one_line(words, said, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "verify", *words)
    assert code == 2 and said in err and err.count("\n") == 1


def test_an_index_with_other_names_is_told(tmp_path):
    config = model_config(names.checkpoint("pocket"))
    stored = tensors.compare_names((), config, tensors.models.abstract_parameters(config))[1]
    first, *rest = stored
    index = tmp_path / tensors.INDEXES[0]
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*rest, "stray.weight"], "model.safetensors")}))
    result = tensors.check(tmp_path, config)
    assert result.status == results.FAILED and result.words == f"1 missing: {first}; 1 unexpected: stray.weight"


def test_other_ids_and_other_pixels_are_told(copy):
    config = model_config(copy)
    ours, theirs = load.load_processor(copy, config), peer.processor(copy, config)
    chats = forms()
    assert processors.differences(ours, theirs, config, chats["image, text"]) == ""
    theirs.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert processors.differences(ours, theirs, config, chats["image, text"]) == "pixels differ"
    written = theirs.processor.chat_template
    theirs.processor.chat_template = written + "{{ '!' }}"
    assert processors.differences(ours, theirs, config, chats["text"]) == "tokens differ"
    theirs.processor.chat_template = "{{ raise_exception('no') }}"
    assert "transformers refuses it" in processors.differences(ours, theirs, config, chats["text"])


class Laid(np.ndarray):
    """Logits that stand for a laid-out prompt as well."""

    @property
    def lengths(self):
        return [len(self)]


class Said:
    """Stands for a model that gives these logits and tokens."""

    def __init__(self, logits, tokens):
        self.said, self.tokens = iter(logits), tokens

    def prepare(self, prompt):
        return next(self.said)

    def logits(self, said):
        return np.concatenate([np.zeros((2, said.shape[1])), said])[None]  # padding on the left

    def generate(self, prompts, **options):
        return SimpleNamespace(tokens=self.tokens)


@pytest.mark.parametrize(
    ("moved", "changed", "faults"),
    [(0.0, None, []), (5e-4, None, []), (2e-3, None, ["logits of prompt 1 differ by 0.002"]),
     (np.nan, None, ["logits of prompt 1 differ by nan"]),
     (0.0, 3, ["answer 2 differs from token 3 on, which transformers chose by 2.5e-01"])],
)  # fmt: skip
def test_answers_are_compared_with_the_largest_logit(moved, changed, faults):
    generator = np.random.default_rng(0)
    logits = [generator.uniform(-1, 1, (count, 6)) * 10 for count in (4, 7, 5)]
    for one in logits:
        one[0, 0] = 10.0
    tokens = [list(range(place, place + answers.NEW_TOKENS)) for place in range(3)]
    theirs = [peer.Answers(one, list(said), np.full(len(said), 0.25)) for one, said in zip(logits, tokens, strict=True)]
    ours = [one.copy().view(Laid) for one in logits]
    ours[1][2, 3] += moved
    if changed is not None:
        tokens[2][changed] = 99
    found = answers.check(Said(ours, tokens), theirs)
    assert [result.words for result in found if result.status == results.FAILED] == faults


def test_every_method_has_strengths_to_take_away():
    assert set(off.NO_STRENGTH) == set(methods.names()) - {"opera"}
