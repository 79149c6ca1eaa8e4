"""Images at the beginning of several prompts are run once, whatever the schedule and the mesh."""

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.generation import branches, decode_loop, prefixes
from tests.models import zoo
from tests.slow import named
from tests.small import conversation

ENDS = ("Eh", "Oh!", "Ah??", "Hm...")
METHODS = {
    "none": None,
    "cmac": methods.CMAC(alpha=1.0, variant="code", gate="first"),
    "last": methods.VAF(start_layer=0),
}


@pytest.fixture
def rows(monkeypatch):
    """The number of samples in each separate run of prefixes."""
    seen, call = [], decode_loop.prefix
    monkeypatch.setattr(
        decode_loop,
        "prefix",
        lambda params, config, prompt, **k: seen.append(len(prompt.image_id)) or call(params, config, prompt, **k),
    )
    return seen


def two_pictures_of_four_questions():
    return [conversation(end, seed=seed) for end in ENDS for seed in (3, 4)]


@pytest.mark.parametrize("name", named(METHODS, slow=["none", "last"]))
def test_a_batch_runs_each_beginning_once(model, rows, name):
    asked, settings = two_pictures_of_four_questions(), {"method": METHODS[name], "max_new_tokens": 6}
    alone = [model.generate(one, **settings) for one in asked]
    assert rows == []
    together = model.generate(asked, **settings)
    assert rows == [2]
    assert together.tokens == [one.tokens[0] for one in alone]
    for one, other in zip(together.logprobs, alone, strict=True):
        np.testing.assert_allclose(one, other.logprobs[0], atol=1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        [conversation(ENDS[0], seed=3)] * 4,  # copies that fill a batch
        [conversation(end, seed=seed) for seed, end in enumerate(ENDS)],
        [conversation(end) for end in ENDS],
    ],
    ids=["copies", "pictures of their own", "words"],
)
def test_prompts_that_share_little_are_run_as_they_are(model, rows, asked):
    model.generate(asked, max_new_tokens=2)
    assert rows == []


def test_methods_with_prompts_of_their_own_share_nothing(model, rows):
    model.generate(two_pictures_of_four_questions(), method=methods.VCD(), max_new_tokens=2)
    assert rows == []


def test_prompts_that_follow_each_other_share_what_they_begin_with(model, rows):
    asked = [conversation(end, seed=seed) for seed in (3, 4) for end in ENDS]
    want = model.generate(asked, max_new_tokens=6, stop_token_ids=[])
    rows.clear()
    found = dict(model.generate_many([(one, 0) for one in asked], max_new_tokens=6, stop_token_ids=[], batch_size=3))
    assert rows == [1, 1]  # with the second question about each picture
    assert [found[number].tokens[0] for number in range(8)] == want.tokens


@pytest.mark.parametrize("name", named(["qwen2_vl", "gemma3", "llava_next"], slow=["gemma3", "llava_next"]))
def test_positions_and_pictures_of_other_families(tmp_path, rows, name):
    """Questions of different lengths about an image; positions along several axes, whole-image attention, tiles."""
    case = zoo.load(name, tmp_path)
    model = case.model
    inputs = case.prompt(0, 0, 2, 2).with_answers([[5], [6, 7, 8], [5, 5], [9]], 0)
    state, step = branches.prefill(model.params, model.config, inputs, None, 8)
    assert rows == [2]
    whole = branches.prefill(model.params, model.config, inputs, None, 8, share_prefix=False)[1]
    np.testing.assert_allclose(step.combined, whole.combined, atol=1e-5)
    following = [model.decode(one, step.combined.argmax(axis=-1))[1] for one in (state,)]
    assert np.isfinite(following[0].combined).all()


def test_keys_tell_pictures_and_words_apart(model):
    one, same, picture, words = (
        model.prepare([conversation(text, seed=seed)])
        for text, seed in (("Eh", 3), ("Oh!", 3), ("Eh", 4), ("Eh", None))
    )
    keys = [prefixes.beginnings(inputs, 30)[0] for inputs in (one, same, picture, words)]
    assert keys[0] == keys[1] and len(set(keys)) == 3
