"""The public face: what it refuses and how it says so, and that it needs no torch."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lvlm_jax import LVLM, LVLMError, methods
from lvlm_jax.weights.tables import flatten, unflatten
from tests.small import conversation

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bare(model):
    """The same parameters without a folder."""
    return LVLM(model.params, model.config)


def test_a_full_state_takes_no_token(model, mixed):
    """`max_length` is rounded up to 128 columns, 64 of them the padded prompt's."""
    state, step = model.prefill(mixed, max_length=41 + 64)
    for _ in range(64):
        state, step = model.decode(state, [5, 6, 7])
    assert np.isfinite(step.combined).all()
    with pytest.raises(LVLMError, match="holds 128 columns and is full.*larger max_length"):
        model.decode(state, [5, 6, 7])


@pytest.mark.parametrize("tokens", [[1, 2], [1, 2, 3, 4], [[1, 2, 3]], 5, range(10**12)], ids=str)
def test_one_token_per_sample(model, mixed, tokens):
    state, _ = model.prefill(mixed, max_length=41 + 64)
    with pytest.raises(LVLMError, match=r"expected \(3,\), one per sample"):
        model.decode(state, tokens)


def test_a_state_must_hold_the_prompt(model, mixed):
    with pytest.raises(LVLMError, match="max_length is 40 and the prompt has 41 tokens"):
        model.prefill(mixed, max_length=40)


def test_parameters_of_other_shapes_are_named(model):
    flat = flatten(model.params)
    kernel = next(path for path in flat if path.endswith("down_proj/kernel"))
    with pytest.raises(LVLMError, match=rf"1 misshapen: {kernel} \[\d+, \d+\] instead of"):
        LVLM(unflatten(flat | {kernel: flat[kernel][:-1]}), model.config)


def test_as_many_seeds_as_conversations(model, mixed):
    with pytest.raises(LVLMError, match="4 seeds were given for 3 conversations"):
        model.generate(mixed, max_new_tokens=2, seed=[1, 2, 3, 4])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a conversation"),
        ([[]], "messages must be a conversation"),
        ("What is this?", "messages must be a conversation"),
        (["What is this?"], "messages must be a conversation"),
        ([conversation("one"), "two"], "messages must be a conversation"),
        ([{"role": "user"}], "needs 'role' and 'content'; got the keys 'role'"),
        ([{"content": "Hello"}], "needs 'role' and 'content'; got the keys 'content'"),
        ([{"role": "user", "content": None}], "needs 'role' and 'content'"),
        ([{"role": "user", "content": ["Hello"]}], "part of type None is not supported"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "part of type 'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part of type 'text' is not supported"),
        ([{"role": "user", "content": [{"type": "image"}]}], "an image part has no image"),
        ([{"role": "user", "content": "a <image> here"}], "1 image placeholders and 0 images"),
        (conversation("a <image> here", seed=0), "2 image placeholders and 1 images"),
        (conversation("word " * 40), "the model's context is 96"),
    ],
)
def test_messages_that_cannot_be_used(model, messages, message):
    with pytest.raises(LVLMError, match=message) as raised:
        model.generate(messages)
    assert "\n" not in str(raised.value)


def test_messages_become_the_processors_tokens(model):
    """One conversation or a list of them; the picture's tokens stand where the placeholder stood."""
    prompt = model.prepare(conversation("Hi", seed=0))
    ids = prompt.tokens[0, prompt.image_id[0] >= 0]
    assert model.processor.tokenizer.decode(ids) == "<s>USER: " + "<image>" * 16 + "\nHi ASSISTANT:"
    assert prompt.pixels.shape == (1, 3, 28, 28)
    both = model.prepare([conversation("Hello there"), conversation("Hi", seed=0)])
    np.testing.assert_array_equal(both.tokens[1], prompt.tokens[0])
    np.testing.assert_array_equal(both.pixels, prompt.pixels)


@pytest.mark.parametrize("dtype", ["int8", "float64", "half", ""])
def test_an_unknown_dtype_is_named(checkpoint, dtype):
    with pytest.raises(LVLMError, match=f"dtype '{dtype}' is not supported; expected one of float32, bfloat16"):
        LVLM.from_pretrained(checkpoint, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_take_the_dtype_asked_for(checkpoint, mixed, model, dtype):
    narrow = LVLM.from_pretrained(checkpoint, dtype=dtype)
    assert str(narrow.params["language_model"]["lm_head"]["kernel"].dtype) == dtype
    state, step = narrow.prefill(mixed, max_length=41 + 64)
    assert str(state.caches[0].own[0].key.dtype) == dtype
    _, exact = model.prefill(mixed, max_length=41 + 64)
    error = np.abs(np.asarray(step.main) - np.asarray(exact.main))
    assert 0 < error.max() < 0.1 * np.asarray(exact.main).std() * (8 if dtype == "bfloat16" else 1)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(LVLMError, match="nowhere"):
        LVLM.from_pretrained(tmp_path / "nowhere")


def test_a_model_without_a_folder_runs_on_arrays(bare, model, mixed):
    with pytest.raises(LVLMError, match="not read from a folder, so it has no processor"):
        bare.prepare(conversation("Hello"))
    with pytest.raises(LVLMError, match="stop strings need a tokenizer"):
        bare.generate(mixed, max_new_tokens=2, stop="x")
    with pytest.raises(LVLMError, match="a stop string is empty"):
        model.generate(mixed, max_new_tokens=2, stop=["x", ""])
    out = bare.generate(mixed, max_new_tokens=4)
    assert out.tokens == model.generate(mixed, max_new_tokens=4).tokens
    assert out.text == [""] * 3


def test_attention_is_that_of_the_row_that_wrote_the_token(model, mixed):
    """Weights on image tokens, one answer longer than the other; shares of one, so between 0 and 1."""
    maps = model.attention(mixed, [[5, 6, 7], [8], [9, 10]])
    assert [taken.shape for taken in maps] == [(2, 3, 4, 16), (2, 1, 4, 0), (2, 2, 4, 32)]
    shares = np.concatenate([maps[0].sum(-1).ravel(), maps[2].sum(-1).ravel()])
    assert 0 < shares.min() and shares.max() <= 1 + 1e-5
    assert np.ptp(maps[0], axis=1).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, "CMAC: alpha is -1.0"),
        ({"beta": 1.5}, "CMAC: beta is 1.5"),
        ({"gamma": 0.0}, "CMAC: gamma is 0.0"),
        ({"variant": "authors"}, "CMAC: variant is 'authors'; expected one of 'paper', 'code'"),
    ],
    ids=str,
)
def test_strengths_out_of_range(arguments, message):
    with pytest.raises(LVLMError, match=message):
        methods.CMAC(**arguments)


WITHOUT_TORCH = """
import sys

sys.modules.update(torch=None, torchvision=None)  # as if they were not installed

import numpy as np
from lvlm_jax import LVLM, methods

model = LVLM.from_pretrained(sys.argv[1])
picture = np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Hi"}]}]
out = model.generate(messages, methods.CMAC(), max_new_tokens=3)
assert not any(name.startswith("torch.") for name in sys.modules)
print(len(out.tokens[0]), out.finish_reason[0])
"""


def test_inference_needs_no_torch(checkpoint):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, checkpoint],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["3", "length"]


def test_importing_the_package_imports_no_torch():
    code = "import sys, lvlm_jax; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
