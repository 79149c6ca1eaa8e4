"""What the tests of methods share: small models, forced runs of ours, and comparisons with the NumPy references."""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.attention import Context, Site
from lvlm_jax.attention.transform import Stream
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.reference import cmac, llava, one_branch

# Two images, none, one, of different lengths: padded, and with text before, between and behind.
MIXED = ((4, IMAGE, 3, IMAGE, 6), (9,), (3, IMAGE, 11))
# An image that opens the prompt, two images side by side, an image that ends the prompt.
EDGES = ((IMAGE, 7), (2, IMAGE, IMAGE, 1), (5, IMAGE))
STEPS = 8
COLUMNS = (0, 1, 1, 0)  # system text, two image tokens and text
ATOL = 1e-4

BARE = {"text": {"model_type": "qwen2", "num_key_value_heads": 2}, "vision": {"image_size": 24, "patch_size": 8}}
VARIETIES = {
    **checkpoints.VARIETIES,
    "bare": BARE,
    "bare_window": BARE | {"text": BARE["text"] | {"model_type": "mistral", "sliding_window": 14}},
}


class Case(NamedTuple):
    """One small model: transformers', ours, and weights and configuration as the reference takes them."""

    theirs: Any
    ours: LVLM
    weights: dict
    config: dict

    def inputs(self, layouts):
        """Padded arrays of random prompts and pictures."""
        return checkpoints.random_inputs(self.theirs.config, seed=22, layouts=layouts)

    def forced(self, layouts, steps=STEPS):
        """Int[samples, steps]: the text tokens that decoding is made to take."""
        vocabulary = self.theirs.config.text_config.vocab_size
        return np.random.default_rng(31).integers(3, vocabulary - 1, (len(layouts), steps))

    def library(self, layouts, method, steps=STEPS):
        """Main, contrast (None without a branch) and combined logits, each [B, 1 + steps, V]."""
        return run_library(self.ours, self.inputs(layouts), self.forced(layouts, steps), method)

    def references(
        self, run, layouts, tokens=None, pixels=lambda given, layout: given, steps=STEPS, **settings
    ) -> Iterator:
        """`run(weights, config, ids, pixels, tokens, **settings)` of every sample.

        Args:
            tokens: what decoding takes, [samples, steps]; by default `steps` that are forced.
            pixels: replaces a sample's pictures, given them and its layout.
        """
        inputs, tokens = self.inputs(layouts), self.forced(layouts, steps) if tokens is None else tokens
        for row, layout in enumerate(layouts):
            sample = checkpoints.select(self.theirs.config, inputs, row)
            pictures = pixels(sample.get("pixel_values"), layout)
            yield run(self.weights, self.config, sample["input_ids"][0], pictures, tokens[row], **settings)


@functools.cache
def load(depth=None, variety="qwen2_tied_two_feature_layers", seed=21) -> Case:
    """The model of a variety, with `layers` layers or its own number; several query heads share a key head."""
    overrides = VARIETIES[variety]
    if depth is not None:
        overrides = overrides | {"text": overrides.get("text", {}) | {"num_hidden_layers": depth}}
    with tempfile.TemporaryDirectory() as folder:
        theirs = checkpoints.make_llava(folder, seed=seed, **overrides)
        ours = LVLM.from_pretrained(folder, dtype="float32")
    return Case(theirs, ours, *llava.from_torch(theirs))


def run_library(ours, inputs, forced, method):
    """Main, contrast (None without a branch) and combined logits of a forced run, each [B, 1 + steps, V]."""
    prompt = ours.prepare(inputs)
    length = prompt.source_columns.shape[1] + forced.shape[1] + 1
    state, step = ours.prefill(prompt, method=method, max_length=length)
    steps = [step]
    for column in forced.T:
        state, step = ours.decode(state, column.astype(np.int32))
        steps.append(step)

    def stacked(name):
        arrays = [getattr(step, name) for step in steps]
        return None if arrays[0] is None else np.stack([np.asarray(array) for array in arrays], axis=1)

    return stacked("main"), stacked("contrast"), stacked("combined")


def context(image_id, rows, phase="prefill"):
    """The last `rows` rows of one sample over all its columns."""
    image_id = jnp.asarray([image_id], jnp.int32)
    columns = jnp.arange(image_id.shape[1])
    first = image_id.shape[1] - rows
    return Context(
        image_id=image_id,
        positions=columns[None, first:],
        first_row=jnp.int32(first),
        image_end=jnp.where(image_id > 0, columns + 1, 0).max(axis=1),
        image_count=int(image_id.max()),
        phase=phase,
        explicit_rows=rows,
    )


def site(logits, image_id=COLUMNS, layer=0, num_layers=32, carry=(), values=None, **changes):
    """One layer in prefill; `logits` [heads, rows, columns] of the last rows, `values` [heads, columns, channels]."""
    logits = jnp.asarray(logits, jnp.float32)
    shared = context(image_id, logits.shape[1])
    here = Site(
        layer=layer,
        num_layers=num_layers,
        phase="prefill",
        image_id=shared.image_id,
        image_count=shared.image_count,
        image=shared.image_columns(),
        after_image=shared.after_image_columns(),
        system=shared.system_columns(),
        generated=shared.generated_columns(),
        row_index=shared.rows(),
        post_image=shared.post_image_rows(),
        mask=shared.mask(),
        logits=logits[None],
        carry=carry,
        read_values=lambda: jnp.asarray(values, jnp.float32)[None],
        project=lambda heads: heads.swapaxes(1, 2).reshape(1, logits.shape[1], -1),
    )
    return dataclasses.replace(here, **changes)


def row(*heads):
    """[heads, 1, columns]: the last row of each head."""
    return np.array(heads, np.float32)[:, None]


def stream(layer, num_layers=3, **fields):
    """One layer outside attention, with the given fields only."""
    absent = dict.fromkeys(field.name for field in dataclasses.fields(Stream))
    return Stream(**absent | {"layer": layer, "num_layers": num_layers, "phase": "decode"} | fields)


def assert_close(got, want, name, factor=1.0):
    error = np.abs(got - want).max()
    assert error <= ATOL * factor, f"{name} differs by {error}"


def assert_combined(got, want, distance, factor, name="combined", cuts=True):
    """Equal where kept, −inf where cut (if it `cuts`); tokens within rounding of the cut are left out."""
    clear = distance > 2 * ATOL
    kept = np.isfinite(want)
    assert clear.mean() > 0.95
    assert_close(got[kept & clear], want[kept & clear], name, factor)
    assert not cuts or np.isneginf(got[~kept & clear]).all()


def assert_cmac(case, layouts, strengths, steps=STEPS, least=2e-5):
    """Both branches and the combined logits; returns the references' results, one per sample."""
    settings = cmac.Settings(**strengths)
    main, contrast, combined = case.library(layouts, methods.CMAC(**strengths), steps)
    contrast = main if contrast is None else contrast
    results = list(case.references(cmac.run, layouts, steps=steps, settings=settings))
    for row, want in enumerate(results):
        # Were a logit this close to its threshold, float32 could decide otherwise than float64: take another seed.
        assert want.margin > least and (IMAGE not in layouts[row] or want.gate_margin > 1e-3)
        np.testing.assert_allclose(main[row], want.main, rtol=0, atol=ATOL, err_msg=f"main, sample {row}")
        np.testing.assert_allclose(contrast[row], want.contrast, rtol=0, atol=ATOL, err_msg=f"contrast, sample {row}")
        with np.errstate(divide="ignore"):
            cut = want.main.max(-1, keepdims=True) + np.log(settings.beta)
        distance, factor = np.abs(want.main - cut), 1 + 2 * settings.alpha
        assert_combined(combined[row], want.combined, distance, factor, cuts=IMAGE in layouts[row])
    return results


def assert_plain(case, layouts, method):
    """The method leaves every logit as it is, up to the rounding of another program."""
    main, _, combined = case.library(layouts, method)
    plain, _, _ = case.library(layouts, None)
    np.testing.assert_allclose(main, plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(combined, plain, rtol=0, atol=1e-5)


def assert_one_branch(case, layouts, method, make_reference, visible=0.05):
    """The main branch equals the reference in prefill and cached decoding. Returns the references, one per sample.

    The edit must be visible: some logits differ from the plain model's; a sample without an image stays plain.
    """
    main, _, combined = case.library(layouts, method)
    references, effects = [make_reference() for _ in layouts], []
    each = iter(references)
    wanted = case.references(lambda *sample, **model: one_branch.run(*sample, next(each), **model), layouts)
    plains = case.references(one_branch.run, layouts)
    for row, (want, plain, layout) in enumerate(zip(wanted, plains, layouts, strict=True)):
        np.testing.assert_allclose(main[row], want, rtol=0, atol=ATOL, err_msg=f"sample {row}")
        np.testing.assert_array_equal(combined[row], main[row])
        if IMAGE not in layout:
            np.testing.assert_allclose(want, plain, rtol=0, atol=1e-9)
        effects.append(np.abs(want - plain).max())
    assert max(effects) > visible, f"the method changes nothing: {effects}"
    # Were a decision this close, float32 could take it otherwise than float64: take another seed.
    assert min(getattr(reference, "margin", np.inf) for reference in references) > 2e-6
    return references


def assert_contrastive(case, method, run, factor, layouts=MIXED, cuts=True, **settings):
    """Main, contrast and combined logits of a method with a contrast branch, for all samples and steps.

    `run` returns main, contrast, combined, distance to the cut, and maybe how clear its choices were. `cuts` says
    whether the method rules tokens out.
    """
    main, contrast, combined = case.library(layouts, method)
    wanted = zip(case.references(run, layouts, **settings), layouts, strict=True)
    for row, (want, layout) in enumerate(wanted):
        assert all(margin > 1e-6 for margin in want[4:5])
        assert_close(main[row], want[0], f"main {row}")
        assert_close(contrast[row], want[1], f"contrast {row}")
        assert_combined(combined[row], want[2], want[3], factor, f"combined {row}")
        if IMAGE in layout:  # the method does something, at every step
            assert np.abs(main[row] - contrast[row]).max(axis=-1).min() > 0.02
            assert (np.isneginf(combined[row]).any(axis=-1) == cuts).all()
        else:
            np.testing.assert_array_equal(combined[row], main[row])
