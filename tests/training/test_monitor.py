import re
import sys
from types import SimpleNamespace

import jax
import numpy as np

from lvlm_jax.journal import progress
from lvlm_jax.training import monitor

SHOWN = {"objective": 0.6931, "tokens_per_second": 12345.6, "mfu": 0.4321}


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_weights_that_every_token_meets():
    decoder = {"layers_0": {"mlp": {"up_proj": {"kernel": leaf(10, 20)}}}, "norm": {"scale": leaf(10)}}
    frozen = {"vision_tower": {"fc": {"kernel": leaf(50, 50)}}, "connector": {"kernel": leaf(9, 9)}}
    tied = {"embed_tokens": {"embedding": leaf(100, 10)}}
    untied = tied | {"lm_head": {"kernel": leaf(10, 100)}}
    for head in (tied, untied):
        whole = {"language_model": decoder | head}
        assert monitor.flops_per_token(whole, frozen) == 6 * (200 + 10 + 1000)
    adapter = {"language_model": {"layers_0": {"mlp": {"up_proj": {"lora_a": leaf(10, 2), "lora_b": leaf(2, 20)}}}}}
    with_adapter = monitor.flops_per_token(adapter, frozen | {"language_model": decoder | untied})
    assert with_adapter == 4 * (1210 + 60) + 2 * 60


def test_the_pace_is_per_step_and_per_second(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    pace = monitor.Pace(1e9, [SimpleNamespace(device_kind="NVIDIA H200")] * 2)
    for _ in range(4):
        clock[0] += 0.5
        pace.count(1000)
    found = pace.read(clock[0])
    assert found["seconds_per_step"] == 0.5 and found["tokens_per_second"] == 2000
    np.testing.assert_allclose(found["mfu"], 1e9 * 2000 / (2 * 989e12))
    assert pace.read(clock[0]) == {}  # nothing was done since
    clock[0] += 9.0
    pace.restart(clock[0])
    clock[0] += 1.0
    pace.count(0)
    assert pace.read(clock[0]) == {"seconds_per_step": 1.0}
    # Read late, with the next step done meanwhile: that one's time is its own.
    clock[0] += 3.0
    pace.count(0)
    assert pace.read(clock[0] - 2.0) == {"seconds_per_step": 1.0}
    pace.count(0)
    assert pace.read(clock[0]) == {"seconds_per_step": 2.0}


def test_tokens_are_those_of_every_array_of_that_name():
    batch = {"images": np.zeros(9), "chosen": {"tokens": np.zeros((2, 3))}, "rejected": {"tokens": np.zeros((2, 5))}}
    assert monitor.token_count(batch) == 16


def test_loss_speed_and_use_are_shown_in_a_bar_and_without_a_terminal_in_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with monitor.Monitor(tmp_path, "capl", start=0, steps=2) as watch:
        watch.show(SHOWN)
        watch.advance()
    shown = capsys.readouterr().err
    assert re.match(r"capl: 1 of 2, .* left, loss 0.6931, tokens/s 12346, MFU 43.2%\n", shown) and "\r" not in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with monitor.Monitor(tmp_path, "capl", start=0, steps=4) as watch:
        watch.advance()
        watch.show(SHOWN)
    shown = capsys.readouterr().err
    assert "capl" in shown and "loss=0.6931, tokens/s=12346, MFU=43.2%" in shown


def test_rewinding_a_log_leaves_whole_records_only(tmp_path):
    """A line that is not UTF-8, was cut, or is of a later step goes; records of other tasks stay."""
    log = tmp_path / "log.jsonl"
    lines = [b'{"stage": "dpo", "step": 2}\n', b'{"stage": "\xe8po", "step": 3}\n', b'{"stage": "dpo", "step": 3}\n']
    log.write_bytes(b"".join(lines) + b'{"stage": "sft", "step": 9}\n{"stage": "d')
    monitor.rewind(log, "dpo", 2)
    assert log.read_bytes() == lines[0] + b'{"stage": "sft", "step": 9}\n'
