"""The statistics against plain NumPy, one sample and one loop at a time."""

import math

import numpy as np
import pytest

from lvlm_jax import analysis
from lvlm_jax.errors import LVLMError

# Padding, text, two images with text between them, text; one image at the start; no image.
IMAGE_ID = np.int32([[-1, -1, 0, 1, 1, 1, 0, 2, 2, 2, 0, 0], [1] * 6 + [0] * 6, [-1] + [0] * 11])
LAYERS, HEADS, SIZE = 5, 3, IMAGE_ID.shape[1]


def random_attention(seed, sharpness=2.0):
    """Causal softmax rows [L, B, H, S, S] in which padding is not seen; rows of padding are uniform."""
    logits = sharpness * np.random.default_rng(seed).normal(size=(LAYERS, len(IMAGE_ID), HEADS, SIZE, SIZE))
    seen = np.tril(np.ones((SIZE, SIZE), bool)) & (IMAGE_ID >= 0)[:, None, :]
    logits = np.where(seen[None, :, None], logits, -1e30)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("image", [None, 1, 2])
def test_image_mass(image):
    attention = random_attention(0)
    attention[..., 3:5] *= 0.5  # a method that edits weights leaves rows that do not sum to one
    found = np.asarray(analysis.image_mass(attention.astype(np.float32), IMAGE_ID, image))
    assert found.shape == (LAYERS, 3, HEADS, SIZE)
    for sample in range(3):
        columns = [s for s in range(SIZE) if IMAGE_ID[sample, s] in ((1, 2) if image is None else (image,))]
        for row in range(2, SIZE):
            weights = attention[3, sample, 1, row]
            expected = weights[columns].sum() / weights[IMAGE_ID[sample] >= 0].sum()
            assert found[3, sample, 1, row] == pytest.approx(expected, abs=1e-5)
    assert (found[:, 2] == 0).all() and found[:, 0, :, -1].min() >= 0


def test_patch_maps_take_the_tokens_of_places():
    # Two images: a class token and 2 x 3 places; a tile of 4 tokens and one of 3 x 1 places.
    weights = np.arange(2 * 14).reshape(2, 14)
    places = [1 + np.arange(6).reshape(2, 3), 11 + np.arange(3).reshape(3, 1)]
    maps = analysis.patch_maps(weights, places)
    assert [one.shape for one in maps] == [(2, 2, 3), (2, 3, 1)]
    np.testing.assert_array_equal(maps[0][0], [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(maps[1][1], [[25], [26], [27]])


def test_information_flow_is_the_rollout_with_all_its_entries():
    weights = random_attention(1).mean(2)
    flow = analysis.information_flow(weights.astype(np.float32), IMAGE_ID)
    for sample in range(3):
        valid = np.flatnonzero(IMAGE_ID[sample] >= 0)
        image = IMAGE_ID[sample][valid] > 0
        rollout = np.eye(len(valid))
        for level in range(LAYERS + 1):
            if level:
                own = weights[level - 1, sample][np.ix_(valid, valid)]
                rollout = 0.5 * (np.eye(len(valid)) + own) @ rollout
            visual = rollout[:, image].sum(1)
            expected = visual[~image].sum() / visual.sum() if image.any() else 0.0
            assert flow.text_share[level, sample] == pytest.approx(expected, abs=1e-5)
            assert flow.last_row[level, sample] == pytest.approx(visual[-1], abs=1e-5)
    shares = np.asarray(flow.text_share[:, 1])
    assert shares[0] == 0 and (np.diff(shares) > 0).all() and shares[-1] > 0.05


def test_divergence():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.25, 0.75])
    mean = (p + q) / 2
    by_hand = 0.5 * sum(x * math.log(x / m) for side in (p, q) for x, m in zip(side, mean, strict=True) if x > 0)
    assert float(analysis.divergence(p, q)) == pytest.approx(by_hand, abs=1e-6)
    assert float(analysis.divergence(p, p)) == 0
    assert float(analysis.divergence(np.eye(2)[0], np.eye(2)[1])) == pytest.approx(math.log(2))


@pytest.mark.parametrize("beta", [0.05, 0.2])
def test_sink_density(beta):
    attention = random_attention(2)
    found = np.asarray(analysis.sink_density(attention.astype(np.float32), IMAGE_ID, beta))
    expected = np.zeros((LAYERS, 3, HEADS))
    for layer, sample, head in np.ndindex(*expected.shape):
        sinks, columns = 0, np.flatnonzero(IMAGE_ID[sample] > 0)
        for column in columns:
            rows = [x for x in range(column + 1, SIZE) if IMAGE_ID[sample, x] == IMAGE_ID[sample, column]]
            if rows:
                sinks += np.mean([attention[layer, sample, head, x, column] for x in rows]) > beta
        expected[layer, sample, head] = sinks / max(len(columns), 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0 < found[:, :2].mean() < 1 and (found[:, 2] == 0).all()


def plain_drift(attention, strength, kept):
    """`drift_curve` in float64 with loops; attention [L, H, N]."""
    layers, _, tokens = attention.shape
    looks = [layer.max(0) / layer.max(0).sum() for layer in attention]
    noise = (looks[0] + looks[1] + looks[2]) / 3

    def score(p):
        m = (p + noise) / 2
        divergence = 0.5 * (p * np.log(p / m)).sum() + 0.5 * (noise * np.log(noise / m)).sum()
        return divergence * (1 + (p * np.log(p)).sum() / math.log(tokens))

    candidates = [layer for layer in range(layers) if 0.3 * layers <= layer <= 0.6 * layers and layer >= 2]
    best = max(candidates, key=lambda layer: score(looks[layer]))
    anchor = np.maximum(looks[best] - strength * noise, 0)
    order = np.argsort(-anchor)[: max(1, int(kept * tokens))]
    anchor = np.where(np.isin(np.arange(tokens), order), anchor, 0)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    return [cosine(p, noise) for p in looks], [cosine(p, anchor) for p in looks], best


@pytest.mark.parametrize("layers, strength, kept", [(8, 1.0, 0.1), (12, 0.5, 0.3)])
def test_drift_curve(layers, strength, kept):
    anchors = set()
    for seed in range(4):
        attention = np.random.default_rng(seed).exponential(size=(layers, 4, 20)) / 40
        drift = analysis.drift_curve(attention.astype(np.float32), strength, kept)
        noise, anchor, best = plain_drift(attention, strength, kept)
        np.testing.assert_allclose(drift.noise, noise, atol=1e-5)
        np.testing.assert_allclose(drift.anchor, anchor, atol=1e-5)
        np.testing.assert_allclose(drift.gate, np.clip(np.subtract(noise, anchor), 0, 1), atol=1e-5)
        assert int(drift.anchor_layer) == best
        anchors.add(best)
    assert len(anchors) > 1


def test_drift_without_an_anchor_has_no_gate():
    drift = analysis.drift_curve(np.full((8, 2, 10), 0.01, np.float32))
    np.testing.assert_allclose(drift.noise, 1, atol=1e-6)
    assert (np.asarray(drift.anchor) == 0).all() and (np.asarray(drift.gate) == 0).all()
    with pytest.raises(LVLMError, match="deeper model"):
        analysis.drift_curve(np.ones((2, 2, 10), np.float32))
