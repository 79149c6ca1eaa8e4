"""Plans: figures worked out by hand, memory that running jobs hold, the command and its one-line errors."""

import functools
import json
import os

import pytest

from lvlm_jax import methods
from lvlm_jax.planning import compilers, devices, plan
from lvlm_jax.weights import names
from tests.cli.command import run
from tests.parallel.simulated import in_a_process

POCKET = names.checkpoint("pocket")

ALONE = [
    "dpo, adapters",
    "greedy of eight", "cmac", "vcd", "int8", "bfloat16", "sft, all of it", "sft, recomputed", "sft, in parts",
]  # fmt: skip
SPREAD = ["greedy, tensor", "greedy, data", "sft, fsdp", "dpo, fsdp"]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((ALONE, 1), (SPREAD, 2), (SPREAD, 8))]


@pytest.mark.parametrize(("names", "count"), [(["greedy"], 1), *SLOW], ids=["quick", "one", "two", "eight"])
def test_a_plan_is_what_jobs_hold(tmp_path, names, count):
    """The plan of every case's largest program is within a tenth of its real memory on one of several devices."""
    for found in in_a_process("planning.really_held", count, tmp_path, *names, count=count):
        planned, real = (max(found[side].values()) for side in ("plan", "real"))
        print(f"{found['case']}, {count} devices: planned {planned:.0f}, held {real:.0f}: {planned / real - 1:+.1%}")
        assert planned == pytest.approx(real, rel=0.1), found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["answer", "learn"])
def test_a_process_grows_by_what_was_planned(kind):
    (found,) = in_a_process("planning.resident_growth", kind)
    print(f"{kind}: planned {found['plan']:.0f}, grew by {found['real']:.0f}")
    assert found["plan"] == pytest.approx(found["real"], rel=0.1)


@pytest.mark.slow
def test_what_a_device_has_falls_with_their_number():
    """A device has 1/N of parameters, optimizer, cache and FLOPs; over `tensor` for answers, `fsdp` for training."""
    found = in_a_process("parallel.shares", count=8)
    alone = {one["kind"]: one for one in found if one["devices"] == 1}
    for one in found:
        whole = alone[one["kind"]]["share"]
        shares = {part: one["devices"] * size / whole[part] for part, size in one["share"].items()}
        print(one["kind"], one["devices"], {part: round(share, 3) for part, share in shares.items()}, one["total"])
        for part, share in shares.items():
            assert share == pytest.approx(1, rel=0.15), (one["kind"], one["devices"], part)


@pytest.mark.slow
def test_figures_of_llava_7b_by_hand():
    """Of LLaVA-1.5-7B in bfloat16 on one accelerator."""
    name, config, _ = plan.read("7b")
    seven = plan.plan(plan.Job(name, config, mesh=(1, 1, 1)))
    # Decoder: two vocabularies, 32 layers of four attention and three MLP kernels and two norms, the last norm.
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    decoder = 2 * 32064 * 4096 + 32 * layer + 4096
    # Tower: patches, class, positions, norms around 24 layers; connector of two layers with biases.
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    tower = 3 * 14**2 * 1024 + 1024 + 577 * 1024 + 24 * block + 2 * 2 * 1024
    connector = 1024 * 4096 + 4096 + 4096**2 + 4096
    assert seven.parameters == decoder + tower + connector == 7_063_427_072
    decode, prefill = (next(one for one in seven.programs if one.name == name) for name in ("decode", "prefill"))
    # 8 + 576 + 40 tokens and 128 more, each in columns of 64.
    assert decode.contents["cache"] == 32 * 2 * 4096 * 2 * (640 + 128)
    assert decode.contents["parameters"] == 2 * seven.parameters
    # One token meets every kernel of the decoder, and 768 columns of keys and values.
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32064 * 4096
    assert decode.flops == pytest.approx(2 * kernels + 32 * 2 * 2 * 4096 * 768, rel=0.01)
    attended = sum(64 * stop for stop in range(64, 641, 64))  # rows in blocks of 64 see no later block
    rows = 640 * (kernels - 32064 * 4096) + 32064 * 4096 + 32 * 2 * 4096 * attended
    assert prefill.flops == pytest.approx(2 * rows, rel=0.02)
    # A token takes as long as the decoder without its table of embeddings, and the cache, take at 3.35 TB/s.
    read = 2 * kernels + 32 * 2 * 4096 * 2 * 768
    assert seven.seconds(devices.find("h100"))["token"] == pytest.approx(read / 3.35e12, rel=0.01)
    assert devices.find("tpu-v5e").holds(seven.total) and not devices.find("mine=14,1,1").holds(seven.total)


def test_training_under_a_method_and_over_an_int8_base():
    name, config, folder = plan.read(POCKET)
    config = plan.at_depth(config, 1)
    job = plan.Job(name, config, 1, (1, 1, 1), "float32", 2, folder=folder, training=plan.Training("sft"))
    plain, other = (plan.plan(one).largest for one in (job, job.replaced(quant="int8", method=methods.CAPL())))
    kernels = 2 * 4 * config.text.hidden_size**2  # bytes of two of its kernels
    assert other.contents["parameters"] < plain.contents["parameters"] - kernels
    assert other.flops > plain.flops  # of CAPL's sums over images


@pytest.mark.slow
def test_two_depths_say_what_all_layers_say():
    name, config, folder = plan.read(POCKET)
    for training in (None, plan.Training("sft", lora=False)):
        job = plan.Job(name, config, 1, (1, 1, 1), "bfloat16", 4, folder=folder, training=training)
        near, exact = plan.plan(job), plan.plan(job, exact=True)
        assert near.parameters == exact.parameters
        for one, other in zip(near.programs, exact.programs, strict=True):
            assert one.name == other.name
            figures = [[getattr(program, name) for name in ("total", "flops", "moved")] for program in (one, other)]
            assert figures[0] == pytest.approx(figures[1], rel=0.05), one.name


def test_methods_that_edit_some_layers_take_all_layers():
    for method in (None, methods.CMAC(), methods.VCD(), methods.CAPL()):
        assert plan.alike_in_all_layers(method, 32), method
    for method in (methods.SEVI(), methods.EAH(), methods.DoLa(), methods.CLVA()):
        assert not plan.alike_in_all_layers(method, 32), method


@pytest.mark.parametrize(
    ("wanted", "kinds", "there", "target"),
    [
        ("auto", ["cuda", None], ("tpu", "cuda"), "cuda"),
        ("auto", ["tpu"], ("cuda",), "none"),
        ("auto", ["tpu", "cuda"], ("tpu", "cuda"), "none"),
        ("auto", [None], ("tpu", "cuda"), "none"),
        ("none", ["cuda"], ("cuda",), "none"),
        ("tpu", ["tpu", None], ("tpu",), "tpu"),
    ],
)
def test_whose_compiler_plans(monkeypatch, wanted, kinds, there, target):
    monkeypatch.setattr(compilers, "installed", lambda: there)
    assert compilers.chosen(wanted, kinds) == target


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `lvlm plan` in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # which it adds to
    return functools.partial(run, monkeypatch, capsys, "plan")


def test_the_command_prints_a_plan_and_writes_it(command, tmp_path):
    out = tmp_path / "plan.json"
    code, printed, _ = command(
        POCKET, "--compiler", "none", "--method", "cmac", "--device", "h100", "--device", "mine=1,10,1", "--out", out
    )
    assert code == 0
    assert "batch 1, CMAC" in printed and "decode" in printed
    assert "figures by the compiler of CPUs (jaxlib" in printed and "as a stand-in for an accelerator's" in printed
    (found,) = json.loads(out.read_text())["plans"]
    largest = found["programs"][found["largest"]]["bytes"]
    assert found["bytes"] == pytest.approx(sum(largest.values()), abs=9)
    assert found["on"]["h100"]["fits"] and set(found["on"]) == {"h100", "mine"}
    for device in found["on"]:
        assert f"\n  {device}" in printed


@pytest.mark.slow
def test_a_table_has_a_row_for_every_count(command):
    code, printed, _ = command(POCKET, "--table", "--counts", "1", "--objective", "dpo", "--device", "l4")
    assert code == 0
    head, line, row = printed.splitlines()
    assert head.count("|") == line.count("|") == row.count("|")
    assert "s per step, l4" in head and row.startswith("| checkpoint | 1 | 1 x 1 x 1 | 1 |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-model"], "model 'no-such-model' is not known; expected a checkpoint folder"),
        (["7b", "--device", "h1000"], "device 'h1000' is not known; expected one of l4"),
        (["7b", "--device", "mine=1,x,3"], "device 'mine=1,x,3' is malformed"),
        (["7b", "--device", "cpu", "--device", "h100"], "plan for --device cpu alone"),
        (["7b", "--devices", "1", "--tensor", "3"], "does not cover 1 devices"),
        (["7b", "--tensor", "-1"], "give the number of --devices"),
        (["7b", "--prompt-tokens", "500"], "a prompt of 500 tokens is not possible; expected more than 584"),
        (["7b", "--prompt-tokens", "5000"], "less than the context of 4096"),
        (["7b", "--method", "sevi", "--start-layer", "40"], "are none of this model's 32 layers"),
        (["7b", "--method", "opera"], "OPERA is a search"),
        (["7b", "--objective", "ppo"], "objective 'ppo' cannot be planned; expected infer, sft, dpo, capl"),
        (["7b", "--objective", "dpo", "--method", "cmac"], "nothing can be trained under CMAC"),
        (["7b", "--objective", "capl", "--method", "capl"], "capl cannot be trained with CAPL"),
        (["7b", "--objective", "sft", "--quant", "int8", "--full"], "expected adapters"),
        (["7b", "--objective", "dpo", "--batch", "3", "--accumulate", "2"], "a multiple of accumulate"),
        (["7b", "--compiler", "tpu", "--device", "h100"], "does not compile for a device of kind cuda"),
        (["7b", "13b"], "2 models were given; expected one, or --table"),
        (["7b", "--table", "--counts", "8,x"], "--counts is '8,x'"),
        (["7b", "--objective", "sft", "--full", "--train", "nothing"], "matches nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(command, words, message, monkeypatch):
    monkeypatch.setattr(compilers, "installed", lambda: compilers.NAMES)
    code, printed, errors = command(*words)
    assert (code, printed) == (2, "")
    assert message in errors and errors.count("\n") == 1 and errors.startswith("lvlm plan: ")
