"""CMAC's NumPy reference judged itself, by explicit loops; the model's is transformers' in `tests/models`."""

import math

import numpy as np
import pytest

from tests.reference import cmac


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
                inside = row >= end and is_image[s]
                distance = calibrated[row] - calibrated[s] if inside else row - s
                z[h, t, s] = turned_product(q[h, t], k[0, s], distance)
                entries += [z[h, t, s]] * bool(inside)
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
