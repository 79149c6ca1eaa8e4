"""Training of every family: batches hold what inference reads, and the answers get the same log-probabilities."""

import dataclasses
import pickle

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from PIL import Image

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import CAPL
from lvlm_jax.training import finetune, pairwise, placement, registry
from lvlm_jax.training.data import pair_files
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import PAIR, Encoder, assemble, rows_of, shape_of
from lvlm_jax.training.data.pair_files import Conversation, Pair, assistant
from lvlm_jax.training.step import State, make_step
from lvlm_jax.weights import lora
from lvlm_jax.weights.tables import flatten
from tests.training import pair_sets
from tests.training.family_models import MAKERS
from tests.training.pair_sets import user

# (question, width and height of each picture, chosen, rejected)
PAIRS = [
    ("Same?", ((40, 21), (17, 50)), "no", "yes they are"),
    ("Hello", (), "good day", "hm"),
    ("What?", ((30, 30),), "a red cat", "a dog"),
    ("Where?", ((60, 20),), "left", "right"),
]
TRAINED = ["qwen2_5_vl", "internvl", "llava_next"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder, generator, found = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1), []
    for number, (question, sizes, chosen, rejected) in enumerate(PAIRS):
        paths = [folder / f"{number}_{place}.png" for place in range(len(sizes))]
        for path, (width, height) in zip(paths, sizes, strict=True):
            Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        found.append(Pair(tuple(paths), [user(question, len(sizes))], chosen, rejected, str(number)))
    return found


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Gives the model of a family."""
    known = {}

    def load(name):
        if name not in known:
            known[name] = MAKERS[name](tmp_path_factory.mktemp(name))
        return known[name]

    return load


@dataclasses.dataclass
class Case:
    """A model, the pairs as its rows, and all of them as one batch."""

    model: object
    encoder: Encoder
    rows: tuple
    batch: dict


def case_of(model, pairs):
    encoder = Encoder(model.processor, model.config)
    rows = rows_of(pairs, encoder.pair, encoder, 2048, "error")
    return Case(model, encoder, rows, assemble(encoder, rows, range(len(rows)), shape_of(rows, encoder, len(rows))))


@pytest.fixture(scope="module", params=TRAINED)
def case(request, loaded, pairs):
    return case_of(loaded(request.param), pairs)


def scorer_of(model, method=None):
    return pairwise.Scorer(models.build(model.config), method, 2)


def read_by_inference(model, pairs, rows, name):
    """The prompts as `prepare` lays them out, with an answer behind each."""
    prepared = model.prepare([pair.conversation() for pair in pairs])
    prompts, images = [], []
    for index, row in enumerate(rows):
        sequence, kept = row.sequences[name], prepared.image_id[index] >= 0
        answer = sequence.ids[sequence.answers]
        prompts.append(np.append(prepared.tokens[index, kept], answer))
        images.append(np.append(prepared.image_id[index, kept], np.zeros(len(answer))))
    whole = prepared._with_pictures(prepared._rebuilt(prompts, model.config.pad_token_id, images))
    columns = np.tile(np.arange(whole.tokens.shape[1]), (len(rows), 1))
    return dataclasses.replace(whole, source_columns=columns)


@pytest.mark.parametrize("family", MAKERS)
def test_batches_hold_what_inference_reads(loaded, pairs, family):
    case = case_of(loaded(family), pairs)
    model, batch = case.model, case.batch
    for name in PAIR:
        arrays, whole = batch[name], read_by_inference(model, pairs, case.rows, name)
        assert case.encoder.length(case.rows[0]) <= arrays["tokens"].shape[1]
        for index, (pair, row) in enumerate(zip(pairs, case.rows, strict=True)):
            kept, length = whole.image_id[index] >= 0, whole.lengths[index]
            assert length == row.sequences[name].length
            np.testing.assert_array_equal(arrays["tokens"][index, :length], whole.tokens[index, kept])
            np.testing.assert_array_equal(arrays["image_id"][index, :length], whole.image_id[index, kept])
            assert (arrays["image_id"][index, length:] == -1).all()
            if whole.axes is not None:
                found = arrays["axes"][index]
                np.testing.assert_array_equal(found[:, :length], whole.axes[:, index, kept])
                assert not found[:, length:].any()
            said = arrays["tokens"][index, arrays["answers"][index]]
            text = model.processor.tokenizer.decode(said, skip_special_tokens=True)
            assert text.strip() == getattr(pair, name)
    assert ("axes" in batch["chosen"]) == (whole.grids is not None)
    shown = {"images": whole.pixels} | whole.geometry
    for name, array in ({"images": batch["images"]} | batch.get("geometry", {})).items():
        np.testing.assert_array_equal(array[: len(shown[name])], shown[name])
        assert not array[len(shown[name]) :].any()
    assert len(batch["images"]) % len(pairs) == 0


@pytest.mark.parametrize("family", MAKERS)
def test_a_source_travels_to_workers_and_its_parts_have_one_shape(loaded, pairs, family):
    model = loaded(family)
    encoder = Encoder(model.processor, model.config)
    source = Batches(rows_of(pairs, encoder.pair, encoder, 2048, "error"), encoder, 4, 4)
    batch = source(0)
    again = pickle.loads(pickle.dumps(source))(0)
    assert jax.tree.all(jax.tree.map(np.array_equal, batch, again))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {4}
    for part, index in enumerate(batch["ids"][:, 0]):
        alone = assemble(encoder, [source.rows[index]], [index], shape_of([source.rows[index]], encoder, 1))
        for found, own in zip(jax.tree.leaves(batch), jax.tree.leaves(alone), strict=True):
            inside = tuple(slice(size) for size in own.shape)
            np.testing.assert_array_equal(found[part][inside], own)


def logprobs_of(model, pairs, rows, method=None):
    """Per row and answer its tokens' log-probabilities, from the model's logits."""
    found = {}
    for name in PAIR:
        whole = read_by_inference(model, pairs, rows, name)
        logprobs = np.asarray(jax.nn.log_softmax(model.logits(whole, method)))
        for index, row in enumerate(rows):
            count = int(row.sequences[name].answers.sum())
            places, tokens = np.arange(-count - 1, -1), whole.tokens[index, -count:]
            found[index, name] = logprobs[index, places, tokens]
    return found


def assert_scored(found, mask, expected):
    for (index, name), wanted in expected.items():
        own = np.asarray(found)[index, PAIR.index(name)]
        np.testing.assert_allclose(own[: len(wanted)], wanted, rtol=0, atol=1e-5)
        assert mask[index, PAIR.index(name)].sum() == len(wanted)


def test_answers_have_the_log_probabilities_of_inference(case, pairs):
    scorer = scorer_of(case.model)
    score = jax.jit(lambda params, batch: scorer.logprobs(params, batch, scorer.image_tokens(params, batch)))
    assert_scored(*score(case.model.params, case.batch), logprobs_of(case.model, pairs, case.rows))


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("llava_next", marks=pytest.mark.slow)])
def test_so_they_have_in_parts_of_a_step(loaded, pairs, family):
    """Each row alone, its pictures filled up to those of the others."""
    case = case_of(loaded(family), pairs)
    score, expected = scorer_of(case.model).alone, logprobs_of(case.model, pairs, case.rows)
    parts = Batches(case.rows, case.encoder, 4, 4)(0)
    scored = jax.jit(lambda params, parts: jax.lax.map(lambda part: score(params, part), parts))
    found = scored(case.model.params, parts)[:, 0]
    places = {index: place for place, index in enumerate(parts["ids"][:, 0])}
    assert_scored(found, found != 0, {(places[index], name): rows for (index, name), rows in expected.items()})


def test_so_they_have_under_cross_image_attention(loaded, pairs):
    case, method = case_of(loaded("qwen2_5_vl"), pairs), CAPL(rho=0.6)
    scorer = scorer_of(case.model, method)
    score = jax.jit(lambda params, batch: scorer.logprobs(params, batch, scorer.image_tokens(params, batch)))
    expected = logprobs_of(case.model, pairs, case.rows, method)
    assert_scored(*score(case.model.params, case.batch), expected)
    plain = logprobs_of(case.model, pairs, case.rows)
    moved = [np.abs(expected[key] - plain[key]).max() > 1e-4 for key in expected]
    assert [moved[index] for index in range(4)] == [True, False, False, False]  # two images see each other


def task_of(recipe, case, pairs, folder, **changes):
    """A recipe's task on those pairs that have pictures, adapters of the model, and one update."""
    shown = [pair for pair in pairs if pair.images]
    data = folder / "pairs.jsonl"
    pair_files.write_pairs(data, shown)
    settings = pair_sets.config(data, recipe=recipe, batch=len(shown), length=2048, **changes)
    task = registry.find(recipe).task(case.model, models.build(case.model.config), settings, folder)
    trainable, frozen = lora.attach(case.model.params, 2, 4.0, lora.TARGETS, 0.0, jax.random.key(0))
    return task, trainable, frozen


def updated(task, trainable, frozen):
    """What one step moves, and its metrics."""
    before = jax.tree.map(np.asarray, trainable)
    transformation = optax.sgd(1.0)
    step = make_step(task.objective, task.terms, transformation)
    state, metrics = step(State.create(trainable, transformation), frozen, task.source(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))
    moved = {path for path, leaf in flatten(state.trainable).items() if not np.array_equal(leaf, flatten(before)[path])}
    return moved, {name: float(mean.value) for name, mean in metrics.items()}


def test_a_capl_step_moves_adapters_alone(case, pairs, tmp_path):
    task, trainable, frozen = task_of("capl", case, pairs, tmp_path, method="capl", rho=0.6, nll=1.0)
    moved, metrics = updated(task, trainable, frozen)
    # The first factor learns once the second, which begins as zero, has moved.
    assert moved == {path for path in flatten(trainable) if path.endswith("lora_b")}
    assert metrics["preference"] == pytest.approx(np.log(2), abs=1e-6) and metrics["nll"] > 1


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("internvl", "llava_next"))]
)
def test_an_sft_step_moves_adapters_alone(loaded, pairs, tmp_path, family):
    case = case_of(loaded(family), pairs)
    task, trainable, frozen = task_of("sft", case, pairs, tmp_path)
    moved, metrics = updated(task, trainable, frozen)
    assert moved == {path for path in flatten(trainable) if path.endswith("lora_b")}
    expected = logprobs_of(case.model, pairs, case.rows)
    wanted = [expected[index, "chosen"] for index, pair in enumerate(pairs) if pair.images]
    assert metrics["loss"] == pytest.approx(-np.concatenate(wanted).mean(), abs=1e-5)


def test_a_step_of_flow_alignment(loaded, pairs, tmp_path):
    case = case_of(loaded("qwen2_5_vl"), pairs)
    task, trainable, frozen = task_of("flow_alignment", case, pairs, tmp_path, flow={"start_layer": 0})
    moved, metrics = updated(task, trainable, frozen)
    assert moved and {path.rsplit("/", 1)[1] for path in moved} == {"lora_b"}
    assert metrics["attention_kl"] > 0 and metrics["answer_kl"] > 0


def test_rows_of_the_tower_are_split_and_what_tells_of_tokens_is_everywhere(loaded, pairs):
    case = case_of(loaded("qwen2_5_vl"), pairs)
    mesh = AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))
    split, whole = PartitionSpec(placement.ROWS), PartitionSpec()
    found = jax.tree.map(lambda sharding: sharding.spec, placement.of_batch(case.batch, mesh))
    assert found["images"] == found["chosen"]["tokens"] == found["chosen"]["axes"] == split
    assert found["geometry"] == {"coordinates": split, "valid": split, "order": whole}
    parts = Batches(case.rows, case.encoder, 4, 1)(0)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 3), parts)
    found = jax.tree.map(lambda sharding: sharding.spec, placement.of_batch(stacked, mesh, 3))
    assert found["images"] == PartitionSpec(None, placement.ROWS) and found["geometry"]["order"] == whole


def test_lengths_count_the_tokens_of_every_picture(loaded, pairs):
    model = loaded("qwen2_5_vl")
    encoder = Encoder(model.processor, model.config)
    with pytest.raises(LVLMError, match=r"rows are longer than 40 tokens, first 0 with \d+; set too_long='drop'"):
        rows_of(pairs, encoder.pair, encoder, 40, "error")
    kept = rows_of(pairs, encoder.pair, encoder, 40, "drop")
    assert [row.id for row in kept] == ["1"]


def test_errors_name_the_row(loaded, pairs, tmp_path):
    encoder = Encoder(loaded("qwen2_5_vl").processor, loaded("qwen2_5_vl").config)
    Image.new("RGB", (600, 2)).save(tmp_path / "narrow.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    narrow = Pair((tmp_path / "narrow.png",), [user("?", 1)], "a", "b", "7")
    with pytest.raises(LVLMError, match="row 7: .*aspect ratio"):
        encoder.pair(narrow)
    with pytest.raises(LVLMError, match="row 8: image .* is not a picture"):
        encoder.pair(dataclasses.replace(narrow, images=(tmp_path / "bad.png",), id="8"))
    with pytest.raises(LVLMError, match=r"row 9 \(chosen\): it has 2 image placeholders for 1 images"):
        encoder.pair(dataclasses.replace(pairs[2], chosen="<|image_pad|>", id="9"))


def test_pictures_that_are_read_anew_with_each_question_teach_one_answer_a_row(loaded, pairs):
    encoder = Encoder(loaded("instructblip").processor, loaded("instructblip").config)
    first = [*pairs[2].prompt, assistant("a cat")]
    again = Conversation(pairs[2].images, [*first, user("Red?", 0), assistant("yes")], "5")
    with pytest.raises(LVLMError, match="row 5 has 2 answers about its pictures, which instructblip reads anew"):
        encoder.conversation(again)
    row = encoder.conversation(dataclasses.replace(again, messages=first))
    batch = assemble(encoder, [row], [0], shape_of([row], encoder, 1))
    # The Q-Former reads the question, and never the answer.
    prompt = encoder.processor.qformer_tokenizer("What?")["input_ids"]
    words, mask = batch["geometry"]["words"], batch["geometry"]["mask"]
    np.testing.assert_array_equal(words[0, mask[0]], prompt)


def run_config(model, pairs, folder, **changes):
    """The configuration of a run of one step over the pairs that have pictures."""
    data = folder / "pairs.jsonl"
    pair_files.write_pairs(data, [pair for pair in pairs if pair.images])
    config = pair_sets.config(data, **{"recipe": "capl", "method": "capl", "length": 2048} | changes)
    config.model, config.steps, config.optimizer.peak = str(model.folder), 1, 1e-2
    return config


def test_a_run_that_cannot_begin_says_why(loaded, pairs, tmp_path):
    config = run_config(loaded("llava_next"), pairs, tmp_path, length=50)
    with pytest.raises(LVLMError, match="3 of 3 rows are longer than 50 tokens, first 0 with"):
        finetune.train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_with_adapters_from_one_end_to_the_other(loaded, pairs, tmp_path):
    model = loaded("qwen2_5_vl")
    config = run_config(model, pairs, tmp_path, batch=2)
    config.loop.workers = 1  # batches come from another process
    base, merged = flatten(model.params), flatten(trained(config, tmp_path).params)
    moved = {path for path, leaf in base.items() if not np.array_equal(merged[path], leaf)}
    assert moved == {path for path in base if "language_model/layers_" in path and "_proj/kernel" in path}
    adapter = LVLM.from_pretrained(model.folder, adapter=tmp_path / "run" / "adapter")
    conversation = pairs[0].conversation()
    np.testing.assert_allclose(
        adapter.logits(conversation),
        LVLM.from_pretrained(tmp_path / "run" / "export").logits(conversation),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.slow
def test_a_run_of_full_fine_tuning_with_held_out_rows(loaded, pairs, tmp_path):
    """The tower and the connector, in parts, against log-probabilities that were computed before."""
    model = loaded("glm4v")
    config = run_config(model, pairs, tmp_path, batch=2, accumulate=2, lora={"enabled": False})
    config.preference.reference, config.train = "precomputed", r"^(vision_tower|connector)/"
    config.validation, config.loop.workers = config.data, 0
    base, after = flatten(model.params), flatten(trained(config, tmp_path).params)
    moved = {path for path, leaf in base.items() if not np.array_equal(after[path], leaf)}
    assert {path.split("/")[0] for path in moved} == {"vision_tower", "connector"}
    assert all(np.isfinite(leaf).all() for leaf in after.values())


def trained(config, folder):
    """The exported model of a run in `folder / "run"`."""
    return LVLM.from_pretrained(finetune.train(config, folder / "run"))
