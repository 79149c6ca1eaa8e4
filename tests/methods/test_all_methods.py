"""What holds for every registered method, on a model of two or three layers and images of four tokens.

A new method needs an entry in entries.py; its formula has a test file of its own.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import LVLM, methods
from lvlm_jax.generation import decode_loop, forcing, forward
from lvlm_jax.methods.cuts import soften
from tests import checkpoints
from tests.methods.entries import ENTRIES, HASH, LAYOUTS, SEARCHES, build, each_method, strengths

STEPS = 3

every_method = each_method()


def test_every_method_has_an_entry():
    assert set(ENTRIES) == set(methods.names()) - SEARCHES


class Bench:
    """The model, its prompts, and forced runs of them."""

    def __init__(self, folder, depth):
        theirs = checkpoints.make_llava(
            folder,
            seed=41,
            text={"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": depth,
                  "num_key_value_heads": 2},
            vision={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 14},
        )  # fmt: skip
        self.config = theirs.config
        self.model = LVLM.from_pretrained(folder, dtype="float32")
        self.model.hash = HASH
        self.inputs = checkpoints.random_inputs(self.config, seed=42, layouts=LAYOUTS)
        self.forced = np.random.default_rng(43).integers(3, 59, (STEPS, len(LAYOUTS))).astype(np.int32)

    def arguments(self, method, row=None):
        """Arguments of the pure prefill for the batch, or for one sample, which uses the program of the batch."""
        inputs = self.inputs if row is None else checkpoints.select(self.config, self.inputs, row)
        arguments, options = self.model.prefill_arguments(inputs, method, 64 + STEPS + 1)
        return arguments, options | {"image_count": 2}

    def run(self, method, row=None, prefill=decode_loop.prefill, decode=decode_loop.decode_step, steps=STEPS):
        """The steps of a prefill and of forced tokens."""
        arguments, options = self.arguments(method, row)
        state, step = prefill(*arguments, **options)
        taken = [step]
        for tokens in self.forced[:steps]:
            fed = tokens if row is None else tokens[row : row + 1]
            state, step = decode(self.model.params, self.model.config, state, jnp.asarray(fed))
            taken.append(step)
        return [Numbers.of(step) for step in taken]

    @functools.cached_property
    def plain(self):
        return self.run(None)

    @functools.cache  # noqa: B019 - one bench per module
    def acting(self, name):
        return self.run(build(name))


class Numbers(NamedTuple):
    """One step's logits on the host."""

    main: np.ndarray
    contrast: np.ndarray | None
    combined: np.ndarray

    @classmethod
    def of(cls, step):
        return cls(*(None if part is None else np.asarray(part) for part in (step.main, step.contrast, step.combined)))

    def row(self, row):
        return Numbers(*(None if part is None else part[row : row + 1] for part in self))


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    return functools.cache(lambda depth: Bench(tmp_path_factory.mktemp(f"layers_{depth}"), depth))


@pytest.fixture
def bench(benches, name):
    return benches(ENTRIES[name].depth)


def assert_same(got, want, atol=2e-5):
    """Main, contrast and combined logits of two runs; the same tokens are ruled out."""
    for mine, theirs in zip(got, want, strict=False):
        np.testing.assert_allclose(mine.main, theirs.main, rtol=0, atol=atol, err_msg="main")
        if theirs.contrast is not None:
            np.testing.assert_allclose(mine.contrast, theirs.contrast, rtol=0, atol=atol, err_msg="contrast")
        np.testing.assert_allclose(mine.combined, theirs.combined, rtol=0, atol=3 * atol, err_msg="combined")


@every_method
def test_it_acts_and_leaves_samples_without_an_image_alone(bench, name):
    """DoLa, DeCo and Nullu look at no image and treat all samples alike."""
    change = np.stack(
        [
            np.where(np.isfinite(step.combined), np.abs(step.combined - plain.combined), 0).max(axis=-1)
            for step, plain in zip(bench.acting(name), bench.plain, strict=True)
        ]
    )
    assert change[:, 0].max() > 0.01
    if name not in ("dola", "deco", "nullu"):
        assert change[:, 1].max() < 1e-5


@every_method
def test_neutral_strengths_are_greedy_decoding(bench, name):
    entry = ENTRIES[name]
    for step, plain in zip(bench.run(build(name, neutral=True)), bench.plain, strict=True):
        if entry.inexact:
            np.testing.assert_allclose(step.main, plain.main, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(step.main, plain.main)
        if entry.logits:
            kept = np.isfinite(step.combined)
            assert kept.all() or name == "deco"  # which rules out all but its candidates, whatever its strength
            np.testing.assert_allclose(step.combined[kept], plain.main[kept], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(step.combined.argmax(-1), plain.main.argmax(-1))


@every_method
def test_off_is_bit_equal_to_no_method(bench, name):
    """A method leaves no trace in the model: results without one are the same before and after it."""
    plain = bench.plain
    bench.acting(name)
    for step, before in zip(bench.run(None), plain, strict=True):
        np.testing.assert_array_equal(step.main, before.main)
        np.testing.assert_array_equal(step.combined, before.main)


@each_method(quick="cmac")
def test_jit_equals_no_jit(bench, name):
    pure = bench.run(build(name), prefill=forward.prefill, decode=forward.decode_step, steps=1)
    assert_same(pure, bench.acting(name)[:2])


@each_method(quick="avisc clva cmac m3id")
def test_a_step_keeps_the_form_of_the_state(bench, name):
    """The state keeps its structure, so that the loop on the device can carry it. Traced only."""
    arguments, options = bench.arguments(build(name))

    def states(params, main, method, contrast):
        given = options | {"contrast": contrast}
        before, _ = forward.prefill(params, bench.model.config, main, method, **given)
        after, _ = forward.decode_step(params, bench.model.config, before, jnp.asarray(bench.forced[0]))
        return before, after

    params, _, main, method = arguments
    before, after = jax.eval_shape(states, params, main, method, options["contrast"])
    assert before == after


@each_method(quick="capl cmac m3id sevi sid vista")
def test_a_batch_equals_its_samples_alone(bench, name):
    together = bench.acting(name)
    for row in range(len(LAYOUTS)):
        assert_same(bench.run(build(name), row), [step.row(row) for step in together])


@each_method(quick="capl clva cmac deco pai sevi vaf vista")
def test_known_answers_are_scored_as_they_are_written_and_gradients_equal_finite_differences(bench, name):
    """Rows of an answer all at once equal decode steps; the gradient is that of a random mix of the combined logits.

    Strengths take their finest form, one value for each layer or head. One without a gradient says why in its field,
    and so cannot be learned; every other one has a slope.
    """
    check_gradients(bench, name, build(name), bench.acting(name))


# Switches under which a strength is used at all (the first) or enters another formula.
VARIANTS = [("m3id", {"variant": "port"}), ("clva", {"gate": False}),
            ("cmac", {"variant": "code"}), ("dab", {"decode": True}), ("dola", {"variant": "code"}),
            ("sevi", {"variant": "code"}), ("sevi", {"variant": "code-qwen"}), ("spin", {"variant": "code"}),
            ("vista", {"variant": "paper"})]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(*case, marks=[pytest.mark.slow] * bool(place), id="-".join(map(str, (case[0], *case[1].values()))))
     for place, case in enumerate(VARIANTS)],
)  # fmt: skip
def test_gradients_of_other_variants_equal_finite_differences(bench, name, changes):
    method = dataclasses.replace(build(name), **changes)
    check_gradients(bench, name, method, bench.run(method))


def test_every_strength_has_its_gradient_checked():
    """Each strength is used by an entry or a variant, or is flat: learning refuses it by name."""
    checked = set()
    for name, changes in [*((name, {}) for name in ENTRIES), *VARIANTS]:
        method = dataclasses.replace(build(name), **changes)
        checked |= {(name, key) for key in strengths(method) if used(method, field_of(method, key))}
    for name in methods.names():
        for field in dataclasses.fields(methods.get(name)):
            if "low" in field.metadata:
                assert (name, field.name) in checked or field.metadata["flat"], f"{name}.{field.name}"


def field_of(method, key):
    return next(field for field in dataclasses.fields(method) if field.name == key)


def used(method, field):
    """Whether a strength is used under the method's switches."""
    switch, value = field.metadata["when"] or (None, None)
    return switch is None or getattr(method, switch) == value


def check_gradients(bench, name, method, acting):
    fields = {field.name: field.metadata for field in dataclasses.fields(method)}
    (params, config, main, ready), options = bench.arguments(method)
    mix = jnp.asarray(np.random.default_rng(44).normal(size=(len(LAYOUTS), STEPS + 1, 60)).astype(np.float32))
    tokens = jnp.pad(jnp.asarray(bench.forced.T), ((0, 0), (0, 1)))
    shapes = {"model": (), "layer": (ENTRIES[name].depth,), "head": (ENTRIES[name].depth, 4)}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @functools.partial(jax.value_and_grad, has_aux=True)
    def scalar(values):
        edited = soften(dataclasses.replace(ready, **values), 1.0)
        state, step = forward.prefill(params, config, main, edited, **options)
        found = forcing.forced_logits(params, config, state, step, tokens)
        return (found.combined * mix).sum(), found

    start = strengths(method)
    values = {key: jnp.full(shapes[fields[key]["per"]], value, jnp.float32) for key, value in start.items()}
    (at, found), gradients = scalar(values)
    for row, step in enumerate(acting):
        np.testing.assert_allclose(found.main[:, row], step.main, rtol=0, atol=2e-5)
        if step.contrast is not None:
            np.testing.assert_allclose(found.contrast[:, row], step.contrast, rtol=0, atol=2e-5)
    assert np.isfinite(at)
    for key, slopes in gradients.items():
        assert np.isfinite(slopes).all(), key
        if fields[key]["flat"] or not used(method, field_of(method, key)):
            assert not slopes.any(), f"{key} should be flat: it is {fields[key]['flat']}"
            continue
        width = (0.001 if key in ENTRIES[name].kinked else 0.01) * max(abs(float(start[key])), 0.1)
        above, below = (float(scalar(values | {key: values[key] + h})[0][0]) for h in (width, -width))
        gradient, slope = float(slopes.sum()), (above - below) / (2 * width)
        rounding = 1e-6 * max(abs(float(at)), 10) / width
        print(f"{name}.{key}: {gradient:.4f} {slope:.4f} (rounding {rounding:.1e})")
        assert abs(slope) > 10 * rounding, f"{key}: the slope is too small to be measured"
        assert abs(slope - gradient) < 0.02 * abs(slope) + rounding, key


@pytest.mark.parametrize("name", ["m3id", "deco", "sparc"])
def test_what_runs_along_the_tokens_of_a_known_answer(bench, name):
    """A count of tokens, early exits, edits that hang on the step before; cuts are hard."""
    (params, config, main, ready), options = bench.arguments(build(name))
    state, step = decode_loop.prefill(params, config, main, ready, **options)
    tokens = jnp.pad(jnp.asarray(bench.forced.T), ((0, 0), (0, 1)))
    found = jax.jit(forcing.forced_logits, static_argnames="config")(params, config, state, step, tokens)
    for row, want in enumerate(bench.acting(name)):
        np.testing.assert_allclose(found.combined[:, row], want.combined, rtol=0, atol=5e-5)


def five_values(field, value):
    """Five values of a numeric field, all allowed."""
    low, high = field.metadata["low"], field.metadata["high"]
    if np.isfinite(high):
        return np.linspace(max(low, 0.01), high, 5)
    return max(low, 0) + (abs(float(value)) or 1) * np.array([0.1, 0.5, 1, 1.7, 3])


@every_method
def test_another_strength_compiles_nothing(bench, name, all_programs_kept):
    method = build(name)
    fields = {field.name: field for field in dataclasses.fields(method)}
    bench.acting(name)

    def programs():
        jitted = "prefill decode_step full_forward contrast_pixels contrast_image encode_images".split()
        return [getattr(decode_loop, name)._cache_size() for name in jitted]

    before = programs()
    for key, value in strengths(method).items():
        for other in five_values(fields[key], value):
            bench.run(dataclasses.replace(method, **{key: float(other)}), steps=1)
    assert programs() == before
