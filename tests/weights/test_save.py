"""Saved checkpoints load in transformers and here, bit for bit, and appear whole or not at all."""

import functools
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lvlm_jax import files, weights
from lvlm_jax.weights import folder as saved_folder
from lvlm_jax.weights import save
from lvlm_jax.weights.tables import flatten, unflatten
from tests.killing import Function, contents
from tests.refusals import refused
from tests.weights import checkpoints as make


@pytest.fixture(scope="module")
def source(drawn, tmp_path_factory):
    folder = make.write_scheme(tmp_path_factory.mktemp("source") / "m", drawn, make.HUB)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    return folder


@pytest.fixture(scope="module")
def params(source):
    return make.load(source, "float32")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def saved(params, drawn_config, out):
    """saved(**options): the folder in which the parameters were saved."""
    return functools.partial(weights.save_checkpoint, out, params, drawn_config)


def assert_transformers_loads(folder, model):
    loaded, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    return loaded


@pytest.mark.parametrize("scheme", ["hub", "transformers", "state_dict", "state_dict_4"])
def test_transformers_loads_it_with_equal_tensors(scheme, drawn, saved):
    loaded = assert_transformers_loads(saved(scheme=scheme), drawn)
    if scheme == "hub":  # and gives equal logits
        inputs = {"input_ids": torch.tensor([[1, 5, 90, 90, 90, 90, 7, 8]]), "pixel_values": torch.randn(1, 3, 28, 28)}
        with torch.no_grad():
            assert torch.equal(*(net(**inputs).logits for net in (drawn, loaded.eval())))


def test_tied_embeddings(tmp_path, out):
    tied = make.random_model(tie=True)
    source = make.write_scheme(tmp_path / "in", tied, make.HUB)
    loaded = assert_transformers_loads(weights.save_checkpoint(out, make.load(source), make.config_of(source)), tied)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_equal(dtype, source, drawn_config, tmp_path):
    first = make.load(source, dtype)
    once = weights.save_checkpoint(tmp_path / "a", first, drawn_config, source)
    second = make.load(once)
    make.assert_same(first, second)
    assert contents(once) == contents(weights.save_checkpoint(tmp_path / "b", second, drawn_config, once))


def test_dtypes(params, drawn_config, saved, tmp_path):
    folder = saved(dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    flat = flatten(params)
    mixed = unflatten({path: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf for path, leaf in flat.items()})
    make.assert_same(make.load(weights.save_checkpoint(tmp_path / "mixed", mixed, drawn_config)), mixed)
    # Parameters from a jitted step.
    stepped = jax.jit(lambda tree: jax.tree.map(lambda leaf: (leaf * 2).astype(jnp.bfloat16), tree))(params)
    make.assert_same(make.load(weights.save_checkpoint(tmp_path / "stepped", stepped, drawn_config)), stepped)


def test_shards(drawn, params, saved):
    folder = saved(max_shard_size=60_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 80_000 for file in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in flatten(params).values())
    assert_transformers_loads(folder, drawn)
    make.assert_same(make.load(folder), params)


def test_processor_files_are_copied_and_code_is_not(params, drawn_config, source, saved, tmp_path):
    source = Path(shutil.copytree(source, tmp_path / "source"))
    (source / "video_preprocessor_config.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (source / "modeling_custom.py").write_text("raise SystemExit")
    with pytest.warns(UserWarning, match="its own code, which is not copied: modeling_custom.py"):
        folder = saved(source)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"video_preprocessor_config.json", "additional_chat_templates"}
    assert {file.name for file in folder.iterdir()} == names
    template = folder / "additional_chat_templates" / "rag.jinja"
    assert template.read_text() == "{{ messages }}"
    again = saved(folder, overwrite=True)
    assert {file.name for file in again.iterdir()} == names and template.exists()
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5
    plain = weights.save_checkpoint(tmp_path / "plain", params, drawn_config)
    assert json.loads((plain / "generation_config.json").read_text())["eos_token_id"] == 2


def test_what_is_overwritten(source, saved, out):
    out.mkdir()
    saved(source)  # an empty folder is taken
    before = contents(out)
    refused("not empty", saved)
    assert contents(out) == before
    saved(processor_source=out, dtype="bfloat16", overwrite=True)
    assert (out / "tokenizer.json").exists() and make.stored_dtypes(out) == {torch.bfloat16}
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")  # folders that are no checkpoint are spared
    refused(r"thesis\.tex", saved, overwrite=True)
    assert contents(out) == {"thesis.tex": b"years of work"}
    shutil.rmtree(out)
    out.write_text("years of work")
    refused("is a file", saved, overwrite=True)
    assert out.read_text() == "years of work"


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_half_written_remains(exists, saved, tmp_path, monkeypatch):
    if exists:
        saved()
    before = contents(tmp_path)
    monkeypatch.setattr(save, "write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    refused("No space left", saved, overwrite=True)
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == exists


def test_the_old_folder_stays_when_the_new_one_cannot_take_its_place(saved, out, monkeypatch):
    saved()
    real = Path.rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(saved_folder, "_exchange", lambda *_: False)  # as where the system cannot
    refused("Input/output error", saved, dtype="bfloat16", overwrite=True)
    assert make.stored_dtypes(out) == {torch.float32}
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    monkeypatch.undo()
    out.rename(out.parent / ".out.old-abc")  # as a save leaves it that was cut off between two renames
    cut_off = r"out does not exist; an interrupted save .* in .*\.out\.old-abc: rename that"
    refused(cut_off, weights.resolve_checkpoint, out)


def test_there_is_always_a_checkpoint_under_the_name(saved, out, monkeypatch):
    saved()
    if not saved_folder._exchange(*(make.write(out.parent / name, {}, {}) for name in "ab")):
        pytest.skip("this system cannot exchange two names")
    real, seen = shutil.rmtree, []

    def rmtree(path, **options):  # what is removed is the old one, under the other's name, when the new one is there
        seen.append((make.stored_dtypes(out), make.stored_dtypes(Path(path))))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("renamed in two steps"))
    saved(dtype="bfloat16", overwrite=True)
    assert seen == [({torch.bfloat16}, {torch.float32})]


def fill(folder, word):
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(word)


def replace(folder):
    with files.folder_beside(folder, "partial") as partial:
        fill(partial, "new")
        saved_folder.put_in_place(partial, folder)


def replace_until(folder, exchange, last):
    """Kills the process at the numbered step. Steps are operations on files, names, folders and libraries."""
    if not exchange:
        saved_folder._exchange = lambda *_: False
    steps = itertools.count(1)

    def step(event, _):
        if event.partition(".")[0] in ("open", "os", "shutil", "tempfile", "ctypes") and next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(step)
    replace(folder)


@pytest.mark.slow  # a process for each of some thirty steps
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_step_a_save_leaves_the_old_or_the_new_and_the_next_one_tidies_up(exchange, out):
    seen = set()
    for last in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        fill(out, "old")
        run = Function(replace_until, out, exchange, last)
        run._process.join()
        if run._process.exitcode == 0:
            break
        assert run._process.exitcode == -signal.SIGKILL
        found = out
        if not out.exists():  # between two renames
            (found,) = out.parent.glob(".out.old-*")
            assert str(found) in refused("an interrupted save", weights.resolve_checkpoint, out)
        (content,) = set(contents(found).values())
        seen.add((found == out, content))
        replace(out)
        assert [entry.name for entry in out.parent.iterdir()] == ["out"] and set(contents(out).values()) == {b"new"}
    assert seen >= {(True, b"old"), (True, b"new")} and (len(seen) > 2) == (not exchange)


def test_permissions_follow_the_umask(saved):
    mask = os.umask(0o022)
    try:
        folder = saved()
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_parameters_that_do_not_fit(params, drawn_config, saved, out):
    flat = flatten(params)
    del flat["language_model/norm/scale"]
    flat["connector/linear_3/kernel"] = jnp.zeros((1, 1))
    flat["connector/linear_1/bias"] = jnp.zeros(3)
    message = refused("missing: language_model/norm/scale", weights.save_checkpoint, out, unflatten(flat), drawn_config)
    assert "unexpected: connector/linear_3/kernel" in message and "[3] instead of [48]" in message
    refused("scheme 'x'", saved, scheme="x")
    assert not list(out.parent.iterdir())
