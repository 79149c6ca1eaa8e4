"""Every family against transformers on random checkpoints: logits, greedy tokens, saved files, processors, errors."""

import dataclasses
from collections.abc import Container
from typing import Any

import chex
import numpy as np
import pytest

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.save import save_checkpoint
from lvlm_jax.weights.tables import table_for
from tests.compiler import drop_programs
from tests.models.families import ALL
from tests.models.families.base import Arrays, Family, merged

ATOL = 1e-4


@dataclasses.dataclass(frozen=True)
class Pair:
    """transformers' model and ours, loaded from the same folder."""

    family: Family
    theirs: Any
    ours: LVLM

    def inputs(self, layout: str, seed: int = 5) -> Arrays:
        """A batch as transformers takes it."""
        return self.family.inputs(self.theirs.config, seed, self.family.layouts[layout])

    def for_us(self, inputs: Arrays) -> Arrays:
        """The same batch as we take it."""
        return self.family.for_us(inputs, self.theirs.config, self.ours.config)

    def assert_equal_logits(self, layout: str) -> None:
        """At all valid tokens, which are the last of every row."""
        inputs = self.inputs(layout)
        logits = np.asarray(self.ours.logits(self.for_us(inputs)))
        for sample, want in enumerate(self.family.logits(self.theirs, inputs)):
            assert want.std() > 1
            got = logits[sample, -len(want) :]
            np.testing.assert_allclose(got, want, rtol=0, atol=ATOL, err_msg=f"{layout}, sample {sample}")


# The first variety of every family, then the others.
PAIRS = [(family, name) for family in ALL for name in list(family.varieties)[:1]]
PAIRS += [(family, name) for family in ALL for name in list(family.varieties)[1:]]


NAMES = [f"{family.name}-{variety}" for family, variety in PAIRS]
FIRST = NAMES[: len(ALL)]
# Positions are stretched as tests/attention/test_rotary.py has it.
ROPES = ("llava-linear_rope", "llava-llama3_rope", "llava-yarn_rope", "llava_next-llama3")
# Families whose images have one form each, or the forms of another one.
ONE_FORM = ("idefics3", "instructblip", "llava_next", "llava_onevision", "qwen2_vl", "qwen_vl")
# Varieties whose decoders have a window, a norm or a position of their own.
DECODERS = """gemma3-biases_untied_odd_grid internvl-rms_norm_qk_norm_llama llava-mistral_window
    llava-qwen3_full_selection qwen2_5_vl-other qwen_vl-other_switches""".split()


def pairs(quick: Container[str] = NAMES) -> Any:
    """Tests with every variety of every family; those that are not in `quick` are marked as slow."""
    marked = [
        pytest.param(one, id=name, marks=[pytest.mark.slow] * (name not in quick))
        for one, name in zip(PAIRS, NAMES, strict=True)
    ]
    # All tests number them alike, so that all tests of a pair run after one another.
    return pytest.mark.parametrize("pair", marked, indirect=True, scope="module")


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    family, variety = request.param
    folder = tmp_path_factory.mktemp(family.name)
    theirs = family.build(folder, **family.varieties[variety])
    yield Pair(family, theirs, LVLM.from_pretrained(folder, dtype="float32"))
    drop_programs()


@pairs(quick=[name for name in NAMES if name not in ROPES])
def test_logits_of_a_padded_batch(pair):
    """Text alone, one image, two images; and what a family checks besides."""
    pair.assert_equal_logits("padded")
    pair.family.check(pair.theirs, pair.ours, pair.inputs("padded"))


@pairs(quick=[name for name in FIRST if not name.startswith(ONE_FORM)])
def test_logits_of_other_batches(pair):
    """One sample at a time, images of other forms, text alone."""
    for layout in pair.family.layouts:
        pair.assert_equal_logits(layout)


@pairs(quick=[*FIRST, *DECODERS])
def test_cached_steps_follow_transformers(pair):
    """After a padded prefill, decoding transformers' greedy tokens gives its logits; the tokens are their argmax."""
    inputs = pair.inputs("padded", seed=8)
    greedy, want = pair.family.greedy(pair.theirs, inputs)
    length = int(inputs["attention_mask"].sum(axis=1).max())
    state, step = pair.ours.prefill(pair.for_us(inputs), max_length=length + 64)
    steps = [step.main]
    for column in greedy.T[:-1]:
        state, step = pair.ours.decode(state, column)
        steps.append(step.main)
    assert step.contrast is None
    np.testing.assert_array_equal(step.combined, step.main)
    got = np.stack(steps, axis=1)
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)
    np.testing.assert_array_equal(got.argmax(axis=-1), greedy)
    # A run stuck on one token would hide a wrong position or cache slot.
    assert max(len(set(row)) for row in greedy.tolist()) > pair.family.distinct


@pairs(quick=[name for name in FIRST if name.startswith(("gemma3", "llava-", "qwen2_5_vl", "qwen_vl"))])
def test_greedy_tokens(pair):
    """By the loop on the device, whose steps are those of the test above."""
    inputs = pair.inputs("padded", seed=8)
    count = pair.family.new_tokens
    out = pair.ours.generate(pair.for_us(inputs), max_new_tokens=count, stop_token_ids=())
    np.testing.assert_array_equal(np.stack(out.tokens), pair.family.greedy(pair.theirs, inputs)[0])


@pairs(quick=FIRST)
def test_a_saved_checkpoint_loads_in_transformers(pair, tmp_path):
    folder = pair.ours.save_pretrained(tmp_path / "saved")
    again, report = pair.family.load(folder)
    assert not any(report.values()), report
    inputs = pair.inputs("padded", seed=9)
    for got, want in zip(pair.family.logits(again, inputs), pair.family.logits(pair.theirs, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


@pairs(quick=[name for name in NAMES if name.startswith(("qwen2_vl", "qwen2_5_vl"))])
def test_every_naming_scheme_loads(pair, tmp_path):
    for scheme in table_for(pair.ours.config).schemes:
        save_checkpoint(tmp_path / scheme, pair.ours.params, pair.ours.config, scheme=scheme)
        loaded = LVLM.from_pretrained(tmp_path / scheme)
        chex.assert_trees_all_equal(loaded.params, pair.ours.params)


@pytest.fixture(scope="module", params=ALL, ids=lambda family: family.name)
def family(request):
    return request.param


def test_arrays_that_cannot_be_used(family):
    config = family.config()
    model = LVLM({}, models.config_from_hf(family.raw()))
    arrays = family.inputs(config, 5, [family.refused_layout])
    for change, message in family.refused_arrays:
        changed = {name: array for name, array in (arrays | change(arrays)).items() if array is not None}
        with pytest.raises(LVLMError, match=message) as raised:
            model.prepare(changed)
        assert "\n" not in str(raised.value)


def test_configurations_that_are_not_supported(family):
    for change, message in family.refused:
        with pytest.raises(LVLMError, match=message):
            models.config_from_hf(merged(family.raw(), change))


@pytest.mark.parametrize("family", [one for one in ALL if one.pictures], ids=lambda family: family.name)
def test_messages_are_laid_out_as_the_processor_does(family, tmp_path):
    """Tokens, pixels, and which tokens are an image's, of two pictures between words."""
    model = family.with_processor(tmp_path)
    generator = np.random.default_rng(1)
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in family.pictures]
    content = [
        {"type": "image", "image": pictures[0]},
        {"type": "text", "text": "a "},
        {"type": "image", "image": pictures[1]},
        {"type": "text", "text": "b"},
    ]
    prompt = model.prepare([{"role": "user", "content": content}])
    text = family.chat.format(f"{family.marker}a {family.marker}b")
    want = family.processed(model.processor, pictures, text)
    np.testing.assert_array_equal(prompt.tokens[0][prompt.image_id[0] >= 0], want["input_ids"][0])
    np.testing.assert_array_equal(family.our_pixels(prompt), family.their_pixels(want))
    if prompt.grids is not None:
        np.testing.assert_array_equal(prompt.grids, want["image_grid_thw"][:, 1:] // 2)
    counts = [(prompt.image_id == image).sum() for image in (1, 2)]
    np.testing.assert_array_equal(counts, prompt.pictures.token_counts)
    assert tuple(counts) == family.counts
