"""Continuous batching: the answers of plain batches, whatever shares the batch, from few programs."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lvlm_jax import LVLM, methods
from lvlm_jax.attention import Context
from lvlm_jax.cli import infer
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Question, engine, get
from lvlm_jax.generation import continuous, decode_loop, forward, jobs, scheduler
from lvlm_jax.generation.sampling import Sampling
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.journal.log import seed_of
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import frozen
from tests import checkpoints, small
from tests.small import conversation

LIMIT = 24
SAMPLED = {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.2}
GATED = methods.CMAC(alpha=1.0, variant="code", gate="first")  # a shared prefix, and the gate's memory


@pytest.fixture(scope="module", autouse=True)
def few_columns():
    """Columns for little more than one answer, so that rows are moved often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous, "answer_columns", lambda limit: (64, LIMIT + 4))
        yield


@pytest.fixture(scope="module")
def asked(model):
    """Twelve conversations of one size, every third without a picture."""
    found = [conversation("Eh" + "?" * (i % 3), seed=i if i % 3 else None) for i in range(12)]
    assert {(inputs.tail_rows, inputs.tokens.shape[1]) for inputs in map(model.prepare, found)} == {(16, 64)}
    return found


@pytest.fixture(scope="module")
def stop(model, asked):
    """Tokens that end some greedy answers early."""
    tokens = model.generate(asked, max_new_tokens=LIMIT).tokens
    return [tokens[0][3], tokens[4][9], tokens[5][15]]


def many(model, asked, **settings):
    """The answers of `generate_many` in the order of the conversations; their numbers are the seeds."""
    found = dict(model.generate_many([(one, seed) for seed, one in enumerate(asked)], **settings))
    assert sorted(found) == list(range(len(asked)))
    return [found[number] for number in range(len(asked))]


def assert_equal(outputs, batch):
    for row, output in enumerate(outputs):
        assert output.tokens == [batch.tokens[row]]
        assert output.text == [batch.text[row]] and output.finish_reason == [batch.finish_reason[row]]
        np.testing.assert_allclose(output.logprobs[0], batch.logprobs[row], rtol=0, atol=1e-4)


SLOW = [
    methods.VCD(),
    methods.M3ID(decay=0.05),  # at larger ones rounding grows with its strength
    methods.ICD(tokens=(5, 6, 7)),
    methods.DoLa(layers=(0, 1)),
    methods.SID(start_layer=1, keep=3),
    methods.chain(methods.EAH(), methods.CMAC(alpha=1.0)),
    methods.IAT(alpha=3.0, layers=(0, 1)),  # generated columns begin later in rows that are replaced
    methods.DAMRO(tokens=3),
]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (None, {}),
        (None, SAMPLED),
        (methods.PAI(start_layer=0), {}),  # a second layout
        pytest.param(GATED, {}, marks=pytest.mark.slow),  # quick with other lengths below
        *(pytest.param(method, {}, marks=pytest.mark.slow) for method in SLOW),
    ],
    ids=lambda value: value.label if isinstance(value, Method) else "sampled" if value else "",
)
def test_answers_are_those_of_a_plain_batch(model, asked, stop, method, settings):
    settings = {"method": method, "max_new_tokens": LIMIT, "stop_token_ids": stop} | settings
    batch = model.generate(asked, seed=list(range(len(asked))), **settings)
    assert len({len(tokens) for tokens in batch.tokens}) > 2
    assert_equal(many(model, asked, batch_size=3, **settings), batch)


def test_programs_are_few_and_compiled_once(model, asked, stop, monkeypatch, all_programs_kept):
    settings = {"max_new_tokens": LIMIT, "stop_token_ids": stop, "batch_size": 4}
    moves, compact = [], continuous.compact
    monkeypatch.setattr(continuous, "compact", lambda slots: moves.append(1) or compact(slots))

    def programs():
        jitted = (decode_loop.prefill, continuous.empty, continuous.place, compact)
        return [one._cache_size() for one in jitted] + [continuous.run._cache_size()]

    pictured = [one for number, one in enumerate(asked) if number % 3]  # one kind of prompt
    before = programs()
    first = many(model, pictured * 2, **settings)
    compiled = programs()
    prefills, *others = [now - then for now, then in zip(compiled, before, strict=True)]
    assert prefills <= 1 and others == [1] * 4  # other tests may have prefilled such prompts
    assert len(moves) > 1
    again = many(model, pictured[::-1], **settings)
    assert programs() == compiled
    assert [one.tokens for one in again[::-1]] == [one.tokens for one in first[: len(again)]]


def test_longer_prompts_and_more_images_widen_the_rows(model, stop):
    def two(seed):
        """Two pictures, and words enough for a second bucket of columns."""
        pictures = [conversation("", seed=seed + more)[0]["content"][0] for more in (0, 1)]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": "Both" + "?" * 16}]}]

    asked = [conversation("Eh?", seed=1), conversation("Oh", seed=2), two(3), conversation("Eh", seed=5), two(6)]
    sizes = [(one.tokens.shape[1], one.tail_rows, one.image_count) for one in map(model.prepare, asked)]
    assert set(sizes) == {(64, 16, 1), (96, 32, 2)}
    settings = {"method": GATED, "max_new_tokens": LIMIT, "stop_token_ids": stop}
    outputs = many(model, asked, batch_size=3, **settings)
    assert_equal(outputs, model.generate(asked, **settings))


def test_a_prompt_that_does_not_fit_fails_alone(model, asked, stop):
    settings = {"max_new_tokens": LIMIT, "stop_token_ids": stop}
    mixed = [*asked[:5], conversation("a" * 200), *asked[5:]]
    outputs = many(model, mixed, batch_size=16, **settings)  # sixteen rows take prompts by two
    error = outputs.pop(5)
    assert isinstance(error, LVLMError) and "the model's context is 96" in str(error)
    assert_equal(outputs, model.generate(asked, **settings))


def test_answers_come_when_they_end_and_prompts_go_in_when_there_is_room(model, asked, stop):
    drawn = []

    def requests():
        for number, one in enumerate(asked):
            drawn.append(number)
            yield one, number

    order, ahead = [], []
    settings = {"max_new_tokens": LIMIT, "stop_token_ids": stop, "batch_size": 3}
    for number, _ in model.generate_many(requests(), **settings):
        order.append(number)
        ahead.append(len(drawn) - len(order))
    assert order != sorted(order)
    assert max(ahead) <= 3 + 3  # under way, ended but not handed out, and one laid out in advance


def test_a_limit_of_one_token_and_an_answer_that_stops_at_once(model, asked):
    single = many(model, asked[:5], max_new_tokens=1, batch_size=3)
    assert [len(one.tokens[0]) for one in single] == [1] * 5
    first = [one.tokens[0][0] for one in single]
    stopped = many(model, asked[:5], max_new_tokens=LIMIT, stop_token_ids=first, batch_size=3)
    assert [one.tokens[0] for one in stopped] == [[token] for token in first]
    assert [one.finish_reason for one in stopped] == [["stop"]] * 5


def test_rows_are_written_in_place(model, asked):
    inputs = model.prepare(asked[1:3])
    (params, config, *given), options = model.prefill_arguments(inputs, methods.CMAC(), int(inputs.lengths.max()))
    state, step = jax.eval_shape(lambda *given: forward.prefill(params, config, *given, **options), *given)
    stop, vocabulary = np.asarray([-1], np.int32), step.combined.shape[1]
    slots = jax.eval_shape(lambda state: continuous._empty(state, Sampling.of(), stop, 4, LIMIT, vocabulary), state)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slots.state.caches))
    tokens, numbers = jnp.zeros((2, 64), jnp.int32), jnp.zeros((2,), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    place = continuous.place.lower(slots, state, step.combined, tokens, keys, numbers, numbers)
    place, compact = (one.compile().memory_analysis() for one in (place, continuous.compact.lower(slots)))
    assert place.alias_size_in_bytes >= held and place.temp_size_in_bytes < held
    assert compact.alias_size_in_bytes >= held


def test_a_sliding_window_counts_tokens_and_not_columns():
    def mask(image_id, row):
        context = Context(
            image_id=jnp.asarray([image_id]),
            positions=jnp.zeros((1, 1), jnp.int32),
            first_row=jnp.int32(row),
            image_end=jnp.zeros((1,), jnp.int32),
            phase="decode",
        )
        return np.asarray(context.mask(window=3)[0, 0]).astype(int).tolist()

    assert mask([-1, 0, 0, 0, 0], 4) == [0, 0, 1, 1, 1]
    assert mask([-1, 0, 0, -1, -1, 0, 0, -1], 6) == [0, 0, 1, 0, 0, 1, 1, 0]


@pytest.mark.slow
def test_layers_with_a_sliding_window(tmp_path):
    overrides = dict(checkpoints.VARIETIES["mistral_window"])
    overrides["text"] = overrides["text"] | {"vocab_size": small.IMAGE_TOKEN_ID + 1}
    overrides["vision"] = {}
    checkpoints.make_llava(tmp_path, seed=5, **overrides)
    small.write_processor(tmp_path)
    model = LVLM.from_pretrained(tmp_path)
    assert model.config.text.window(1) is not None
    asked = [conversation("What" + "?" * (i % 5), seed=i if i % 3 else None) for i in range(9)]
    tokens = model.generate(asked, max_new_tokens=LIMIT).tokens
    settings = {"max_new_tokens": LIMIT, "stop_token_ids": [tokens[0][3], tokens[4][9], tokens[5][15]]}
    assert_equal(many(model, asked, batch_size=3, **settings), model.generate(asked, **settings))


@frozen
class Shared(Method):
    """Keeps one number for the whole batch."""

    def start(self, batch):
        return jnp.zeros(())


def test_methods_whose_rows_are_not_their_own_stay_in_batches(model, asked):
    for method, reason in (
        (methods.VISTA(), "VISTA keeps something for a batch"),
        (methods.OPERA(), "OPERA is a search"),
        (methods.CMAC(distort="value_noise"), "CMAC keeps"),
        (methods.chain(methods.EAH(), methods.VISTA()), "EAH . VISTA keeps"),
        (Shared(), "Shared keeps"),
    ):
        with pytest.raises(LVLMError, match=f"continuous batching is not possible: {reason}"):
            next(model.generate_many([(asked[0], 0)], method))
        with pytest.raises(LVLMError, match=f"{reason}.*use the schedule batches"):
            scheduler.use_continuous("continuous", method, None, 512, 8)
        assert not scheduler.use_continuous("auto", method, None, 512, 8)


def test_the_schedule_follows_the_length_of_answers():
    many_hosts = SimpleNamespace(is_multi_process=True, shape={"data": 2, "fsdp": 1})
    assert "over processes" in scheduler.obstacle(None, many_hosts)
    assert not scheduler.use_continuous("auto", None, many_hosts, 512, 8)
    for given, taken in (
        (("auto", methods.CMAC(), None, 512, 8), True),
        (("auto", methods.CMAC(), None, 10, 8), False),
        (("auto", None, None, 512, 1), False),
        (("batches", None, None, 512, 8), False),
        (("continuous", None, None, 10, 1), True),
    ):
        assert scheduler.use_continuous(*given) is taken
    for given, message in (
        (("both", None, None, 10, 8), "schedule is 'both'; expected one of auto, continuous, batches"),
        (("auto", None, None, None, 8), "max_new_tokens is None"),
        (("auto", None, None, 512, "8"), "batch_size is '8'"),
    ):
        with pytest.raises(LVLMError, match=message):
            scheduler.use_continuous(*given)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures in a folder."""
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def stopping(monkeypatch):
    """A twelfth of all tokens ends an answer."""
    tokens = np.arange(12, small.IMAGE_TOKEN_ID, 12, dtype=np.int32)
    monkeypatch.setattr(Decoding, "stops", lambda self, config: tokens)


def test_a_job_writes_the_same_file_by_either_schedule(checkpoint, pictures, stopping, monkeypatch, capsys):
    entries = [{"question_id": i, "image": f"{i % 3}.png", "text": "Eh" + "!" * (i // 3)} for i in range(7)]
    entries[4]["text"] = "a" * 200
    (pictures / "questions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    monkeypatch.chdir(pictures)

    def job(name, schedule):
        words = ["--model", checkpoint, "--question-file", "questions.jsonl", "--answers-file", name]
        words += ["--batch-size", "3", "--max_new_tokens", str(LIMIT), "--schedule", schedule]
        assert infer.main(words) == 2
        assert "1 failed" in capsys.readouterr().out
        return Path(name).read_bytes()

    plain = job("plain.jsonl", "batches")
    assert [json.loads(line)["question_id"] for line in plain.splitlines()] == [0, 1, 2, 3, 5, 6]
    assert len({json.loads(line)["metadata"]["tokens"] for line in plain.splitlines()}) > 1
    assert job("flowing.jsonl", "continuous") == plain
    cut = b"".join(plain.splitlines(keepends=True)[:3]) + b'{"question_id": 3, "te'
    Path("flowing.jsonl").write_bytes(cut)
    assert job("flowing.jsonl", "continuous") == plain


def test_a_job_answers_alike_prompts_together_and_writes_them_in_order(tmp_path):
    texts = ["short", "long" * 40, "brief", "wide" * 40, "tiny", "more" * 40]
    lines = [json.dumps({"question_id": number, "text": text}) for number, text in enumerate(texts)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    batches = []

    def answer(conversations, seeds):
        batches.append(seeds)
        return [jobs.Answer(str(seed), "stop", 1) for seed in seeds]

    arguments = (tmp_path / "questions.jsonl", tmp_path / "answers.jsonl", {})
    jobs.run_job(lambda: answer, *arguments, image_folder=tmp_path, batch_size=3)
    drawn = [seed_of(0, str(number)) for number in range(len(texts))]
    assert batches == [drawn[0::2], drawn[1::2]]
    written = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == [str(seed) for seed in drawn]


def test_the_engine_gets_the_same_answers_by_either_schedule(model, pictures, stopping, tmp_path):
    questions = [Question(i, (pictures / f"{i % 3}.png",), "Eh" + "!" * (i // 3), None, "captions") for i in range(8)]
    protocol = dataclasses.replace(get("pope/strict"), suffix="", max_new_tokens=LIMIT)

    def answers(schedule):
        folder = tmp_path / schedule
        work = engine.Work(3, folder=folder, record={"who": "small"}, schedule=schedule)
        found = engine.ask(model, questions, protocol, work=work)
        rows = [json.loads(line) for line in (folder / "log.0.jsonl").read_text().splitlines()[1:]]
        assert [row["batch"]["prompts"] for row in rows if "batch" in row] == [3, 3, 2]
        return found

    plain = answers("batches")
    assert len({said.tokens for said in plain.values()}) > 1
    assert answers("continuous") == plain
