"""tools/bench_train.py: its arguments, its pairs, and one small comparison."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lvlm_jax.errors import LVLMError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_train  # noqa: E402

VISION, TEXT = SimpleNamespace(image_size=8), SimpleNamespace(vocab_size=40, max_position_embeddings=100)
CONFIG = SimpleNamespace(image_token_id=4, tokens_per_image=6, vision=VISION, text=TEXT)
PROMPT = sum(bench_train.bench_parts.TEXT_TOKENS) + CONFIG.tokens_per_image


def test_arguments_that_cannot_be():
    for words, message in (
        ("--size 3b", "invalid choice: '3b'"),
        ("--batch 0", "0 is out of range"),
        ("--rank 0", "0 is out of range"),
        ("--against peft --dtype bfloat16", "the comparison with peft is in float32"),
        ("--tokens 5", "--tokens is not a flag of this command"),
    ):
        with pytest.raises(LVLMError, match=message):
            bench_train.command_line(words.split())


def test_pairs_share_a_prompt_and_differ_in_the_answer():
    batch = bench_train.random_pairs(CONFIG, count=3, length=PROMPT + 5)
    assert batch["images"].shape == (3, 3, 8, 8) and batch["weight"].tolist() == [1] * 3
    chosen, rejected = (batch[name] for name in ("chosen", "rejected"))
    for sequence in (chosen, rejected):
        np.testing.assert_array_equal(sequence["tokens"] == CONFIG.image_token_id, sequence["image_id"] == 1)
        np.testing.assert_array_equal(np.nonzero(sequence["answers"])[1].reshape(3, 5), sequence["columns"])
    assert (chosen["image_id"].sum(axis=1) == CONFIG.tokens_per_image).all()
    np.testing.assert_array_equal(chosen["tokens"][:, :PROMPT], rejected["tokens"][:, :PROMPT])
    assert (chosen["tokens"][:, PROMPT:] != rejected["tokens"][:, PROMPT:]).any()
    for length in (PROMPT, 101):  # no room for an answer; more than the context
        with pytest.raises(LVLMError, match=f"length is {length}; expected more than the {PROMPT} tokens"):
            bench_train.random_pairs(CONFIG, 1, length)


@pytest.mark.slow
def test_both_steps_have_the_same_losses(tmp_path, capsys):
    target = tmp_path / "bench.json"
    words = ["--size", "pocket", "--batch", "1", "--length", "116", "--runs", "1", "--out", str(target)]
    assert bench_train.main(words) == 0
    found = json.loads(target.read_text())
    assert "losses agree" in capsys.readouterr().err
    assert found["losses_agree"] and found["largest_loss_difference"] < 1e-4
    losses = found["ours"]["losses"]
    assert len(losses) == 2 and abs(losses[0] - np.log(2)) > 1e-4  # policy and reference differ
    assert (found["length"], found["answer_tokens"], found["rank"]) == (116, 4, 16)
    for kind in ("ours", "peft"):
        assert found[kind]["tokens_per_s"]["median"] > 0
        assert found[kind]["peak_bytes"] >= found[kind]["resident_bytes"] > 1e8
    assert found["speed_over_peft"]["median"] > 0 and found["peak_over_peft"] > 0
