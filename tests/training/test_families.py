"""Training of every family: batches hold what inference reads, and the answers get the same log-probabilities."""

import dataclasses
import functools
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
from lvlm_jax.training import finetune, pairwise, placement
from lvlm_jax.training.data import pair_files
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import PAIR, Encoder, assemble, rows_of, shape_of
from lvlm_jax.training.data.pair_files import Conversation, Pair, assistant
from lvlm_jax.training.step import State, make_step
from lvlm_jax.weights import lora
from lvlm_jax.weights.tables import flatten
from tests.models.families import FAMILIES
from tests.models.families.qwen_vl import QWEN_VL
from tests.processors import test_qwen_vl as qwen_vl
from tests.slow import named
from tests.training import pair_sets
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
def cases(pairs, model, tmp_path_factory):
    """Gives the case of a family: a tiny random model of it, with a processor."""

    def made(name):
        folder = tmp_path_factory.mktemp(name)
        if name == "llava":
            return model
        if name != "qwen_vl":
            return FAMILIES[name].with_processor(folder)
        QWEN_VL.build(folder, 4, **qwen_vl.TOKENS)
        qwen_vl.write_files(folder)
        return LVLM.from_pretrained(folder)

    return functools.cache(lambda name: Case(made(name), pairs))


class Case:
    """A model, the pairs as its rows, and all of them as one batch."""

    def __init__(self, model, pairs):
        self.model, self.pairs, self.encoder = model, pairs, Encoder(model.processor, model.config)
        self.rows = rows_of(pairs, self.encoder.pair, self.encoder, 2048, "error")
        self.batch = batch_of(self.encoder, self.rows)
        self.logprobs = functools.cache(self._logprobs)

    def scorer(self, method=None):
        return pairwise.Scorer(models.build(self.model.config), method, 2)

    def _logprobs(self, method=None):
        """Per row and answer its tokens' log-probabilities, from the model's logits."""
        found = {}
        for name in PAIR:
            whole = read_by_inference(self, name)
            logprobs = np.asarray(jax.nn.log_softmax(self.model.logits(whole, method)))
            for index, row in enumerate(self.rows):
                count = int(row.sequences[name].answers.sum())
                found[index, name] = logprobs[index, np.arange(-count - 1, -1), whole.tokens[index, -count:]]
        return found


def batch_of(encoder, rows, places=None):
    return assemble(encoder, rows, places or range(len(rows)), shape_of(rows, encoder, len(rows)))


def read_by_inference(case, name):
    """The prompts as `prepare` lays them out, with an answer behind each."""
    prepared = case.model.prepare([pair.conversation() for pair in case.pairs])
    prompts, images = [], []
    for index, row in enumerate(case.rows):
        sequence, kept = row.sequences[name], prepared.image_id[index] >= 0
        answer = sequence.ids[sequence.answers]
        prompts.append(np.append(prepared.tokens[index, kept], answer))
        images.append(np.append(prepared.image_id[index, kept], np.zeros(len(answer))))
    whole = prepared._with_pictures(prepared._rebuilt(prompts, case.model.config.pad_token_id, images))
    columns = np.tile(np.arange(whole.tokens.shape[1]), (len(case.rows), 1))
    return dataclasses.replace(whole, source_columns=columns)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_hold_what_inference_reads(cases, family):
    case = cases(family)
    batch = case.batch
    for name in PAIR:
        arrays, whole = batch[name], read_by_inference(case, name)
        assert case.encoder.length(case.rows[0]) <= arrays["tokens"].shape[1]
        for index, (pair, row) in enumerate(zip(case.pairs, case.rows, strict=True)):
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
            text = case.model.processor.tokenizer.decode(said, skip_special_tokens=True)
            assert text.strip() == getattr(pair, name)
    assert ("axes" in batch["chosen"]) == (whole.grids is not None)
    shown = {"images": whole.pixels} | whole.geometry
    for name, array in ({"images": batch["images"]} | batch.get("geometry", {})).items():
        np.testing.assert_array_equal(array[: len(shown[name])], shown[name])
        assert not array[len(shown[name]) :].any()
    assert len(batch["images"]) % len(case.pairs) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_travels_to_workers_and_its_parts_have_one_shape(cases, family):
    case = cases(family)
    source = Batches(case.rows, case.encoder, 4, 4)
    batch = source(0)
    again = pickle.loads(pickle.dumps(source))(0)
    assert jax.tree.all(jax.tree.map(np.array_equal, batch, again))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {4}
    for part, index in enumerate(batch["ids"][:, 0]):
        alone = batch_of(case.encoder, [source.rows[index]], [index])
        for found, own in zip(jax.tree.leaves(batch), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(found[part][tuple(slice(size) for size in own.shape)], own)
        assert not batch["images"][part][len(alone["images"]) :].any()


def assert_scored(found, mask, expected):
    for (index, name), wanted in expected.items():
        own = np.asarray(found)[index, PAIR.index(name)]
        np.testing.assert_allclose(own[: len(wanted)], wanted, rtol=0, atol=1e-5)
        assert mask[index, PAIR.index(name)].sum() == len(wanted)


# The others are trained by other tests of this file.
trained = pytest.mark.parametrize("family", named(TRAINED, slow=TRAINED[1:]))


@pytest.mark.parametrize(
    ("family", "method"),
    [("qwen2_5_vl", None), ("internvl", None), pytest.param("llava_next", None, marks=pytest.mark.slow),
     ("qwen2_5_vl", CAPL(rho=0.6))],
)  # fmt: skip
def test_answers_have_the_log_probabilities_of_inference(cases, family, method):
    case = cases(family)
    scorer, expected = case.scorer(method), case.logprobs(method)
    score = jax.jit(lambda params, batch: scorer.logprobs(params, batch, scorer.image_tokens(params, batch)))
    assert_scored(*score(case.model.params, case.batch), expected)
    if method:
        plain = case.logprobs(None)
        moved = {index for index, name in expected if np.abs(expected[index, name] - plain[index, name]).max() > 1e-4}
        assert moved == {0}  # two images see each other


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("llava_next", marks=pytest.mark.slow)])
def test_so_they_have_in_parts_of_a_step(cases, family):
    """Each row alone, its pictures filled up to those of the others."""
    case = cases(family)
    score, expected = case.scorer().alone, case.logprobs(None)
    parts = Batches(case.rows, case.encoder, 4, 4)(0)
    scored = jax.jit(lambda params, parts: jax.lax.map(lambda part: score(params, part), parts))
    found = scored(case.model.params, parts)[:, 0]
    places = {index: place for place, index in enumerate(parts["ids"][:, 0])}
    assert_scored(found, found != 0, {(places[index], name): rows for (index, name), rows in expected.items()})


def one_step(recipe, case, folder, **changes):
    """What one step of a recipe on those pairs that have pictures moves, adapters alone; and its metrics."""
    shown, data = [pair for pair in case.pairs if pair.images], folder / "pairs.jsonl"
    pair_files.write_pairs(data, shown)
    task = pair_sets.task(case.model, data, folder, recipe, batch=len(shown), length=2048, **changes)
    trainable, frozen = lora.attach_adapters(case.model.params, 2, 4.0, lora.TARGETS, 0.0, jax.random.key(0))
    before, transformation = jax.tree.map(np.asarray, trainable), optax.sgd(1.0)
    step = make_step(task.objective, task.terms, transformation)
    state, metrics = step(State.create(trainable, transformation), frozen, task.source(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))
    paths = moved(before, state.trainable)
    # The first factor learns once the second, which begins as zero, has moved.
    assert paths and all(path.endswith("lora_b") for path in paths)
    assert recipe == "flow_alignment" or paths == {path for path in flatten(before) if path.endswith("lora_b")}
    return pair_sets.values(metrics)


def moved(before, after):
    after = flatten(after)
    return {path for path, leaf in flatten(before).items() if not np.array_equal(after[path], leaf)}


@trained
def test_a_capl_step(cases, tmp_path, family):
    metrics = one_step("capl", cases(family), tmp_path, method="capl", rho=0.6, nll=1.0)
    assert metrics["preference"] == pytest.approx(np.log(2), abs=1e-6) and metrics["nll"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED)
def test_an_sft_step(cases, tmp_path, family):
    case = cases(family)
    wanted = [case.logprobs(None)[index, "chosen"] for index, pair in enumerate(case.pairs) if pair.images]
    assert one_step("sft", case, tmp_path)["loss"] == pytest.approx(-np.concatenate(wanted).mean(), abs=1e-5)


@pytest.mark.slow
def test_a_step_of_flow_alignment(cases, tmp_path):
    metrics = one_step("flow_alignment", cases("qwen2_5_vl"), tmp_path, flow={"start_layer": 0})
    assert metrics["attention_kl"] > 0 and metrics["answer_kl"] > 0


def test_rows_of_the_tower_are_split_and_what_tells_of_tokens_is_everywhere(cases):
    case = cases("qwen2_5_vl")
    mesh = AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))
    split, whole = PartitionSpec(placement.ROWS), PartitionSpec()
    found = jax.tree.map(lambda sharding: sharding.spec, placement.of_batch(case.batch, mesh))
    assert found["images"] == found["chosen"]["tokens"] == found["chosen"]["axes"] == split
    assert found["geometry"] == {"coordinates": split, "valid": split, "order": whole}
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 3), Batches(case.rows, case.encoder, 4, 1)(0))
    found = jax.tree.map(lambda sharding: sharding.spec, placement.of_batch(stacked, mesh, 3))
    assert found["images"] == PartitionSpec(None, placement.ROWS) and found["geometry"]["order"] == whole


def test_errors_name_the_row(cases, tmp_path):
    case = cases("qwen2_5_vl")
    encoder = case.encoder
    with pytest.raises(LVLMError, match=r"rows are longer than 40 tokens, first 0 with \d+; set too_long='drop'"):
        rows_of(case.pairs, encoder.pair, encoder, 40, "error")
    assert [row.id for row in rows_of(case.pairs, encoder.pair, encoder, 40, "drop")] == ["1"]
    Image.new("RGB", (600, 2)).save(tmp_path / "narrow.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    narrow = Pair((tmp_path / "narrow.png",), [user("?", 1)], "a", "b", "7")
    for bad, message in (
        (narrow, "row 7: .*aspect ratio"),
        (
            dataclasses.replace(narrow, images=(tmp_path / "bad.png",), id="8"),
            "row 8: image .* is not in an image format",
        ),
        (
            dataclasses.replace(case.pairs[2], chosen="<|image_pad|>", id="9"),
            r"row 9 \(chosen\): it has 2 image placeholders for 1 images",
        ),
    ):
        with pytest.raises(LVLMError, match=message):
            encoder.pair(bad)


def test_pictures_that_are_read_again_with_each_question_teach_one_answer_a_row(cases):
    encoder, pair = cases("instructblip").encoder, cases("instructblip").pairs[2]
    first = [*pair.prompt, assistant("a cat")]
    again = Conversation(pair.images, [*first, user("Red?", 0), assistant("yes")], "5")
    with pytest.raises(LVLMError, match="row 5 has 2 answers about its images, which instructblip reads again"):
        encoder.conversation(again)
    batch = batch_of(encoder, [encoder.conversation(dataclasses.replace(again, messages=first))])
    # The Q-Former reads the question, and never the answer.
    words, mask = batch["geometry"]["words"], batch["geometry"]["mask"]
    np.testing.assert_array_equal(words[0, mask[0]], encoder.processor.qformer_tokenizer("What?")["input_ids"])


@pytest.mark.slow
def test_a_run_of_full_fine_tuning_with_held_out_rows(cases, tmp_path):
    """The tower and the connector, in parts, against log-probabilities that were computed before."""
    case, data = cases("glm4v"), tmp_path / "pairs.jsonl"
    pair_files.write_pairs(data, [pair for pair in case.pairs if pair.images])
    held_out = dict(reference="precomputed", train=r"^(vision_tower|connector)/", validation=str(data))
    parts = dict(batch=2, accumulate=2, lora={"enabled": False}, loop={"workers": 1})  # batches of another process
    config = pair_sets.config(data, recipe="capl", method="capl", length=2048, **held_out, **parts)
    config.model, config.steps, config.optimizer.peak = str(case.model.folder), 1, 1e-2
    after = LVLM.from_pretrained(finetune.train(config, tmp_path / "run")).params
    assert {path.split("/")[0] for path in moved(case.model.params, after)} == {"vision_tower", "connector"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
