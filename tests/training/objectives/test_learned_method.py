"""Learned strengths on the small model: bounds, refusals, the file, resuming, and that something is learned."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lvlm_jax import methods, models
from lvlm_jax.attention.layered import Layered
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import grid
from lvlm_jax.generation import forcing
from lvlm_jax.methods import learned
from lvlm_jax.methods.fitted import Source
from lvlm_jax.training import finetune, settings
from lvlm_jax.training.objectives import learned_method
from lvlm_jax.training.strengths import Strengths
from tests.small import conversation
from tests.training import pair_sets

WORDS = "middle_layers:start_layer=1,end_layer=none+vaf:start_layer=0,end_layer=none"
SOURCE = Source("learned", "hash", "pairs", "{}")


def config_of(data, **changes):
    config = pair_sets.config(data, recipe="learned_method")
    config.learned.method, config.steps, config.loop.save_every = WORDS, 4, 1
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pair_sets.write(tmp_path_factory.mktemp("pairs"))


def strengths_of(words, per="head", names=(), layers=2, heads=4):
    method = methods.as_method(words)
    return Strengths.of(getattr(method, "members", (method,)), per, layers, heads, names)


def test_strengths_begin_where_they_are_and_keep_their_bounds():
    found = Strengths.of((methods.PAI(start_layer=1), methods.VISTA(lambda_=-0.5)), "head", 2, 4)
    names = [f"{one.group}.{one.name}" for one in found.learnables]
    assert names == ["0_pai.alpha", "0_pai.gamma", "0_pai.beta", "1_vista.lambda_", "1_vista.gamma"]
    start = found.start()
    assert [start["0_pai"][name].shape for name in ("alpha", "gamma", "beta")] == [(1, 4), (), ()]
    assert start["1_vista"]["lambda_"].shape == (2,)  # acts on all heads of a layer
    for far in (0.0, -30.0, 30.0):
        pai, vista = found.members_at(jax.tree.map(lambda theta, far=far: theta + far, start))
        if not far:
            np.testing.assert_allclose(pai.alpha.values, np.full((2, 4), 0.2), rtol=1e-6)
            np.testing.assert_allclose([pai.gamma, pai.beta, vista.gamma], [1.1, 0.1, 0.3], rtol=1e-6)
        np.testing.assert_allclose(pai.alpha.values[0], 0.2, rtol=1e-6)  # a layer that PAI leaves alone
        assert (np.asarray(pai.alpha.values) >= 0).all() and 0 <= float(pai.beta) <= 1
        np.testing.assert_allclose(vista.lambda_.values, -0.5 + 0.5 * far, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "names", "message"),
    [
        ("sevi", ["kappa"], "sevi.kappa is a threshold and has no gradient; leave it out"),
        ("sid", ["sid.keep"], "sid.keep is a number of tokens and has no gradient"),
        ("vti", ["lambda_image"], "vti.lambda_image is a strength of the vision tower.* has no gradient; leave it out"),
        ("m3id", ["beta"], "m3id.beta is used only with variant=port and has no gradient"),
        ("vaf", ["alpha"], "no method has a strength alpha; expected one of vaf.enhance, vaf.suppress"),
        ("eah", [], "none of these methods has a strength with a gradient"),
        ("opera", [], "OPERA is a search"),
        ("pai:alpha=0,start_layer=1", [], "pai.alpha starts at its bound, 0, .*; start inside, as in pai:alpha=0.1"),
        ("vaf:enhance=1,1.1,1.2", [], "vaf.enhance has 3 values and the model 2 layers"),
    ],
)
def test_what_cannot_be_learned_is_named(words, names, message):
    with pytest.raises(LVLMError, match=message):
        strengths_of(words, names=names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora.enabled": True}, "no parameter of the model"),
        ({"loop.workers": 1}, "set loop.workers=0"),
        ({"accumulate": 5}, "in one piece"),
        ({"mesh.fsdp": 2}, "one device"),
        ({"learned.per": "token"}, "learned.per is 'token'; expected one of model, layer, head"),
        ({"learned.softness": 0.0}, "learned.softness is 0.0; expected a number of nats above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(data, change, message):
    with pytest.raises(LVLMError, match=message):
        settings.check(config_of(data, **change))


@pytest.fixture(scope="module")
def train(model, data):
    """train(work folder): the file of a run of four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "load", lambda *_: model)
        yield lambda workdir: finetune.train(config_of(data, validation=str(data)), workdir)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "whole")


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_as_an_undisturbed_one(model, train, whole, tmp_path):
    """The file reloads bit-equal; a learned method is swept and looked at like others."""
    shutil.copytree(whole.parent, tmp_path / "parts")  # as it was when it was stopped behind the third step
    shutil.rmtree(tmp_path / "parts" / "learned_method" / "4")
    (tmp_path / "parts" / "method.safetensors").unlink()
    method, other = methods.as_method(f"learned:{whole}"), learned.read(train(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, method, dataclasses.replace(other, source=method.source))
    prompt = model.prepare(conversation("What?", seed=1))
    swept = model.sweep(prompt, [grid.at(method, point) for point in grid.points(method, ["vaf.enhance=1,2"])], 3)
    looked = model.attention(prompt, swept[0].tokens, method)
    assert len(swept) == 2 and np.isfinite(looked[0]).all()


def test_the_file_of_a_run_is_a_method(model, data, whole, tmp_path, monkeypatch):
    """The loss falls; the method's metrics are those of generation; another model is refused."""
    lines = [json.loads(line) for line in (whole.parent / "log.jsonl").read_text().splitlines()]
    first, last = (next(line for line in order if "val/nll" in line) for order in (lines, lines[::-1]))
    assert last["val/nll"] + last["val/preference"] < first["val/nll"] + first["val/preference"] - 1e-3
    method = methods.as_method(f"learned:{whole}")
    assert method.members[0].alpha.values.shape == (2,)
    assert method.members[0].alpha.values[0] == np.float32(0.5) != method.members[0].alpha.values[1]
    assert method.source.model == model.hash and json.loads(method.source.settings)["per"] == "layer"

    asked = pair_sets.PAIRS[0]
    rows = learned_method.task(model, models.build(model.config), config_of(data), tmp_path).source
    prompt = model.prepare([list(rows.batches.rows[0].conversation)])
    said = model.generate(prompt, method=method, max_new_tokens=5)
    assert asked[0] == "What?" and np.isfinite(said.logprobs[0]).all()
    opened = forcing.forced_inputs(model.params, model.config, prompt, method, [[said.tokens[0]]])
    scored = forcing.logprobs(model.params, model.config, opened, method, 2)[0, 0, : len(said.tokens[0])]
    np.testing.assert_allclose(scored, said.logprobs[0], rtol=0, atol=1e-4)
    monkeypatch.setitem(vars(model), "hash", "of another one")
    with pytest.raises(LVLMError, match="learned was fitted for the checkpoint .*; learn it again with lvlm train"):
        model.generate(prompt, method=method)


def test_a_strength_that_nothing_moves_is_named():
    found = strengths_of("vaf", per="model")
    with pytest.raises(LVLMError, match="vaf.suppress had no gradient on these pairs"):
        found.refuse_unmoved({"0_vaf": {"enhance": 0.1, "suppress": 0.0}})
    found.refuse_unmoved(found.start())  # before the first step


def test_files(tmp_path):
    """Values by layer and head, switches, fitted arrays; nothing in a file is imported."""
    vaf = methods.VAF(enhance=np.full((2, 4), 1.5), layers=(1,))
    one = learned.Learned((vaf, methods.SEVI.preset("focused+cicd")), SOURCE)
    learned.write(tmp_path / "m.safetensors", one)
    found = methods.as_method(f"learned:{tmp_path / 'm.safetensors'}")
    assert jax.tree.structure(found) == jax.tree.structure(one) and found.members[0].layers == (1,)
    jax.tree.map(np.testing.assert_array_equal, found, one)
    content = (tmp_path / "m.safetensors").read_bytes()
    for word, change, message in (
        ("own", (b'\\"vaf\\"', b'\\"var\\"'), "cannot read"),
        ("format", (b"learned 1", b"learned 9"), "is not a learned method"),
        ("code", (b'\\"sevi\\"', b'\\"a:Bc\\"'), "'a:Bc', which is not registered"),
    ):
        changed = content.replace(*change)
        assert changed != content
        (tmp_path / word).write_bytes(changed)
        with pytest.raises(LVLMError, match=message):
            learned.read(tmp_path / word)
    (tmp_path / "other").write_bytes(safetensors.numpy.save({"a": np.zeros(2)}))
    with pytest.raises(LVLMError, match="is not a learned method"):
        methods.as_method(f"learned:{tmp_path / 'other'}")
    with pytest.raises(LVLMError, match="/nowhere/m.safetensors"):
        methods.as_method("learned:/nowhere/m.safetensors")


def test_a_value_for_each_layer_and_head():
    values = Layered(jnp.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(values.at(1, 2)[:, 0, 0], [3, 4, 5])
    with pytest.raises(LVLMError, match="has 2 values and the model 4 layers"):
        values.at(1, 4)
    for wrong, message in (
        ([[[1.0]]], r"has shape \(1, 1, 1\); expected a number >= 0, or one for each layer, or layer and head"),
        ([-1.0, 2.0], "has values from -1 to 2; each must be a number >= 0"),
        (["1"], "expected a number >= 0, or one"),
        ([True, False], "expected a number >= 0, or one"),
        ([[1.0], [1.0, 2.0]], "expected a number >= 0, or one"),
    ):
        with pytest.raises(LVLMError, match=f"VAF: enhance .*{message}"):
            methods.VAF(enhance=wrong)
    assert methods.as_method("vaf:enhance=1,1.5").enhance.values.tolist() == [1, 1.5]
