"""The NumPy references judged themselves: against transformers, explicit loops and identities."""

import math

import numpy as np
import pytest
import torch

from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.reference import cmac, llava

LAYOUT = (4, IMAGE, 3, IMAGE, 6)


@pytest.mark.parametrize("variety", checkpoints.VARIETIES)
def test_reference_llava_equals_transformers(variety):
    model = checkpoints.make_llava(None, seed=1, **checkpoints.VARIETIES[variety])
    inputs = checkpoints.random_inputs(model.config, seed=2, layouts=[LAYOUT])
    weights, config = llava.from_torch(model)
    ours = llava.logits(weights, config, inputs["input_ids"][0], inputs["pixel_values"])
    with torch.no_grad():
        theirs = model(**checkpoints.to_torch(inputs)).logits[0].numpy()
    assert theirs.std() > 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variety", checkpoints.VARIETIES)
def test_reference_llava_equals_transformers_in_float64(variety, monkeypatch):
    """transformers keeps norms, softmax and angles in float32; here they run in float64 like the rest."""
    model = checkpoints.make_llava(None, seed=1, **checkpoints.VARIETIES[variety]).double()
    inputs = checkpoints.random_inputs(model.config, seed=2, layouts=[LAYOUT])
    weights, config = llava.from_torch(model)
    ours = llava.logits(weights, config, inputs["input_ids"][0], inputs["pixel_values"])
    tensors = checkpoints.to_torch(inputs)
    tensors["pixel_values"] = tensors["pixel_values"].double()
    rotary = model.model.language_model.rotary_emb
    frequencies, _ = llava.inverse_frequencies(config["text_config"])
    np.testing.assert_allclose(rotary.inv_freq.numpy(), frequencies, rtol=1e-6)
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: _rotary64(rotary, frequencies, position_ids))
    monkeypatch.setattr(torch, "float32", torch.float64)
    with torch.no_grad():
        theirs = model(**tensors).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def _rotary64(rotary, frequencies, position_ids):
    angle = position_ids[..., None].double() * torch.from_numpy(frequencies)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling


def _run(variety, seed=3, layout=LAYOUT, steps=4, noise=None, **settings):
    model = checkpoints.make_llava(None, seed=seed, **checkpoints.VARIETIES[variety])
    inputs = checkpoints.random_inputs(model.config, seed=seed, layouts=[layout])
    weights, config = llava.from_torch(model)
    tokens = np.random.default_rng(seed).integers(3, model.config.text_config.vocab_size - 1, steps)
    ids, pixels = inputs["input_ids"][0], inputs.get("pixel_values")
    return (
        weights,
        config,
        ids,
        pixels,
        tokens,
        cmac.run(weights, config, ids, pixels, tokens, cmac.Settings(**settings), noise),
    )


@pytest.mark.parametrize("variety", ["llama", "qwen2_tied_two_feature_layers", "mistral_window"])
def test_without_edits_both_branches_are_the_plain_model(variety):
    for switches in ({"imd": False, "gamma": 1.0}, {"imd": False, "cmpc": False, "gamma": 7.0}):
        weights, config, ids, pixels, tokens, result = _run(variety, **switches)
        plain = llava.logits(weights, config, np.concatenate([ids, tokens]), pixels)[len(ids) - 1 :]
        np.testing.assert_allclose(result.main, plain, rtol=0, atol=1e-11)
        np.testing.assert_allclose(result.contrast, plain, rtol=0, atol=1e-11)


def test_a_sample_without_image_is_left_alone():
    weights, config, ids, pixels, tokens, result = _run("llama", layout=(9,), gamma=3.0)
    plain = llava.logits(weights, config, np.concatenate([ids, tokens]))[len(ids) - 1 :]
    np.testing.assert_allclose(result.main, plain, rtol=0, atol=1e-11)
    np.testing.assert_allclose(result.contrast, plain, rtol=0, atol=1e-11)


def test_every_switch_changes_what_it_should():
    def noise(call, layer, values):
        return np.random.default_rng([call, layer]).normal(values.mean(), values.std(), values.shape)

    paper = _run("llama")[-1]
    assert np.abs(paper.main - paper.contrast).max(axis=-1).min() > 0.05
    results = {
        "code": _run("llama", variant="code", gamma=2.0)[-1],
        "attention_mask": _run("llama", distort="attention_mask")[-1],
        "value_noise": _run("llama", distort="value_noise", noise=noise)[-1],
    }
    for name, result in results.items():
        np.testing.assert_array_equal(result.main, paper.main, err_msg=name)
        assert np.abs(result.contrast - paper.contrast).max(axis=-1).min() > 0.05, name
    for other in (_run("llama", gamma=3.0)[-1], _run("llama", cmpc=False)[-1]):
        assert np.abs(other.main - paper.main).max(axis=-1).min() > 0.05


def test_calibrated_positions():
    is_image = np.array([0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0], bool)
    expected = [0, 1, 2, 2.5, 3, 3.5, 4, 5, 6, 6.5, 7]
    np.testing.assert_allclose(cmac.calibrated_positions(is_image, 2.0), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cmac.calibrated_positions(is_image, 1.0), np.arange(11), rtol=0, atol=0)
    assert cmac.post_image_start(is_image) == 10


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("distort", ["value_mask", "attention_mask", "value_noise"])
def test_attention_equals_explicit_loops(variant, distort):
    """One attention call with two query heads on one key head, written out entry by entry."""
    heads, dim, theta_base, gamma = 2, 4, 100.0, 2.0
    is_image = np.array([False, True, True, True, False, False])
    length, rows, end = 6, [3, 4, 5], 4
    generator = np.random.default_rng(5)
    q = generator.normal(size=(heads, len(rows), dim))
    k, v = generator.normal(size=(2, 1, length, dim))
    noise = generator.normal(size=(heads, 3, dim))

    def turned_product(a, b, distance):
        total = 0.0
        for d in range(dim // 2):
            angle = distance * theta_base ** (-2 * d / dim)
            cos, sin = math.cos(angle), math.sin(angle)
            x, y = a[d] * cos - a[d + dim // 2] * sin, a[d + dim // 2] * cos + a[d] * sin
            total += x * b[d] + y * b[d + dim // 2]
        return total / math.sqrt(dim)

    calibrated = [0, 1, 1.5, 2, 2.5, 3.5]
    z = np.full((heads, len(rows), length), -np.inf)
    entries = []
    for h in range(heads):
        for t, row in enumerate(rows):
            for s in range(row + 1):
                distance = row - s
                if row >= end and is_image[s]:
                    distance = calibrated[row] - calibrated[s]
                z[h, t, s] = turned_product(q[h, t], k[0, s], distance)
                if row >= end and is_image[s]:
                    entries.append(z[h, t, s])
    theta = sum(entries) / len(entries)
    expected = np.zeros((heads, len(rows), dim))
    for h in range(heads):
        for t, row in enumerate(rows):
            masked = [row >= end and is_image[s] and z[h, t, s] > theta for s in range(length)]
            total = 0.0
            for s in range(row + 1):
                if not (masked[s] and distort == "attention_mask"):
                    total += math.exp(z[h, t, s])
            for s in range(row + 1):
                weight = math.exp(z[h, t, s]) / total
                for d in range(dim):
                    value = v[0, s, d]
                    if masked[s] and distort == "attention_mask":
                        value = 0.0
                    elif masked[s] and distort == "value_noise":
                        value = noise[h, s - 1, d]
                    elif masked[s] and variant == "paper":
                        value = (v[0, 1, d] + v[0, 2, d] + v[0, 3, d]) / 3
                    elif masked[s]:
                        value = sum(v[0, i, j] for i in (1, 2, 3) for j in range(dim)) / (3 * dim)
                    expected[h, t, d] += weight * value

    text = {"rope_parameters": {"rope_type": "default", "rope_theta": theta_base}, "head_dim": dim}
    settings = cmac.Settings(gamma=gamma, variant=variant, distort=distort)
    ours, block = cmac.calibrated_scores(text, q, k, np.array(rows), is_image, settings)
    np.testing.assert_array_equal(block, [[False] * 6, is_image, is_image])
    ours = np.where(np.arange(length)[None, :] <= np.array(rows)[:, None], ours, -np.inf)
    np.testing.assert_allclose(ours, z, rtol=0, atol=1e-12)
    output, _ = cmac.distorted_output(ours, np.repeat(v, heads, axis=0), block, is_image, settings, noise)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-12)


def test_combine():
    main, contrast = np.array([2.0, 1.0, -1.0, 1.9]), np.array([1.0, 2.0, 0.0, 3.0])
    cut = cmac.combine(main, contrast, alpha=3.0, beta=math.exp(-1.5))
    np.testing.assert_allclose(cut, [5.0, -2.0, -np.inf, -1.4], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(cmac.combine(main, contrast, alpha=0.0, beta=0.0), main)


@pytest.mark.parametrize("gate", ["first", "last"])
def test_gate(gate):
    """alpha falls to 0 exactly where s_t is below the mean of the first 30 steps so far, or of the newest 30."""
    result = _run("llama_gqa_all_biases", layout=(3, IMAGE, 4), steps=34, gate=gate, alpha=2.0)[-1]
    expected = []
    for t, s in enumerate(result.gate):
        window = result.gate[: min(t, 29) + 1] if gate == "first" else result.gate[max(t - 29, 0) : t + 1]
        expected.append(0.0 if s < sum(window) / len(window) else 2.0)
    assert result.alphas == expected
    assert expected[0] == 2.0 and set(expected[1:]) == {0.0, 2.0}
    closed = expected.index(0.0)
    kept = np.isfinite(result.combined[closed])
    np.testing.assert_array_equal(result.combined[closed][kept], result.main[closed][kept])
