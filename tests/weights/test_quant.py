"""int8 decoders: loaded tensor by tensor, equal to their dequantized selves, trained through adapters, never saved."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lvlm_jax import LVLM, methods, models, weights
from lvlm_jax.cli import infer
from lvlm_jax.generation import decode_loop, forward
from lvlm_jax.models import int8
from lvlm_jax.pocket.questions import existence
from lvlm_jax.pocket.scenes import render, scene_at
from lvlm_jax.weights import lora, names, parts, quantize
from lvlm_jax.weights.peft import load_adapter, save_adapter
from lvlm_jax.weights.tables import flatten
from tests.refusals import refused
from tests.slow import named
from tests.weights import checkpoints as make
from tests.weights.test_resources import MB, measured, run, write_large

LANGUAGE = "language_model/"


@pytest.fixture(scope="module")
def quantized(checkpoint):
    return LVLM.from_pretrained(checkpoint, quant="int8")


@pytest.fixture(scope="module")
def wide(quantized):
    """The same model with float kernels."""
    return LVLM(quantize.dequantize(quantized.params), quantized.config, quantized.folder)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_kernels_of_the_decoder_are_quantized_as_they_are_stored(stored, dtype, tmp_path):
    folder = make.write_scheme(tmp_path / "m", make.random_model(), make.HUB, getattr(torch, stored))
    kept, wide = (flatten(make.load(folder, kind)) for kind in (dtype, None))
    loaded = flatten(make.load(folder, dtype, quant="int8"))
    kernels = [path for path in kept if path.startswith(LANGUAGE) and path.endswith("_proj/kernel")]
    kernels.append(LANGUAGE + "lm_head/kernel")
    assert len(kernels) == 2 * 7 + 1
    for path in kernels:
        expected = int8.quantize(wide[path].T)
        for name, array in zip(quantize.leaf_paths(path), expected, strict=True):
            got = loaded.pop(name)
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got, array, err_msg=name)
    assert loaded.keys() == kept.keys() - set(kernels)
    assert all(leaf.dtype == dtype for leaf in loaded.values())


def test_a_tied_output_layer_stays_and_a_tree_in_memory_is_quantized_alike(model, quantized, tmp_path):
    folder = make.write_scheme(tmp_path / "m", make.random_model(tie=True), make.HUB)
    loaded = flatten(make.load(folder, "float32", quant="int8"))
    assert not any("lm_head" in path for path in loaded)
    assert loaded[LANGUAGE + "embed_tokens/embedding"].dtype == jnp.float32
    make.assert_same(quantize.quantize(model.params), quantized.params)
    shapes = jax.eval_shape(quantize.quantize, models.abstract_parameters(model.config))
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (shapes, quantized.params))
    assert described[0] == described[1]


METHODS = {"greedy": None, "CMAC": methods.CMAC(alpha=1.0), "VCD": methods.VCD()}


@pytest.mark.parametrize("name", named(METHODS, slow=["CMAC", "VCD"]))
def test_methods_decode_as_on_the_dequantized_kernels(model, quantized, wide, mixed, name):
    method = METHODS[name]
    if method is None:
        valid = mixed["attention_mask"].astype(bool)
        ours, expected, exact = (np.asarray(one.logits(mixed))[valid] for one in (quantized, wide, model))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
        assert 1e-4 < np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()
    forced = np.random.default_rng(3).integers(3, 250, (3, 3)).astype(np.int32)

    def logits(one):
        state, step = one.prefill(mixed, method)
        found = [step.combined]
        for tokens in forced:
            state, step = one.decode(state, tokens)
            found.append(step.combined)
        return np.stack(found)

    np.testing.assert_allclose(logits(quantized), logits(wide), rtol=0, atol=2e-5)
    if not isinstance(method, methods.VCD):
        answers, expected = (one.generate(mixed, method, max_new_tokens=8) for one in (quantized, wide))
        assert answers.tokens == expected.tokens


def test_the_decode_program_reads_int8(quantized, mixed):
    """The option that makes decoding with float kernels faster would make XLA widen the int8 ones to int32."""
    state, _ = quantized.prefill(mixed)
    tokens = jnp.asarray([5, 6, 7], jnp.int32)
    text = decode_loop.decode_step.lower(quantized.params, quantized.config, state, tokens).compile().as_text()
    out, width = quantized.params["language_model"]["layers_0"]["mlp"]["gate_proj"]["kernel_int8"].shape
    assert f"s8[{out},{width}]" in text
    assert not any(f"{kind}[{out},{width}]" in text for kind in ("s32", "f32"))


def test_adapters_train_on_a_quantized_model(quantized, wide, mixed):
    prompt = quantized.prepare(mixed)

    def gradients(one):
        adapters, frozen = lora.attach_adapters(one.params, 4, 8.0, lora.TARGETS, 0.0, jax.random.key(0))
        moved = jax.tree.map(lambda leaf: leaf + 0.01, adapters)  # a B of zeros leaves A without gradient
        (_, _, embedded, _), options = one.prefill_arguments(prompt)

        def loss(adapters):
            params = parts.join(adapters, frozen)
            logits, _ = forward.full_forward(params, one.config, embedded, None, options["tail_rows"], 2)
            return jnp.where(prompt.image_id[..., None] >= 0, logits, 0).std()

        return flatten(jax.jit(jax.grad(loss))(moved))

    ours, expected = gradients(quantized), gradients(wide)
    assert ours.keys() == expected.keys() and len(ours) == 2 * 2 * 7
    for path, leaf in ours.items():
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(leaf / scale, expected[path] / scale, rtol=0, atol=1e-4, err_msg=path)


def test_adapters_of_peft_lie_beside_int8_kernels(quantized, model, tmp_path):
    adapters, frozen = lora.attach_adapters(model.params, 2, 4.0, lora.TARGETS, 0.0, jax.random.key(1))
    save_adapter(tmp_path, parts.join(adapters, frozen), model.config)
    beside = LVLM.from_pretrained(quantized.folder, quant="int8", adapter=tmp_path)
    make.assert_same(beside.params, load_adapter(tmp_path, quantized.params, quantized.config))
    path = LANGUAGE + "layers_1/mlp/down_proj"
    shape = model.params["language_model"]["layers_1"]["mlp"]["down_proj"]["kernel"].shape
    assert flatten(beside.params)[f"{path}/lora_a"].shape == (shape[0], 2)
    refused("cannot be merged into an int8 kernel.*loaded without quant", lora.merge, beside.params)


def test_a_quantized_model_is_neither_trained_nor_saved(quantized, wide, tmp_path):
    message = r"kernel_int8 is quantized and cannot be trained.*LoRA"
    refused(message, parts.split, quantized.params, "^(language_model|connector)/")
    trainable, _ = parts.split(quantized.params, "^connector/")
    assert trainable.keys() == {"connector"}
    out = tmp_path / "no"
    refused("kernel_int8 is quantized.*dequantize", quantized.save_pretrained, out)
    refused("kernel_int8 is quantized.*dequantize", weights.save_checkpoint, out, quantized.params, quantized.config)
    assert not out.exists()
    wide.save_pretrained(tmp_path / "saved")
    make.assert_same(LVLM.from_pretrained(tmp_path / "saved").params, wide.params)


def test_the_command_line(quantized):
    words = ["--model", str(quantized.folder), "--image", "a.jpg", "--prompt", "What?"]
    loaded = infer.load(infer.command_line([*words, "--quant", "int8", "--dtype", "float32"]))
    make.assert_same(loaded.params, quantized.params)
    assert names.quant(infer.command_line(words).quant) is None
    refused("int3", infer.command_line, [*words, "--quant", "int3"])
    for quant in ("int3", "none", ""):
        message = f"quant '{quant}' is not supported; expected int8, or None"
        refused(message, LVLM.from_pretrained, quantized.folder, quant=quant)
    assert names.precision("float32", None) == "float32" != names.precision("float32", "int8")


SHARDED = """
import json, sys
import numpy as np
from lvlm_jax import LVLM
from lvlm_jax.parallel import make_mesh
from lvlm_jax.weights.tables import flatten

folder, inputs, results = sys.argv[1:]
inputs = dict(np.load(inputs))
model = LVLM.from_pretrained(folder, mesh=make_mesh(data=2, fsdp=2, tensor=2), quant="int8")
params = flatten(model.params)
alone = flatten(LVLM.from_pretrained(folder, quant="int8").params)
for path, leaf in params.items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(alone[path]), err_msg=path)
out = model.generate(inputs, max_new_tokens=6)
np.savez(results, logits=model.logits(inputs), tokens=out.tokens)
names = ("kernel_int8", "kernel_scale")
print(json.dumps({
    path: [list(leaf.sharding.spec), list(leaf.addressable_shards[0].data.shape)]
    for path, leaf in params.items() if path.endswith(names)
}))
"""


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(quantized, mixed, tmp_path):
    np.savez(tmp_path / "inputs.npz", **mixed)
    placed = run(SHARDED, quantized.folder, tmp_path / "inputs.npz", tmp_path / "out.npz", devices=8)
    layer = LANGUAGE + "layers_0"
    assert placed[f"{layer}/self_attn/q_proj/kernel_int8"] == [["tensor", "fsdp"], [24, 24]]
    assert placed[f"{layer}/self_attn/q_proj/kernel_scale"] == [["tensor"], [24]]
    assert placed[f"{layer}/mlp/down_proj/kernel_int8"] == [["fsdp", "tensor"], [24, 40]]
    assert placed[f"{layer}/mlp/down_proj/kernel_scale"] == [["fsdp"], [24]]
    half = quantized.config.text.vocab_size // 2
    assert placed[LANGUAGE + "lm_head/kernel_int8"] == [["tensor", "fsdp"], [half, 24]]
    results, valid = np.load(tmp_path / "out.npz"), mixed["attention_mask"].astype(bool)
    logits = np.asarray(quantized.logits(mixed))
    np.testing.assert_allclose(results["logits"][valid], logits[valid], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(results["tokens"], quantized.generate(mixed, max_new_tokens=6).tokens)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_quantized_model_and_one_tensor(tmp_path):
    folders = [write_large(tmp_path / name.lower(), name) for name in ("F32", "F16")]
    results = measured(*((folder, folder, "float32", "int8") for folder in folders))
    for found, stored in zip(results, (4, 2), strict=True):  # bytes of a stored weight
        # The float embeddings are 33 MB of it; all in float32 would be 300 MB.
        assert 80 * MB < found["model"] < 130 * MB
        # One tensor, counted as it is in the file and as it is on the device before it is quantized.
        assert found["peak"] < found["model"] + 2 * stored * found["largest"] + 25 * MB, found
        assert found["resident"] < found["model"] + 25 * MB, found


@pytest.mark.slow
def test_answers_of_the_pocket_model_survive():
    """Twenty greedy answers and the logits of their prompts; the figures stand in docs/benchmarks.md."""
    exact, quantized = (LVLM.from_pretrained("pocket", quant=quant) for quant in (None, "int8"))
    prompts = []
    for index in range(20):
        scene = scene_at("test", index)
        question = existence(scene, np.random.default_rng(index)).text
        text = question if index % 2 else "Please describe this image in detail."
        picture = {"type": "image", "image": render(scene)}
        prompts.append([{"role": "user", "content": [picture, {"type": "text", "text": text}]}])
    prepared = exact.prepare(prompts)
    valid = np.take_along_axis(prepared.image_id, prepared.source_columns, axis=1) >= 0
    logits = [np.asarray(one.logits(prepared))[valid] for one in (exact, quantized)]
    error = np.abs(logits[0] - logits[1])
    same_choice = (logits[0].argmax(-1) == logits[1].argmax(-1)).mean()
    answers = [one.generate(prompts, max_new_tokens=40).tokens for one in (exact, quantized)]
    pairs = list(zip(*answers, strict=True))
    same = sum(ours == theirs for ours, theirs in pairs)
    print(f"logits: std {logits[0].std():.2f}, error mean {error.mean():.4f}, max {error.max():.3f}")
    print(f"likeliest token the same {same_choice:.4f}; answers the same {same} of {len(pairs)}")
    assert error.mean() < 0.02 * logits[0].std() and same_choice > 0.98 and same >= 16
