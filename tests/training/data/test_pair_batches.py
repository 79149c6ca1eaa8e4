import collections
import pickle
import types

import jax
import numpy as np
import pytest
from transformers import AutoProcessor

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import tokenizer
from lvlm_jax.processors import answer_tokens
from lvlm_jax.training import monitor
from lvlm_jax.training.data import pair_batches, pair_files
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import PAIR, assemble, in_order, rows_of, shape_of
from lvlm_jax.weights import names
from tests.training.pair_sets import user


def test_padding_is_on_the_right_and_in_buckets(rows, encoder):
    batch = assemble(encoder, rows[:2], range(2), pair_batches.Shape(3, 128, 64, 6))
    assert batch["images"].shape == (6, 3, 28, 28) and batch["chosen"]["columns"].shape == (3, 64)
    for arrays in (batch[name] for name in PAIR):
        used = (arrays["image_id"] >= 0).sum(axis=-1)
        padding = np.arange(128) >= used[:, None]
        assert (arrays["image_id"][padding] == -1).all()
        assert (arrays["tokens"][padding] == encoder.config.pad_token_id).all()
        assert used[2] == 0 and not arrays["answers"][2].any()
    assert batch["weight"].tolist() == [1, 1, 0]
    assert shape_of(rows[1:3], encoder, 2) == pair_batches.Shape(2, 96, 64, 4)
    # The number of pictures is a power of two.
    four = [pair_batches.EncodedRow("", (None,) * 3, {})]
    assert [pair_batches.image_count(some) for some in (rows[:1], rows, four)] == [1, 2, 4]


def test_the_pocket_models_training_text_is_the_same():
    """Its own encoding of conversations and this one agree, and so does which tokens are learned."""
    processor = AutoProcessor.from_pretrained(names.checkpoint("pocket"))
    turns = [("What is this?", "A cat."), ("Where is it? ", "On the left, I think.")]
    messages = tokenizer.conversation_messages(2, turns)
    expected, learned = tokenizer.encode_conversation(processor.tokenizer, 2, turns, 512, image_tokens=1)
    found, last = (
        answer_tokens.encode(processor, (processor.tokenizer.eos_token_id,), messages, last_only=last_only)
        for last_only in (False, True)
    )
    np.testing.assert_array_equal(found.ids, expected)
    np.testing.assert_array_equal(found.answers, learned)
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
    processor.chat_template = "{{ messages | length }}" + LLAVA_HF
    with pytest.raises(LVLMError, match="writes a prompt differently once it is answered"):
        answer_tokens.encode(processor, (), messages[:2], last_only=True)


def test_rows_that_cannot_be_used_are_an_error_or_left_out(pairs, rows, encoder, tmp_path):
    limit = sorted(map(encoder.length, rows))[-2]
    assert [row.id for row in rows_of(pairs, encoder.pair, encoder, limit, "drop")] == list("1245")
    images, prompt = pairs[0].images, pairs[0].prompt
    for given, longest, too_long, message in (
        (pairs, limit, "error", f"1 of 5 rows are longer than {limit} tokens, first 3 with"),
        (pairs, 20, "drop", "5 of 5 rows"),
        (
            [pair_files.Pair(images, prompt, "x" * 200, "y", "z")],
            4096,
            "error",
            r"longer than 95 tokens.*the model's context is 96",
        ),
        (pairs, 95, "cut", "too_long is 'cut'; expected 'error' or 'drop'"),
        (
            [pair_files.Pair(images, [user("<image>?", 1)], "a", "b", "7")],
            95,
            "error",
            r"row 7 \(chosen\): it has 2 image placeholders for 1 images",
        ),
    ):
        with pytest.raises(LVLMError, match=message):
            rows_of(given, encoder.pair, encoder, longest, too_long)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = pair_files.Pair((tmp_path / "bad.png",), [user("?", 1)], "a", "b", "7")
    with pytest.raises(LVLMError, match="row 7: image .* is not in an image format"):
        Batches(rows_of([bad], encoder.pair, encoder, 95, "error"), encoder, batch=1)(0)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(rows, encoder):
    """A batch depends on its number alone."""
    source, other = (Batches(rows, encoder, batch=2, seed=seed) for seed in (3, 4))
    taken = [index for step in range(10) for index in source.order(step)]
    epochs = [taken[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert other.order(0) + other.order(1) != taken[:4]
    assert source.describe(0) == ", ".join(rows[index].id for index in taken[:2])
    assert source(4)["ids"].tolist() == taken[8:10]
    whole, parts = (Batches(rows, encoder, batch=4, accumulate=accumulate)(0) for accumulate in (1, 2))
    assert parts["ids"].reshape(-1).tolist() == whole["ids"].tolist()
    with pytest.raises(LVLMError, match="batch is 4 and accumulate 3"):
        Batches(rows, encoder, batch=4, accumulate=3)


def test_groups_of_alike_lengths(rows, encoder):
    """An epoch has the same rows as without groups, and less padding; a batch depends only on its number."""
    lengths, of_lengths = tuple(np.random.default_rng(0).integers(5, 200, 103)), types.SimpleNamespace(length=int)
    drawn, grouped, again = (Batches(lengths, of_lengths, 8, seed=3, groups=count) for count in (1, 5, 5))
    ends = [0, *map(drawn.steps, (1, 2, 3))]
    for steps in map(range, ends, ends[1:]):
        plain, alike = ([index for step in steps for index in one.order(step)] for one in (drawn, grouped))
        assert collections.Counter(plain) == collections.Counter(alike)
    batches = [[lengths[index] for index in one.order(step)] for one in (drawn, grouped) for step in range(ends[-1])]
    filled = [8 * max(batch) - sum(batch) for batch in batches]
    assert sum(filled[ends[-1] :]) < sum(filled[: ends[-1]]) / 3
    firsts = [max(batch) for batch in batches[ends[-1] :]]
    assert firsts != sorted(firsts) and again.order(17) == grouped.order(17)
    batch = Batches(rows, encoder, batch=2, groups=2)(1)
    found, size = monitor.padding(batch)["padding"], 2 * batch["chosen"]["tokens"].size
    assert found == (size - sum(tokens.length for i in batch["ids"] for tokens in rows[i].sequences.values()), size)


def test_an_evaluation_sees_each_row_once_in_batches_of_one_shape(rows, encoder):
    batches = list(in_order(rows, encoder, 2))
    shapes = [[leaf.shape for leaf in jax.tree.leaves(batch)] for batch in batches]
    assert len(batches) == 3 and shapes[0] == shapes[1] == shapes[2]
    seen = collections.Counter(int(index) for batch in batches for index in batch["ids"][batch["weight"] > 0])
    assert seen == {index: 1 for index in range(5)}
