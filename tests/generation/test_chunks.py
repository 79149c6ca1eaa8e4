"""Prompts in chunks: results equal those without chunks, and other answers continue between two chunks."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.attention import LayerCache
from lvlm_jax.generation import branches, chunks, continuous, decode_loop, forward
from tests.models import zoo
from tests.slow import named
from tests.small import conversation

attend = sys.modules["lvlm_jax.attention.attend"]  # the package has the function under this name
ROWS = 8  # of prompts of 64 columns
IN_CHUNKS = {
    "none": None,
    "a shared prefix": methods.CMAC(alpha=1.0, variant="code", gate="first"),
    "one branch": methods.VAF(start_layer=0),
    "exits": methods.DoLa(layers=(0, 1)),
}
IN_ONE_PIECE = {
    "all rows": (methods.EAH(beta=0.0001, layer=0), "EAH edits all rows of a prompt"),
    "a prompt of its own": (methods.VCD(), "the branches of VCD read prompts of their own"),
    "a warm-up pass": (methods.VISTA(start_layer=0), "VISTA has a warm-up pass over the whole prompt"),
}


@pytest.fixture
def counted(monkeypatch):
    """The steps on the device, in order."""
    done = []
    chunks.say.cache_clear()
    for place, name in ((decode_loop, "extended"), (decode_loop, "prefill"), (continuous, "run")):
        call = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, call=call, name=name, **k: done.append(name) or call(*a, **k))
    return done


def run(model, inputs, method, rows):
    return branches.begin_prefill(model.params, model.config, inputs, method, 40, rows=rows).finish()


@pytest.mark.parametrize("name", named(IN_CHUNKS, slow=["none", "exits"]))
def test_logits_are_those_of_one_piece(model, mixed, counted, name):
    inputs, method = model.prepare(mixed), IN_CHUNKS[name]
    (whole, first), (state, step) = (run(model, inputs, method, rows) for rows in (None, ROWS))
    assert counted[0] == "prefill" and counted[1:] == ["extended"] * (len(counted) - 2) + ["prefill"]
    assert len(counted) > 3
    for _ in range(3):
        np.testing.assert_allclose(step.combined, first.combined, atol=1e-5)
        tokens = np.asarray(first.combined.argmax(axis=-1))
        (whole, first), (state, step) = (model.decode(one, tokens) for one in (whole, state))


def test_methods_that_need_the_whole_prompt_are_run_in_one_piece_and_it_is_said(model, mixed, counted, capsys):
    for method, reason in IN_ONE_PIECE.values():
        assert chunks.obstacle(model.config, method) == reason
    method, reason = IN_ONE_PIECE["all rows"]
    inputs = model.prepare(mixed)
    (_, first), (_, step) = (run(model, inputs, method, rows) for rows in (None, ROWS))
    np.testing.assert_array_equal(step.combined, first.combined)
    assert "extended" not in counted
    assert f"long prompts are run in one piece: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [{}, {"num_beams": 2}, pytest.param({"method": methods.OPERA(beams=2)}, marks=pytest.mark.slow)], ids=str
)
def test_answers_of_searches_and_batches_in_chunks(model, monkeypatch, counted, kind):
    asked = [conversation("Eh" + "?" * more, seed=more) for more in range(3)]
    expected = model.generate(asked, max_new_tokens=8, **kind)
    monkeypatch.setattr(chunks, "MOST", 3 * ROWS)
    counted.clear()
    found = model.generate(asked, max_new_tokens=8, **kind)
    assert found.tokens == expected.tokens and "extended" in counted
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_answers_go_on_between_the_chunks_of_a_long_prompt(model, monkeypatch, counted):
    asked = [conversation("Eh" + "?" * more, seed=more) for more in range(6)]
    settings = {"max_new_tokens": 24, "stop_token_ids": [], "batch_size": 3}
    want = model.generate(asked, max_new_tokens=24, stop_token_ids=[])
    monkeypatch.setattr(chunks, "ROWS", ROWS)
    counted.clear()
    found = dict(model.generate_many([(one, 0) for one in asked], **settings))
    assert [found[number].tokens[0] for number in range(6)] == want.tokens
    for number in range(6):
        np.testing.assert_allclose(found[number].logprobs[0], want.logprobs[number], atol=1e-5)
    behind = counted[counted.index("run") :]
    assert "run extended run" in " ".join(behind) and "run run run" not in " ".join(behind[: len(behind) // 2])


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_chunks_that_stream_have_the_columns_of_one_piece(monkeypatch, tmp_path, name):
    """Includes positions along several axes and deepstack layers."""
    model, inputs = (case := zoo.load(name, tmp_path)).model, case.prompt(0, 2)
    main = branches.embed_prompt(model.params, model.config, inputs)
    split = main.image_id.shape[1] - 4
    want = forward.prefix(model.params, model.config, main, split, split, inputs.image_count)
    for place, constant, value in ((forward, "STREAM_FROM", 1), (attend, "SHORT_QUERY", 0)):
        monkeypatch.setattr(place, constant, value)
    caches = None
    for start in (0, 15, 30, split - 20):
        sizes = {"rows": 20, "split": split, "image_count": inputs.image_count}
        caches = forward.extended(model.params, model.config, main, caches, jnp.int32(start), **sizes)
    alive = np.asarray(main.image_id >= 0)[:, None, :split, None]
    found = tuple(LayerCache(cache.own[0], ()) for cache in caches)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one * alive, other * alive, atol=1e-5), found, want)


def test_images_that_are_seen_whole_keep_a_prompt_in_one_piece(model):
    text = dataclasses.replace(model.config.text, whole_images=True)
    config = dataclasses.replace(model.config, text=text)
    assert chunks.obstacle(config, None) == "image tokens of llava see later ones"
