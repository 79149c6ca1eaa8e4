import collections
import pickle

import jax
import numpy as np
import pytest
from transformers import AutoProcessor

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import tokenizer
from lvlm_jax.processors import inputs
from lvlm_jax.training.data import answer_tokens, pair_batches, pair_files
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import Encoder, assemble, in_order, rows_of, shape_of
from lvlm_jax.weights import names
from tests.training import pair_sets
from tests.training.pair_sets import user

STOP = 2  # of the small model's tokenizer


@pytest.fixture(scope="module")
def encoder(model):
    return Encoder(model.processor, model.config)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pair_files.read_pairs(pair_sets.write(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def rows(pairs, encoder):
    return rows_of(pairs, encoder.pair, encoder, longest=95, too_long="error")


def lengths(batch):
    return {name: (batch[name]["image_id"] >= 0).sum(axis=-1) for name in ("chosen", "rejected")}


def test_a_row_is_the_prompt_of_inference_then_the_answer_and_the_stop_token(pairs, rows, encoder):
    batch = assemble(encoder, rows, range(5), shape_of(rows, encoder, 5))
    for index, pair in enumerate(pairs):
        asked = inputs.from_messages(encoder.processor, encoder.config, pair.conversation())
        kept = asked.image_id[0] >= 0
        prompt, image_id = asked.tokens[0, kept], asked.image_id[0, kept]
        for name in pair_batches.PAIR:
            found = {key: array[index] for key, array in batch[name].items()}
            places = np.flatnonzero(found["answers"])
            np.testing.assert_array_equal(found["tokens"][: len(prompt)], prompt)
            np.testing.assert_array_equal(found["image_id"][: len(prompt)], image_id)
            np.testing.assert_array_equal(places, np.arange(len(prompt), lengths(batch)[name][index]))
            np.testing.assert_array_equal(found["columns"][: len(places)], places)
            assert not found["columns"][len(places) :].any()
            text = encoder.processor.tokenizer.decode(found["tokens"][places])
            assert text == f" {getattr(pair, name)}</s>"
    every = [image for pair in pairs for image in pair.images]
    np.testing.assert_array_equal(batch["images"][: len(every)], inputs.pixels_of(encoder.processor, every))
    assert not batch["images"][len(every) :].any()


def test_padding_is_on_the_right_and_in_buckets(rows, encoder):
    batch = assemble(encoder, rows[:2], range(2), pair_batches.Shape(3, 128, 64, 6))
    assert batch["images"].shape == (6, 3, 28, 28) and batch["chosen"]["columns"].shape == (3, 64)
    for name, used in lengths(batch).items():
        arrays = batch[name]
        for row, length in enumerate(used):
            assert (arrays["image_id"][row, length:] == -1).all()
            assert (arrays["tokens"][row, length:] == encoder.config.pad_token_id).all()
        assert used[2] == 0 and not arrays["answers"][2].any()
    assert batch["weight"].tolist() == [1, 1, 0]
    assert shape_of(rows[1:3], encoder, 2) == pair_batches.Shape(2, 96, 64, 4)


def test_the_pocket_models_training_text_is_the_same():
    """Its own encoding of conversations and this one agree, and so does which tokens are learned."""
    processor = AutoProcessor.from_pretrained(names.checkpoint("pocket"))
    turns = [("What is this?", "A cat."), ("Where is it? ", "On the left, I think.")]
    messages = tokenizer.conversation_messages(2, turns)
    expected, learned = tokenizer.encode_conversation(processor.tokenizer, 2, turns, 512, image_tokens=1)
    found = answer_tokens.encode(processor, (processor.tokenizer.eos_token_id,), messages, last_only=False)
    np.testing.assert_array_equal(found.ids, expected)
    np.testing.assert_array_equal(found.answers, learned)
    last = answer_tokens.encode(processor, (processor.tokenizer.eos_token_id,), messages, last_only=True)
    assert processor.tokenizer.decode(last.ids[last.answers]) == " On the left, I think.</s>"


LLAVA_HF = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] %}"
    "{{ '<image>\n' if p['type'] == 'image' else p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_template_without_stop_tokens_gets_one_behind_the_last_answer(encoder):
    processor = pickle.loads(pickle.dumps(encoder.processor))
    processor.chat_template = LLAVA_HF
    messages = tokenizer.conversation_messages(1, [("Who?", "He"), ("Who?", "She")])
    found = answer_tokens.encode(processor, (), messages, last_only=False)
    assert processor.tokenizer.decode(found.ids[found.answers]) == " He She</s>"


def test_a_template_that_writes_the_prompt_otherwise_is_refused(encoder):
    processor = pickle.loads(pickle.dumps(encoder.processor))
    processor.chat_template = "{{ messages | length }}" + LLAVA_HF
    with pytest.raises(LVLMError, match="writes a prompt differently once it is answered"):
        answer_tokens.encode(processor, (), tokenizer.conversation_messages(1, [("Who?", "He")]), last_only=True)


def test_long_rows_are_an_error_or_left_out(pairs, rows, encoder):
    limit = sorted(map(encoder.length, rows))[-2]
    with pytest.raises(LVLMError, match=rf"1 of 5 rows are longer than {limit} tokens, first 3 with"):
        rows_of(pairs, encoder.pair, encoder, limit, "error")
    assert [row.id for row in rows_of(pairs, encoder.pair, encoder, limit, "drop")] == list("1245")
    with pytest.raises(LVLMError, match="5 of 5 rows"):
        rows_of(pairs, encoder.pair, encoder, 20, "drop")
    with pytest.raises(LVLMError, match=r"longer than 95 tokens.*the model's context is 96"):
        long = [pair_files.Pair(pairs[0].images, pairs[0].prompt, "x" * 200, "y", "z")]
        rows_of(long, encoder.pair, encoder, 4096, "error")
    with pytest.raises(LVLMError, match="too_long is 'cut'; expected 'error' or 'drop'"):
        rows_of(pairs, encoder.pair, encoder, 95, "cut")


def test_the_models_own_placeholder_in_a_text_is_refused(pairs, encoder):
    bad = pair_files.Pair(pairs[0].images, [user("<image>?", 1)], "a", "b", "7")
    with pytest.raises(LVLMError, match=r"row 7 \(chosen\): it has 2 image placeholders for 1 images"):
        rows_of([bad], encoder.pair, encoder, 95, "error")


def test_a_picture_that_cannot_be_read_names_its_row(pairs, encoder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = pair_files.Pair((tmp_path / "bad.png",), [user("?", 1)], "a", "b", "7")
    rows = rows_of([bad], encoder.pair, encoder, 95, "error")
    with pytest.raises(LVLMError, match="row 7: image .* is not a picture"):
        Batches(rows, encoder, batch=1)(0)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(rows, encoder):
    source = Batches(rows, encoder, batch=2, seed=3)
    taken = [index for step in range(10) for index in source.order(step)]
    epochs = [taken[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert Batches(rows, encoder, 2, seed=4).order(0) + Batches(rows, encoder, 2, seed=4).order(1) != taken[:4]
    assert source.describe(0) == ", ".join(rows[index].id for index in taken[:2])


def test_a_batch_depends_on_its_number_alone_and_the_source_travels_to_workers(rows, encoder):
    source = Batches(rows, encoder, batch=3, seed=1)
    batch = source(4)
    again = pickle.loads(pickle.dumps(source))(4)
    assert jax.tree.all(jax.tree.map(np.array_equal, batch, again))
    assert batch["ids"].tolist() == source.order(4)


def test_parts_of_a_step_have_one_shape_and_hold_what_the_whole_holds(rows, encoder):
    whole = Batches(rows, encoder, batch=4)(0)
    parts = Batches(rows, encoder, batch=4, accumulate=2)(0)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(parts)} == {2}
    assert parts["ids"].reshape(-1).tolist() == whole["ids"].tolist()
    for part in range(2):
        one = jax.tree.map(lambda leaf, part=part: leaf[part], parts)
        used = [slice(2 * part, 2 * part + 2)]
        for name in pair_batches.PAIR:
            assert (lengths(one)[name] == lengths(whole)[name][used[0]]).all()
        own = sum(len(rows[index].images) for index in one["ids"])
        assert np.abs(one["images"][:own]).sum(axis=(1, 2, 3)).all() and not one["images"][own:].any()
    with pytest.raises(LVLMError, match="batch is 4 and accumulate 3"):
        Batches(rows, encoder, batch=4, accumulate=3)


def test_an_evaluation_sees_each_row_once_in_batches_of_one_shape(rows, encoder):
    batches = list(in_order(rows, encoder, 2))
    shapes = [[leaf.shape for leaf in jax.tree.leaves(batch)] for batch in batches]
    assert len(batches) == 3 and shapes[0] == shapes[1] == shapes[2]
    seen = collections.Counter(int(index) for batch in batches for index in batch["ids"][batch["weight"] > 0])
    assert seen == {index: 1 for index in range(5)}


def test_the_image_count_is_a_power_of_two(rows):
    assert pair_batches.image_count(rows) == 2
    assert pair_batches.image_count(rows[:1]) == 1
    assert pair_batches.image_count([pair_batches.Row("", (None,) * 3, {})]) == 4
