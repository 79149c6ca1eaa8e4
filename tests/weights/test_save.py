"""What is saved loads in transformers and here, bit for bit, and appears whole or not at all."""

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
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights import folder as saved_folder
from lvlm_jax.weights import save
from lvlm_jax.weights.tables import flatten, unflatten
from tests.killing import Function, contents
from tests.weights import checkpoints as make


@pytest.fixture(scope="module")
def model():
    return make.random_model()


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    folder = make.write_scheme(tmp_path_factory.mktemp("source") / "m", model, make.HUB)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    return folder


@pytest.fixture(scope="module")
def config(source):
    return make.config_of(source)


@pytest.fixture(scope="module")
def params(source, config):
    return weights.load_parameters(source, config, "float32")


def assert_transformers_loads(folder, model):
    loaded, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    return loaded


@pytest.mark.parametrize("scheme", ["hub", "transformers", "state_dict", "state_dict_4"])
def test_transformers_loads_it_with_equal_tensors(scheme, model, params, config, tmp_path):
    folder = weights.save_checkpoint(tmp_path / "out", params, config, scheme=scheme)
    assert_transformers_loads(folder, model)


def test_transformers_gives_equal_logits(model, params, config, tmp_path):
    loaded = assert_transformers_loads(weights.save_checkpoint(tmp_path / "out", params, config), model)
    tokens = torch.tensor([[1, 5, 90, 90, 90, 90, 7, 8]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        logits = [net(input_ids=tokens, pixel_values=pixels).logits for net in (model, loaded.eval())]
    assert torch.equal(*logits)


def test_tied_embeddings(tmp_path):
    tied = make.random_model(tie=True)
    source = make.write_scheme(tmp_path / "in", tied, make.HUB)
    config = make.config_of(source)
    folder = weights.save_checkpoint(tmp_path / "out", weights.load_parameters(source, config), config)
    loaded = assert_transformers_loads(folder, tied)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_equal(dtype, source, config, tmp_path):
    first = weights.load_parameters(source, config, dtype)
    once = weights.save_checkpoint(tmp_path / "a", first, config, source)
    second = weights.load_parameters(once, make.config_of(once))
    make.assert_same(first, second)
    twice = weights.save_checkpoint(tmp_path / "b", second, config, once)
    for file in once.iterdir():
        assert file.read_bytes() == (twice / file.name).read_bytes(), file.name


def test_the_dtype_is_written_into_the_configuration(params, config, tmp_path):
    folder = weights.save_checkpoint(tmp_path / "out", params, config, dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}


def test_a_mixture_of_dtypes(params, config, tmp_path):
    mixed = unflatten(
        {path: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf for path, leaf in flatten(params).items()}
    )
    folder = weights.save_checkpoint(tmp_path / "out", mixed, config)
    make.assert_same(weights.load_parameters(folder, config), mixed)


def test_shards(model, params, config, tmp_path):
    folder = weights.save_checkpoint(tmp_path / "out", params, config, max_shard_size=60_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 80_000 for file in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in flatten(params).values())
    assert_transformers_loads(folder, model)
    make.assert_same(weights.load_parameters(folder, config), params)


def test_processor_files_are_copied_and_code_is_not(params, config, source, tmp_path):
    source = Path(shutil.copytree(source, tmp_path / "source"))
    (source / "video_preprocessor_config.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (source / "modeling_custom.py").write_text("raise SystemExit")
    with pytest.warns(UserWarning, match="code of its own, which is not copied: modeling_custom.py"):
        folder = weights.save_checkpoint(tmp_path / "out", params, config, source)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"video_preprocessor_config.json", "additional_chat_templates"}
    assert {file.name for file in folder.iterdir()} == names
    template = folder / "additional_chat_templates" / "rag.jinja"
    assert template.read_text() == "{{ messages }}"
    again = weights.save_checkpoint(folder, params, config, folder, overwrite=True)
    assert {file.name for file in again.iterdir()} == names and template.exists()
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5
    plain = weights.save_checkpoint(tmp_path / "plain", params, config)
    assert json.loads((plain / "generation_config.json").read_text())["eos_token_id"] == 2


def test_an_existing_folder_is_refused(params, config, source, tmp_path):
    folder = weights.save_checkpoint(tmp_path / "out", params, config, source)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(LVLMError, match="not empty"):
        weights.save_checkpoint(folder, params, config)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    weights.save_checkpoint(folder, params, config, processor_source=folder, dtype="bfloat16", overwrite=True)
    assert (folder / "tokenizer.json").exists()
    assert make.stored_dtypes(folder) == {torch.bfloat16}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_overwriting_spares_folders_that_are_no_checkpoint(params, config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(LVLMError, match=r"thesis\.tex"):
        weights.save_checkpoint(tmp_path / "out", params, config, overwrite=True)
    with pytest.raises(LVLMError, match="is a file"):
        weights.save_checkpoint(tmp_path / "out" / "thesis.tex", params, config, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_taken(params, config, tmp_path):
    (tmp_path / "out").mkdir()
    weights.save_checkpoint(tmp_path / "out", params, config)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_half_written_remains(exists, params, config, tmp_path, monkeypatch):
    if exists:
        weights.save_checkpoint(tmp_path / "out", params, config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    monkeypatch.setattr(save, "write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(LVLMError, match="No space left"):
        weights.save_checkpoint(tmp_path / "out", params, config, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
    assert len(list(tmp_path.iterdir())) == exists


def test_the_old_folder_stays_when_the_new_one_cannot_take_its_place(params, config, tmp_path, monkeypatch):
    folder = weights.save_checkpoint(tmp_path / "out", params, config)
    real = Path.rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(saved_folder, "_exchange", lambda *_: False)  # as where the system cannot
    with pytest.raises(LVLMError, match="Input/output error"):
        weights.save_checkpoint(folder, params, config, dtype="bfloat16", overwrite=True)
    assert make.stored_dtypes(folder) == {torch.float32}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_there_is_always_a_checkpoint_under_the_name(params, config, tmp_path, monkeypatch):
    folder = weights.save_checkpoint(tmp_path / "out", params, config)
    if not saved_folder._exchange(*(make.write(tmp_path / name, {}, {}) for name in "ab")):
        pytest.skip("this system cannot exchange two names")
    real = shutil.rmtree
    seen = []

    def rmtree(path, **options):  # what is removed is the old one, under the other's name, when the new one is there
        seen.append((make.stored_dtypes(folder), make.stored_dtypes(Path(path))))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("renamed in two steps"))
    weights.save_checkpoint(folder, params, config, dtype="bfloat16", overwrite=True)
    assert seen == [({torch.bfloat16}, {torch.float32})]


def test_a_save_that_was_cut_off_between_two_renames_is_found(params, config, tmp_path):
    folder = weights.save_checkpoint(tmp_path / "out", params, config)
    folder.rename(tmp_path / ".out.old-abc")
    with pytest.raises(LVLMError, match=r"out is not there, and a save .* in .*\.out\.old-abc: rename that"):
        weights.resolve_checkpoint(folder)


def fill(folder, word):
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(word)


def replace(folder):
    with files.folder_beside(folder, "partial") as partial:
        fill(partial, "new")
        saved_folder.put_in_place(partial, folder)


def replace_until(folder, exchange, last):
    """Is killed at the step of that number; steps are what concerns files, names, folders and libraries."""
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
def test_killed_at_any_step_a_save_leaves_the_old_or_the_new_and_the_next_one_tidies_up(exchange, tmp_path):
    folder, seen = tmp_path / "out", set()
    for last in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        fill(folder, "old")
        run = Function(replace_until, folder, exchange, last)
        run._process.join()
        if run._process.exitcode == 0:
            break
        assert run._process.exitcode == -signal.SIGKILL
        if folder.exists():
            found = folder
        else:  # between two renames
            with pytest.raises(LVLMError, match="was cut off") as caught:
                weights.resolve_checkpoint(folder)
            (found,) = tmp_path.glob(".out.old-*")
            assert str(found) in str(caught.value)
        (content,) = set(contents(found).values())
        seen.add((found == folder, content))
        replace(folder)
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"] and set(contents(folder).values()) == {b"new"}
    assert seen >= {(True, b"old"), (True, b"new")} and (len(seen) > 2) == (not exchange)


def test_permissions_follow_the_umask(params, config, tmp_path):
    mask = os.umask(0o022)
    try:
        folder = weights.save_checkpoint(tmp_path / "out", params, config)
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_parameters_that_do_not_fit(params, config, tmp_path):
    flat = flatten(params)
    del flat["language_model/norm/scale"]
    flat["connector/linear_3/kernel"] = jnp.zeros((1, 1))
    flat["connector/linear_1/bias"] = jnp.zeros(3)
    with pytest.raises(LVLMError) as caught:
        weights.save_checkpoint(tmp_path / "out", unflatten(flat), config)
    for part in ("missing: language_model/norm/scale", "unexpected: connector/linear_3/kernel", "[3] instead of [48]"):
        assert part in str(caught.value)
    with pytest.raises(LVLMError, match="scheme 'x'"):
        weights.save_checkpoint(tmp_path / "out", params, config, scheme="x")
    assert not list(tmp_path.iterdir())


def test_bfloat16_parameters_from_a_jitted_step_are_saved(params, config, tmp_path):
    stepped = jax.jit(lambda tree: jax.tree.map(lambda leaf: (leaf * 2).astype(jnp.bfloat16), tree))(params)
    folder = weights.save_checkpoint(tmp_path / "out", stepped, config)
    make.assert_same(weights.load_parameters(folder, config), stepped)
