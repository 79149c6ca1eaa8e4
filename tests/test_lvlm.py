"""The public class: what it refuses and with which message, and that it needs no torch."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lvlm_jax import LVLM
from lvlm_jax.weights.tables import flatten, unflatten
from tests.refusals import refused
from tests.small import conversation

ROOT = pathlib.Path(__file__).parents[1]
LENGTH = 41 + 64  # rounded up to 128 columns, 64 of them the padded prompt's


def test_a_full_state_takes_no_token(model, mixed):
    state, step = model.prefill(mixed, max_length=LENGTH)
    for tokens in ([1, 2], [1, 2, 3, 4], [[1, 2, 3]], 5, range(10**12)):
        refused(r"expected \(3,\), one per sample", model.decode, state, tokens)
    for _ in range(64):
        state, step = model.decode(state, [5, 6, 7])
    assert np.isfinite(step.combined).all()
    refused("holds 128 columns and is full.*larger max_length", model.decode, state, [5, 6, 7])
    refused("max_length is 40 and the prompt has 41 tokens", model.prefill, mixed, max_length=40)


def test_parameters_of_other_shapes_are_named(model):
    flat = flatten(model.params)
    kernel = next(path for path in flat if path.endswith("down_proj/kernel"))
    short = unflatten(flat | {kernel: flat[kernel][:-1]})
    refused(rf"1 misshapen: {kernel} \[\d+, \d+\] instead of", LVLM, short, model.config)


def test_messages_that_cannot_be_used(model):
    for messages, message in (
        ([], "messages must be a conversation"),
        ([[]], "messages must be a conversation"),
        ("What is this?", "messages must be a conversation"),
        (["What is this?"], "messages must be a conversation"),
        ([conversation("one"), "two"], "messages must be a conversation"),
        ([{"role": "user"}], "needs 'role' and 'content'; got the keys 'role'"),
        ([{"content": "Hello"}], "needs 'role' and 'content'; got the keys 'content'"),
        ([{"role": "user", "content": None}], "the content of a message is None"),
        ([{"role": "user", "content": ["Hello"]}], "part of type None is not supported"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "part of type 'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part of type 'text' is not supported"),
        ([{"role": "user", "content": [{"type": "image"}]}], "an image part has no image"),
        ([{"role": "user", "content": "a <image> here"}], "1 image placeholders and 0 images"),
        (conversation("a <image> here", seed=0), "2 image placeholders and 1 images"),
        (conversation("word " * 40), "the model's context is 96"),
    ):
        refused(message, model.generate, messages)


def test_messages_become_the_processors_tokens(model):
    """One conversation or a list of them; the picture's tokens stand where the placeholder stood."""
    prompt = model.prepare(conversation("Hi", seed=0))
    ids = prompt.tokens[0, prompt.image_id[0] >= 0]
    assert model.processor.tokenizer.decode(ids) == "<s>USER: " + "<image>" * 16 + "\nHi ASSISTANT:"
    assert prompt.pixels.shape == (1, 3, 28, 28)
    both = model.prepare([conversation("Hello there"), conversation("Hi", seed=0)])
    np.testing.assert_array_equal(both.tokens[1], prompt.tokens[0])
    np.testing.assert_array_equal(both.pixels, prompt.pixels)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_take_the_dtype_asked_for(checkpoint, mixed, model, dtype):
    narrow = LVLM.from_pretrained(checkpoint, dtype=dtype)
    assert str(narrow.params["language_model"]["lm_head"]["kernel"].dtype) == dtype
    state, step = narrow.prefill(mixed, max_length=LENGTH)
    assert str(state.caches[0].own[0].key.dtype) == dtype
    _, exact = model.prefill(mixed, max_length=LENGTH)
    error = np.abs(np.asarray(step.main) - np.asarray(exact.main))
    assert 0 < error.max() < 0.1 * np.asarray(exact.main).std() * (8 if dtype == "bfloat16" else 1)


def test_what_cannot_be_loaded_is_named(checkpoint, tmp_path):
    refused("nowhere", LVLM.from_pretrained, tmp_path / "nowhere")
    for dtype in ("int8", "float64", "half", ""):
        message = f"dtype '{dtype}' is not supported; expected one of float32, bfloat16"
        refused(message, LVLM.from_pretrained, checkpoint, dtype=dtype)


def test_a_model_without_a_folder_runs_on_arrays(model, mixed):
    bare = LVLM(model.params, model.config)
    refused("not read from a folder, so it has no processor", bare.prepare, conversation("Hello"))
    refused("stop strings need a tokenizer", bare.generate, mixed, max_new_tokens=2, stop="x")
    refused("a stop string is empty", model.generate, mixed, max_new_tokens=2, stop=["x", ""])
    out = bare.generate(mixed, max_new_tokens=4)
    assert out.tokens == model.generate(mixed, max_new_tokens=4).tokens and out.text == [""] * 3


def test_attention_is_that_of_the_row_that_wrote_the_token(model, mixed):
    """Weights on image tokens, one answer longer than the other; shares of one, so between 0 and 1."""
    maps = model.attention(mixed, [[5, 6, 7], [8], [9, 10]])
    assert [taken.shape for taken in maps] == [(2, 3, 4, 16), (2, 1, 4, 0), (2, 2, 4, 32)]
    shares = np.concatenate([maps[0].sum(-1).ravel(), maps[2].sum(-1).ravel()])
    assert 0 < shares.min() and shares.max() <= 1 + 1e-5
    assert np.ptp(maps[0], axis=1).max() > 1e-3


WITHOUT_TORCH = """
import sys

import lvlm_jax

assert "torch" not in sys.modules
sys.modules.update(torch=None, torchvision=None)  # as if they were not installed

import numpy as np
from lvlm_jax import LVLM, methods

model = LVLM.from_pretrained(sys.argv[1])
picture = np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Hi"}]}]
out = model.generate(messages, methods.CMAC(), max_new_tokens=3)
model.save_pretrained(sys.argv[2])
assert not any(name.startswith("torch.") for name in sys.modules)
print(len(out.tokens[0]), out.finish_reason[0])
"""


def test_nothing_needs_torch(checkpoint, tmp_path):
    """Importing the package, reading a checkpoint, answering, writing it."""
    command = [sys.executable, "-c", WITHOUT_TORCH, checkpoint, tmp_path / "saved"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["3", "length"] and (tmp_path / "saved" / "model.safetensors").is_file()
