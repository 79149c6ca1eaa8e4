"""What the tests of single-branch methods share: small deep models, and the comparison with a NumPy reference."""

import functools
import tempfile

import numpy as np

from lvlm_jax import LVLM
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.reference import llava, one_branch

# Two images, none, one, of different lengths: padded, and with text before, between and behind.
MIXED = [(4, IMAGE, 3, IMAGE, 6), (9,), (3, IMAGE, 11)]
# An image that opens the prompt, two images side by side, an image that ends the prompt.
EDGES = [(IMAGE, 7), (2, IMAGE, IMAGE, 1), (5, IMAGE)]
STEPS = 8
ATOL = 1e-4


@functools.cache
def load(depth, variety="qwen2_tied_two_feature_layers"):
    """(transformers' model, ours, reference weights, reference config) of `depth` layers; queries share keys."""
    overrides = dict(checkpoints.VARIETIES[variety])
    overrides["text"] = {**overrides.get("text", {}), "num_hidden_layers": depth}
    with tempfile.TemporaryDirectory() as folder:
        theirs = checkpoints.make_llava(folder, seed=21, **overrides)
        ours = LVLM.from_pretrained(folder, dtype="float32")
    return theirs, ours, *llava.from_torch(theirs)


def prompt(theirs, layouts, steps=STEPS):
    """Padded inputs, and the tokens [B, steps] that decoding is forced to take."""
    inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=layouts)
    shape = (len(layouts), steps)
    return inputs, np.random.default_rng(31).integers(3, theirs.config.text_config.vocab_size - 1, shape)


def run_library(ours, inputs, forced, method):
    """main, contrast (None without a branch), combined, each [B, 1 + steps, V]."""
    length = inputs["input_ids"].shape[1] + forced.shape[1] + 1
    state, step = ours.prefill(ours.prepare(inputs), method=method, max_length=length)
    steps = [step]
    for column in forced.T:
        state, step = ours.decode(state, column.astype(np.int32))
        steps.append(step)

    def stacked(name):
        arrays = [getattr(step, name) for step in steps]
        return None if arrays[0] is None else np.stack([np.asarray(array) for array in arrays], axis=1)

    return stacked("main"), stacked("contrast"), stacked("combined")


def run_reference(model, inputs, forced, row, method, pixel_values=None):
    """Logits [1 + steps, V] of one sample; `pixel_values` replace the sample's own pictures."""
    theirs, _, weights, config = model
    sample = checkpoints.select(theirs.config, inputs, row)
    pixels = sample.get("pixel_values") if pixel_values is None else pixel_values
    return one_branch.run(weights, config, sample["input_ids"][0], pixels, forced[row], method)


def assert_equal_to_reference(model, layouts, method, make_reference):
    """The main branch equals the reference in prefill and cached decoding. Returns the references, one per sample.

    The edit must be visible: some logits differ from the plain model's; a sample without an image stays plain.
    """
    theirs, ours, _, _ = model
    inputs, forced = prompt(theirs, layouts)
    main, _, combined = run_library(ours, inputs, forced, method)
    references, effects = [], []
    for row, layout in enumerate(layouts):
        reference = make_reference()
        want = run_reference(model, inputs, forced, row, reference)
        plain = run_reference(model, inputs, forced, row, one_branch.Plain())
        np.testing.assert_allclose(main[row], want, rtol=0, atol=ATOL, err_msg=f"sample {row}")
        np.testing.assert_array_equal(combined[row], main[row])
        if IMAGE not in layout:
            np.testing.assert_allclose(want, plain, rtol=0, atol=1e-9)
        references.append(reference)
        effects.append(np.abs(want - plain).max())
    assert max(effects) > 0.05, f"the method changes nothing: {effects}"
    # Were a decision this close, float32 could take it otherwise than float64: take another seed.
    assert min(getattr(reference, "margin", np.inf) for reference in references) > 2e-6
    return references


def assert_plain(model, layouts, method):
    """The method leaves every logit as it is, up to the rounding of another program."""
    theirs, ours, _, _ = model
    inputs, forced = prompt(theirs, layouts)
    got, _, combined = run_library(ours, inputs, forced, method)
    want, _, _ = run_library(ours, inputs, forced, None)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(combined, want, rtol=0, atol=1e-5)
