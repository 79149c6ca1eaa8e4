"""Flow-alignment training against generation with SEVI, and against the NumPy reference."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax import models
from lvlm_jax.methods.sevi import SEVI
from lvlm_jax.training import forward
from lvlm_jax.training.objectives import flow_alignment
from lvlm_jax.training.objectives.flow_alignment import Alignment, AnswerRows, Student
from lvlm_jax.weights import parts
from lvlm_jax.weights.tables import flatten, unflatten
from tests.checkpoints import IMAGE, select
from tests.methods import compare
from tests.reference import flow_alignment as reference
from tests.reference import one_branch as one_branch_reference

LAYOUTS = [(4, IMAGE, 2, IMAGE, 14), (9,), (3, IMAGE, 11)]
DEPTH = 3
SHARED = "qwen2_tied_two_feature_layers"  # query heads share key heads
SETTINGS = {"omega": 2.0, "kappa": 0.4, "start_layer": 1}
ANSWER = 7  # tokens; the last sample's answer is one shorter
TRAINED = r"language_model/layers_(1|2)/self_attn/(q|k)_proj/kernel"


@functools.cache
def load(variety):
    return compare.load(DEPTH, variety)


@functools.cache
def samples(variety):
    """Of each conversation (tokens, pixels or None, answer rows), and the prompts as left-padded arrays."""
    case = load(variety)
    inputs, forced, found = case.inputs(LAYOUTS), case.forced(LAYOUTS, ANSWER), []
    for row in range(len(LAYOUTS)):
        prompt = select(case.theirs.config, inputs, row)
        ids = prompt["input_ids"][0]
        tokens = np.concatenate([ids, forced[row, : ANSWER - (row == len(LAYOUTS) - 1)]])
        found.append((tokens, prompt.get("pixel_values"), np.arange(len(ids) - 1, len(tokens) - 1)))
    return found, inputs, forced


def batch_of(config, found, length=48, room=9, stage=1):
    """Right-padded arrays of samples, with `room` places for answer tokens."""
    tokens = np.full((len(found), length), config.pad_token_id, np.int32)
    image_id, columns = np.full_like(tokens, -1), np.zeros((len(found), room), np.int32)
    sizes = {"image_token_index": config.image_token_id, "image_seq_length": config.tokens_per_image}
    for index, (ids, _, answer_rows) in enumerate(found):
        tokens[index, : len(ids)] = ids
        image_id[index, : len(ids)] = one_branch_reference.image_ids(sizes, ids)
        columns[index, : len(answer_rows)] = answer_rows + 1
    answers = np.zeros(tokens.shape, bool)
    np.put_along_axis(answers, columns, True, axis=1)
    answers[:, 0] = False
    # Batches have room for more pictures than there are.
    pixels = [pixels for _, pixels, _ in found if pixels is not None]
    batch = {
        "images": np.concatenate([*pixels, np.zeros_like(pixels[0][:1])]),
        "answer": {"tokens": tokens, "answers": answers, "image_id": image_id, "columns": columns},
        "weight": np.ones(len(found), np.float32),
        "stage": np.full(len(found), stage, np.int32),
    }
    return jax.tree.map(jnp.asarray, batch)


def alignment(ours, remat=False, mu=1.0, **settings):
    return Alignment(models.build(ours.config, remat=remat), SEVI(**(SETTINGS | settings)), mu)


def name_of(path):
    """A kernel's name in the reference's weights."""
    layer, projection = path.split("/")[1].removeprefix("layers_"), path.split("/")[3]
    return f"model.language_model.layers.{layer}.self_attn.{projection}.weight"


@functools.cache
def moved_student(variety):
    """(trainable, frozen with the base, the student's weights for the reference): some kernels away from the base."""
    _, ours, weights, _ = load(variety)
    trainable, frozen = parts.split(ours.params, TRAINED)
    frozen = flow_alignment.with_base(trainable, frozen)
    generator, flat, changed = np.random.default_rng(8), {}, dict(weights)
    for path, kernel in flatten(trainable).items():
        step = generator.normal(size=kernel.shape).astype(np.float32) * 0.05
        flat[path] = kernel + step
        changed[name_of(path)] = weights[name_of(path)] + step.T
    return unflatten(flat), frozen, changed


@functools.cache
def passes(variety):
    """The reference's (student, teacher, base) pass over every sample."""
    _, _, weights, config = load(variety)
    settings, changed = reference.Settings(**SETTINGS), moved_student(variety)[2]
    return [
        (
            reference.forward(changed, config, *one, settings),
            reference.forward(weights, config, *one, settings, edited=True),
            reference.forward(weights, config, *one, settings),
        )
        for one in samples(variety)[0]
    ]


def test_the_teacher_is_generation_with_sevi():
    _, ours, _, _ = load(SHARED)
    found, inputs, forced = samples(SHARED)
    generated, _, _ = compare.run_library(ours, inputs, forced, SEVI(**SETTINGS))
    own = alignment(ours)
    batch = batch_of(ours.config, found)
    pictures = own.module.apply({"params": ours.params}, batch["images"], method="encode_images")
    logits = jax.jit(own._teacher)(ours.params, pictures, batch)
    for row, (_, _, base) in enumerate(passes(SHARED)):
        count = len(base.logits)
        np.testing.assert_allclose(logits[row, :count], generated[row, :count], rtol=0, atol=1e-4)
        effect = np.abs(logits[row, :count] - base.logits).max()
        assert effect > 0.05 if IMAGE in LAYOUTS[row] else effect < 1e-4


@functools.cache
def compiled(variety, remat):
    """(trainable, frozen, batch, weights of the two terms) -> metrics, and the gradient of the weighted totals."""
    own = alignment(load(variety)[1], remat)

    def run(trainable, frozen, batch, weights):
        def total(trainable):
            metrics = own.objective(trainable, frozen, batch, None)
            return weights @ jnp.stack([metrics[name].total for name in own.terms]), metrics

        gradient, metrics = jax.grad(total, has_aux=True)(trainable)
        return metrics, gradient

    return jax.jit(run)


def run(stage=1, terms=(1.0, 1.0), trainable=None, change=lambda batch: batch, variety=SHARED, remat=False):
    """`compiled` at the moved student, or at `trainable`."""
    _, ours, _, _ = load(variety)
    student, frozen, _ = moved_student(variety)
    batch = change(batch_of(ours.config, samples(variety)[0], stage=stage))
    return compiled(variety, remat)(student if trainable is None else trainable, frozen, batch, jnp.float32(terms))


@pytest.mark.parametrize("variety", [SHARED, pytest.param("mistral_window", marks=pytest.mark.slow)])
def test_terms_equal_the_reference(variety):
    rows = sum(len(answer_rows) for _, _, answer_rows in samples(variety)[0])
    heads = rows * (DEPTH - 1) * load(variety)[1].config.text.num_heads
    students = [student for student, _, _ in passes(variety)]
    answer = sum(reference.answer_term(student, teacher) for student, teacher, _ in passes(variety))
    for stage in (1, 2):
        metrics, _ = run(stage, variety=variety)
        attention = sum(reference.attention_term(student, student, stage) for student in students)
        moved = sum(reference.moved(student, stage) for student in students)
        assert attention > 0.5 and answer > 0.5 and moved > 1
        np.testing.assert_allclose(metrics["attention_kl"].total, attention, rtol=1e-4)
        np.testing.assert_allclose(metrics["answer_kl"].total, answer, rtol=1e-4)
        assert metrics["attention_kl"].count == metrics["answer_kl"].count == rows
        assert metrics[f"moved_{stage}"] == (moved, heads)
    said = [[one.logits.argmax(-1) for one in pair[:2]] for pair in passes(variety)]
    same = sum((student == teacher).sum() for student, teacher in said)
    assert metrics["agreement"] == (same, rows) and 0 < same < rows


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_equal_finite_differences_with_the_targets_held(stage):
    _, _, weights, config = load(SHARED)
    trainable, _, changed = moved_student(SHARED)
    _, gradient = run(stage, terms=(1.0, 0.7))
    generator, slope, direction = np.random.default_rng(9), 0.0, {}
    for path, slopes in flatten(gradient).items():
        assert np.isfinite(slopes).all()
        step = generator.normal(size=slopes.shape)
        slope += float((np.asarray(slopes, np.float64) * step).sum())
        direction[name_of(path)] = step.T

    def loss(length):
        shifted = changed | {name: changed[name] + length * step for name, step in direction.items()}
        total = 0.0
        for one, (student, teacher, _) in zip(samples(SHARED)[0], passes(SHARED), strict=True):
            there = reference.forward(shifted, config, *one, reference.Settings(**SETTINGS))
            total += reference.attention_term(there, student, stage) + 0.7 * reference.answer_term(there, teacher)
        return total

    assert abs(slope) > 0.1
    np.testing.assert_allclose(slope, (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=2e-3)


def test_a_stage_trains_the_heads_that_it_moves_and_no_others():
    """Queries of the last layer affect the first term only through their own head."""
    last, heads, shares = DEPTH - 1, load(SHARED)[1].config.text.num_heads, []
    for stage in (1, 2):
        for index, (student, _, _) in enumerate(passes(SHARED)):
            alone = jax.nn.one_hot(index, len(LAYOUTS))
            _, gradient = run(stage, (1.0, 0.0), change=lambda batch, alone=alone: batch | {"weight": alone})
            slopes = gradient["language_model"][f"layers_{last}"]["self_attn"]["q_proj"]["kernel"]
            trained = np.abs(np.asarray(slopes)).reshape(len(slopes), heads, -1).max(axis=(0, 2)) > 0
            rows = [stages == stage for (layer, _), (_, _, stages) in student.rows.items() if layer == last]
            np.testing.assert_array_equal(trained, np.any(rows, axis=0))
            shares.append(trained.mean())
    assert min(shares) == 0 and any(0 < share < 1 for share in shares)


def test_samples_add_up():
    def of(row, **options):
        return run(change=lambda batch: batch | {"weight": jax.nn.one_hot(row, 3)}, **options)

    found = [of(row)[0] for row in range(3)]
    for name, mean in run()[0].items():
        np.testing.assert_allclose(sum(np.asarray(part[name]) for part in found), mean, rtol=1e-5)
    # One without an image moves nothing and has no first term.
    metrics, gradient = of(LAYOUTS.index((9,)), terms=(1.0, 0.0))
    assert metrics["moved_1"].total == metrics["moved_2"].total == metrics["attention_kl"].total == 0
    assert metrics["attention_kl"].count == ANSWER and metrics["answer_kl"].total > 0
    assert not any(np.any(slopes) for slopes in jax.tree.leaves(gradient))


def test_twenty_steps_bring_the_student_to_the_teacher():
    """From the base: answer-token KL falls to less than a fifth, that of attention to less than half."""
    trainable = moved_student(SHARED)[1][flow_alignment.BASE]
    optimizer, (before, _) = optax.adam(4e-3), run(trainable=trainable)
    state = optimizer.init(trainable)
    for _ in range(20):
        _, gradient = run(terms=(0.02, 1.0), trainable=trainable)
        updates, state = optimizer.update(gradient, state)
        trainable = optax.apply_updates(trainable, updates)
    after, _ = run(trainable=trainable)
    assert after["answer_kl"].value < before["answer_kl"].value / 5
    assert after["attention_kl"].value < before["attention_kl"].value / 2
    assert after["agreement"].value > before["agreement"].value


def test_the_student_computes_what_the_model_computes():
    ours = compare.load(1, SHARED).ours
    own = alignment(ours, start_layer=0)
    batch = batch_of(ours.config, samples(SHARED)[0])
    pictures = forward.encode_images(own.module, ours.params, batch["images"])
    index, weight = (own.sevi, batch["answer"]), jnp.ones(batch["answer"]["columns"].shape)
    both = AnswerRows.of(*index), Student.of(*index, weight=weight)
    plain, observed = (jax.jit(own._answers)(ours.params, pictures, batch, method) for method in both)
    np.testing.assert_array_equal(observed[0], plain[0])
    assert observed[1].moved.any()


def test_rows_a_few_at_a_time_and_recomputed_layers_give_the_same(monkeypatch):
    want = jax.tree.leaves(run())
    attend = sys.modules["lvlm_jax.attention.attend"]  # the package has the function under this name
    for constant, value in (("SHORT_QUERY", 0), ("LARGEST_MAP", 1), ("MIN_ROWS", 13)):
        monkeypatch.setattr(attend, constant, value)
    for few, whole in zip(jax.tree.leaves(run(remat=True)), want, strict=True):
        np.testing.assert_allclose(few, whole, rtol=1e-4, atol=1e-5)


def test_without_the_second_term_the_teacher_never_runs(monkeypatch):
    monkeypatch.setattr(Alignment, "_teacher", lambda *_: pytest.fail("the teacher has run"))
    ours, (student, frozen, _) = load(SHARED).ours, moved_student(SHARED)
    own = alignment(ours, mu=0.0)
    batch = batch_of(ours.config, samples(SHARED)[0])
    found = jax.eval_shape(own.objective, student, frozen, batch, jax.random.key(0))
    assert own.terms == {"attention_kl": 1.0} and found.keys() == {"attention_kl", "moved_1", "moved_2"}
    assert alignment(ours, mu=0.5).terms == {"attention_kl": 1.0, "answer_kl": 0.5}
