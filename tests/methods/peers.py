"""What the tests of contrast and early-exit methods share: small models, forced runs, comparisons."""

import functools

import numpy as np

from lvlm_jax import LVLM
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.reference import llava

# One, no and two images in three lengths; then images at both ends of the prompt and side by side.
MIXED = [(4, IMAGE, 3, IMAGE, 6), (9,), (3, IMAGE, 11)]
EDGES = [(IMAGE, 7), (2, IMAGE, IMAGE, 1), (5, IMAGE)]
STEPS = 8
ATOL = 1e-4


class Case:
    """One small model, ours and the reference's, and padded prompts for it."""

    def __init__(self, folder, num_layers, seed, **overrides):
        text = {"model_type": "qwen2", "num_key_value_heads": 2, "num_hidden_layers": num_layers}
        overrides = {
            "text": {**text, **overrides.pop("text", {})},
            "vision": {"image_size": 24, "patch_size": 8},
            **overrides,
        }
        theirs = checkpoints.make_llava(folder, seed=seed, **overrides)
        self.theirs_config = theirs.config
        self.ours = LVLM.from_pretrained(folder, dtype="float32")
        self.weights, self.config = llava.from_torch(theirs)

    def inputs(self, layouts, seed=22):
        return checkpoints.random_inputs(self.theirs_config, seed=seed, layouts=layouts)

    def forced(self, rows, steps=STEPS):
        """Int[rows, steps] text tokens."""
        vocabulary = self.theirs_config.text_config.vocab_size
        return np.random.default_rng(31).integers(3, vocabulary - 1, (rows, steps))

    def references(self, run, inputs, forced, **settings):
        """run(weights, config, ids, pixels, tokens, **settings) for every sample."""
        results = []
        for row in range(len(forced)):
            sample = checkpoints.select(self.theirs_config, inputs, row)
            pixels, ids = sample.get("pixel_values"), sample["input_ids"][0]
            results.append(run(self.weights, self.config, ids, pixels, forced[row], **settings))
        return results

    def library(self, inputs, forced, method):
        """main, contrast (None without a branch), combined, each [B, 1 + steps, V]."""
        length = inputs["input_ids"].shape[1] + forced.shape[1] + 1
        state, step = self.ours.prefill(inputs, method, length)
        steps = [step]
        for column in forced.T:
            state, step = self.ours.decode(state, column.astype(np.int32))
            steps.append(step)

        def stacked(name):
            arrays = [getattr(step, name) for step in steps]
            return None if arrays[0] is None else np.stack([np.asarray(a) for a in arrays], axis=1)

        return stacked("main"), stacked("contrast"), stacked("combined")


def loader(tmp_path_factory):
    """load(num_layers, seed, **overrides of make_llava) -> Case, made once each."""

    @functools.cache
    def load(num_layers=4, seed=21, **overrides):
        nested = {
            name: dict(value) if isinstance(value, tuple) else value for name, value in overrides.items()
        }
        return Case(tmp_path_factory.mktemp("case"), num_layers, seed, **nested)

    return load


def assert_equal(got, want, name, factor=1.0):
    """All finite and within the tolerance; prints the largest difference (`pytest -s`)."""
    error = np.abs(got - want).max()
    print(f"{name}: {error:.1e}")
    assert error <= ATOL * factor, f"{name} differs by {error}"


def assert_combined(got, want, distance, factor, name="combined"):
    """Equal where kept, −inf where cut; tokens within rounding of the cut are left out."""
    clear = distance > 2 * ATOL
    kept = np.isfinite(want)
    assert clear.mean() > 0.95
    assert_equal(got[kept & clear], want[kept & clear], name, factor)
    assert np.isneginf(got[~kept & clear]).all()


def assert_contrastive(case, method, run, factor, layouts=MIXED, seed=22, **settings):
    """Main, contrast and combined logits of a method with a contrast branch, for all samples and steps.

    `run` returns main, contrast, combined, distance to the cut, and maybe how clear its choices were.
    """
    inputs, forced = case.inputs(layouts, seed), case.forced(len(layouts))
    main, contrast, combined = case.library(inputs, forced, method)
    for row, (want, layout) in enumerate(
        zip(case.references(run, inputs, forced, **settings), layouts, strict=True)
    ):
        assert all(margin > 1e-6 for margin in want[4:5])
        assert_equal(main[row], want[0], f"main {row}")
        assert_equal(contrast[row], want[1], f"contrast {row}")
        assert_combined(combined[row], want[2], want[3], factor, f"combined {row}")
        if IMAGE in layout:  # the method does something, at every step
            assert np.abs(main[row] - contrast[row]).max(axis=-1).min() > 0.02
            assert np.isneginf(combined[row]).any(axis=-1).all()
        else:
            np.testing.assert_array_equal(combined[row], main[row])
