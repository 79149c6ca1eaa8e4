"""What the tests of families with a SigLIP tower share: tiny towers and texts, a tokenizer of single bytes, runs."""

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import checkpoints

TEXT = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu_pytorch_tanh",
}


def byte_tokenizer(specials, **roles):
    """A tokenizer without merges: single bytes, then `specials` in order; `roles` names some of them."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=roles,
    )


def padded(rows):
    """Left-padded `input_ids` and `attention_mask` of rows of tokens."""
    length = max(map(len, rows))
    return {
        "input_ids": np.stack([np.pad(row, (length - len(row), 0)) for row in rows]).astype(np.int64),
        "attention_mask": np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64),
    }


def logits_of(theirs, inputs, **more):
    """What transformers says to left-padded arrays, `[B, S, V]`."""
    with torch.no_grad():
        return theirs(**checkpoints.to_torch(inputs | more)).logits.numpy()


def greedy_of(theirs, inputs, tokens, **more):
    """What transformers writes behind left-padded arrays, `[B, tokens]`."""
    with torch.no_grad():
        out = theirs.generate(
            **checkpoints.to_torch(inputs | more), max_new_tokens=tokens, do_sample=False, use_cache=True
        )
    return out.numpy()[:, -tokens:]


def assert_logits_equal(got, want, mask):
    """Equal at the valid tokens of left-padded rows, however long the padding is."""
    assert want.std() > 1
    for row, length in enumerate(mask.sum(axis=1)):
        np.testing.assert_allclose(np.asarray(got[row])[-length:], want[row, -length:], rtol=0, atol=1e-4)


def assert_decode_equals_one_pass(ours, inputs, extend):
    """Cached steps behind a padded prefill against one pass over the longer prompt, which `extend` makes."""
    batch, length = inputs["input_ids"].shape
    forced = np.random.default_rng(7).integers(3, 60, (batch, 4))
    state, step = ours.prefill(ours.prepare(inputs), max_length=length + 8)
    steps = [step.main]
    for column in forced.T:
        state, step = ours.decode(state, column.astype(np.int32))
        steps.append(step.main)
    whole = np.asarray(ours.logits(extend(inputs, forced)))
    np.testing.assert_allclose(np.stack(steps, axis=1), whole[:, -5:], rtol=0, atol=1e-4)


def behind(inputs, tokens):
    """The same left-padded prompts with tokens behind them."""
    more = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    return inputs | {name: np.concatenate([inputs[name], array], axis=1) for name, array in more.items()}
