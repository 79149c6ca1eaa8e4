"""`lvlm fit` on the pocket model: files and why they are refused, resuming, and the fitted values."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import LVLM, LVLMError, fitting, methods
from lvlm_jax.attention import Tap
from lvlm_jax.fitting import attribution, directions, masked_images, object_tokens, run
from lvlm_jax.fitting.export import edited, export
from lvlm_jax.generation import forward
from lvlm_jax.methods import fitted
from lvlm_jax.models import vision
from lvlm_jax.pocket.pairs import write_pairs
from lvlm_jax.training.data.pair_files import Pair, read_pairs
from tests.models import zoo
from tests.reference import field, llava

COUNT = 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), COUNT)


@pytest.fixture(scope="module")
def model():
    return LVLM.from_pretrained("pocket")


def hidden_of(model, pair, text):
    """States [L, T, E] of an answer after its prompt, for one sample alone, computed through the public class."""
    prompt, tokens = model.prepare([pair.conversation()]), model.processor.tokenizer(text, add_special_tokens=False)
    forced = prompt.with_answers([tokens["input_ids"]], model.config.pad_token_id)
    layers = tuple(range(1, model.config.text.num_layers + 1))
    hidden = model.read(forced, Tap(hidden=layers, rows="all")).hidden[:, 0, 0]
    return np.asarray(hidden)[:, -len(tokens["input_ids"]) :]


def test_a_fit_is_stopped_resumed_and_read_again(model, pairs, tmp_path, monkeypatch):
    """VTI's directions do not depend on the batch size."""
    monkeypatch.setattr(masked_images, "COPIES", 2)
    job = fitting.Job("vti", pairs, tmp_path / "vti.safetensors", batch_size=3)
    calls, collect = [], run.FITTERS["vti"].collect

    def once(model, batch, seed):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return collect(model, batch, seed)

    monkeypatch.setitem(run.FITTERS, "vti", run.FITTERS["vti"]._replace(collect=once))
    with pytest.raises(KeyboardInterrupt):
        fitting.fit(model, job)
    assert not job.out.exists()
    for other in ({"batch_size": 2}, {"seed": 1}):
        with pytest.raises(LVLMError, match="belongs to another fit"):
            fitting.fit(model, dataclasses.replace(job, **other))
    found = fitting.fit(model, job)
    assert calls == [3, 1, 1] and not (tmp_path / "vti.safetensors.parts").exists()
    again = methods.VTI(fitted=job.out).fitted
    jax.tree.map(np.testing.assert_array_equal, again.arrays, found.arrays)
    assert again.source == found.source and again.source.model == model.hash
    assert json.loads(again.source.settings) == {"pairs": COUNT, "batch_size": 3, "seed": 0}
    d = [hidden_of(model, p, p.chosen)[:, -1] - hidden_of(model, p, p.rejected)[:, -1] for p in read_pairs(pairs)]
    alone = [masked_images.differences(model, [pair], 0)[0] for pair in read_pairs(pairs)]
    wanted = directions.vti_finish({"differences": np.stack(d), "vision_differences": np.stack(alone)})
    assert found.arrays.keys() == wanted.keys()
    for name, want in wanted.items():
        np.testing.assert_allclose(found[name], want, rtol=0, atol=2e-3 * np.abs(want).max())
    other = methods.VTI(fitted=dataclasses.replace(again, source=dataclasses.replace(again.source, model="other")))
    with pytest.raises(LVLMError, match="fitted for the checkpoint other"):
        model.generate([read_pairs(pairs)[0].conversation()], method=other, max_new_tokens=1)


def test_principal_component():
    """Differences 4, -2, -2 along one axis around a mean of (0, 3): v = (0, 3) + (1, 0), the largest score positive."""
    differences = np.array([[[4.0, 3]], [[-2.0, 3]], [[-2.0, 3]]])
    result = directions.vti_finish({"differences": differences, "vision_differences": differences[:1]})
    np.testing.assert_allclose(result["directions"], [[1, 3]], atol=1e-6)
    np.testing.assert_allclose(result["vision_directions"], [[4, 3]], atol=1e-6)  # one pair has no component


def test_masks():
    """Masks depend on the seed, the pair's id and the image; a masked copy keeps one of 100 patches."""
    seen = np.arange(120) < 100
    masks = masked_images.draw_masks(3, "a", 0, seen)
    assert masks.shape == (50, 120) and (masks.sum(axis=1) == 99).all() and not masks[:, 100:].any()
    assert len({mask.tobytes() for mask in masks}) > 30
    np.testing.assert_array_equal(masks, masked_images.draw_masks(3, "a", 0, seen))
    for other in ((4, "a", 0), (3, "b", 0), (3, "a", 1)):
        assert (masks != masked_images.draw_masks(*other, seen)).any()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", pytest.param("smolvlm", marks=pytest.mark.slow)])
def test_the_tower_on_masked_copies(name, tmp_path, monkeypatch):
    """Single rows give the states of the whole batch on copies masked here; LLaVA's states equal the reference's."""
    monkeypatch.setattr(masked_images, "COPIES", 3)
    case = zoo.load(name, tmp_path)
    model, prompt = case.model, case.prompt()
    monkeypatch.setattr(LVLM, "prepare", lambda model, asked: prompt)
    found = masked_images.differences(model, [Pair((), [], "", "", one) for one in "xyz"], 5)
    config, shown, geometry = model.config, ("x", "x", "z"), jax.tree.map(jnp.asarray, prompt.geometry)
    seen = config.valid_patches(prompt.geometry)
    seen = np.ones((len(prompt.pixels), config.vision.num_patches), bool) if seen is None else seen
    masks = [
        masked_images.draw_masks(5, shown[max(owner, 0)], place, own)
        for owner, place, own in zip(prompt.owner, prompt.image_index, seen, strict=True)
    ]

    def states(pixels):
        outputs = vision.layer_outputs(
            lambda: forward.encode_images(model.params, config, jnp.asarray(pixels), geometry)
        )
        outputs = np.stack(outputs).astype(np.float64)
        own = seen if seen.shape == outputs.shape[1:3] else np.ones(outputs.shape[1:3], bool)
        return np.stack([outputs[:, row, own[row]].mean(axis=1) for row in range(len(own))])

    def copy(number):
        pixels = prompt.pixels.copy()
        for row, mask in enumerate(masks):
            if pixels.ndim == 3:
                patches = pixels[row].reshape(len(mask[number]), 3, -1)
                patches[mask[number]] = patches[seen[row]].mean(axis=(0, 2))[:, None]
            else:
                pixels[row] = field.masked(pixels[row], mask[number], config.vision.patch_size, seen[row])
        return pixels

    rows = np.mean([states(copy(number)) for number in range(3)], axis=0) - states(prompt.pixels)
    for image, got in enumerate(found):
        np.testing.assert_allclose(got, rows[prompt.owner == image].mean(axis=0), rtol=0, atol=1e-4)
        assert np.abs(got).max() > 0.01
    if name == "llava":
        weights, hf = llava.from_torch(zoo.build(name))
        want = field.masked_minus_original(weights, hf, prompt.pixels[1].astype(np.float64), masks[1])
        np.testing.assert_allclose(found[1], want, rtol=0, atol=1e-4)


def test_object_tokens():
    found = object_tokens.differing([1, 2, 3, 4], [1, 9, 3, 4, 7])
    assert found["good"].tolist() == [1] and found["bad"].tolist() == [1, 4]
    assert object_tokens.differing([1, 2], [1, 5, 2])["good"].tolist() == [0, 1]


@pytest.mark.slow
def test_attribution_agrees_with_ablation(model, pairs):
    """`lvlm fit adhh` ranks the first five heads as ablation of every head does; the gradient alone nearly does."""
    batch = read_pairs(pairs)
    collected = attribution.adhh_collect(model, batch)
    found = attribution.adhh_finish(collected | attribution.adhh_confirm(model, batch, collected))
    slope, fall = attribution.by_gradient(model, batch).ravel(), attribution.by_ablation(model, batch).ravel()
    correlation = np.corrcoef(*(np.argsort(np.argsort(scores)) for scores in (slope, fall)))[0, 1]
    first = [np.argsort(-scores)[:5].tolist() for scores in (slope, fall)]
    print(f"rank correlation {correlation:.3f}, of the first five {len(set(first[0]) & set(first[1]))} are shared")
    assert correlation > 0.5
    confirmed = np.where(found["ablated"], found["ablations"], -np.inf).ravel()
    assert np.argsort(-confirmed)[:5].tolist() == first[1]
    assert np.flatnonzero(found["listed"]).tolist() == first[1][:1]  # one head of 64


@pytest.mark.slow
@pytest.mark.parametrize("word", ["adhh", "adaiat"])
def test_the_others_are_fitted_and_act(model, pairs, tmp_path, word):
    found = fitting.fit(model, fitting.Job(word, pairs, tmp_path / f"{word}.safetensors"))
    again = fitted.read(tmp_path / f"{word}.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.arrays, found.arrays)
    assert all(np.isfinite(np.asarray(array, np.float64)).all() for array in again.arrays.values())
    settings = {"adhh": {"tau": 0.1}, "adaiat": {"layers": (2, 3, 4)}}[word]
    question = [read_pairs(pairs)[0].conversation()]
    plain = model.generate(question, max_new_tokens=12).logprobs[0]
    got = model.generate(question, method=methods.get(word)(fitted=again, **settings), max_new_tokens=12).logprobs[0]
    assert np.isfinite(got).all() and not np.array_equal(got, plain)


@pytest.mark.slow
def test_nullu_exported_equals_nullu_at_inference(model, pairs, tmp_path):
    found = fitting.fit(model, fitting.Job("nullu", pairs, tmp_path / "nullu.safetensors"))
    states = read_pairs(pairs)[0]
    half = [hidden_of(model, states, text).mean(axis=1) / 2 for text in (states.chosen, states.rejected)]
    batch = directions.nullu_collect(model, read_pairs(pairs)[:1])["differences"]
    np.testing.assert_allclose(batch[0], half[0] - half[1], rtol=0, atol=1e-3)
    method = methods.Nullu(rank=2, fitted=found)
    folder = export(model, method, tmp_path / "edited")
    question = model.prepare([read_pairs(pairs)[0].conversation()])
    want, got = model.logits(question, method), LVLM.from_pretrained(folder).logits(question)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)
    assert np.abs(np.asarray(model.logits(question) - got)).max() > 0.05
    with pytest.raises(LVLMError, match="fitted for the checkpoint"):
        edited(LVLM.from_pretrained(folder), method)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vti", "--pocket", "2", "--export", "x"], "--export writes Nullu's edit"),
        (["vti"], "one of the arguments --pairs --pocket is required"),
        (["cmac", "--pocket", "2"], "invalid choice: 'cmac'"),
    ],
)
def test_the_command_refuses(words, message, tmp_path):
    from lvlm_jax.cli import fit

    with pytest.raises(LVLMError, match=message):
        fit.main([*words, "--out", str(tmp_path / "f.safetensors")])
