"""Readers of command lines: every command of `lvlm`, until it would load a model or compile a program."""

import contextlib
import functools
import json
import logging
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from lvlm_jax.cli import main
from lvlm_jax.errors import LVLMError
from tests.fuzz import generators as make
from tests.fuzz.calls import Reached, _reached
from tests.fuzz.engine import Fault, Reader
from tests.fuzz.pictures import PNG
from tests.fuzz.questions import ASKED, benchmark_files, lines, run_files
from tests.fuzz.samples import PAIRS, PROMPTS

# What computes, beside the loading of a model.
COMPUTES = (
    "lvlm.LVLM.from_pretrained", "cli.convert.convert", "planning.plan.plan", "planning.plan.simulate",
    "pocket.benchmark_run.run", "pocket.splits.write_split", "pocket.training.run", "pocket.pairs.write_prompts",
    "pocket.experiment.run", "pocket.balanced.write",
    "cli.preferences.write_prompts", "training.finetune.train", "cli.train.enable_cache", "parallel.start",
    "cli.fit.write_pairs", "verification.run.checks",
)  # fmt: skip
GENERATION = "--temperature 0.5 --top-p 0.9 --top-k 5 --repetition-penalty 1.1 --max-new-tokens 4 --seed 1"
LINES = {
    "infer": (
        f"--image a.png --prompt hi --method cmac --alpha 3 --compare {GENERATION}",
        f"--question-file q.jsonl --image-folder . --answers-file o.jsonl --batch-size 2 --schedule auto {GENERATION}",
        "--prompt hi --stream --system none --quant int8 --dtype float32 --generation-config checkpoint --adapter x",
        "--method eah+cmac --eah-start-layer 1 --image a.png --image a.png --prompt <image><image>?",
    ),
    "attention": ("--method cmac --image a.png --prompt hi --compare vcd --beta-sinks 0.1 --answer yes --out o",),
    "sweep": (
        "--method cmac --grid alpha=0,1 --grid gamma=1,2 --image a.png --prompt hi --out o.jsonl",
        "--method sevi --grid omega=0.5,1 --question-file q.jsonl --image-folder . --limit 2 --batch-size 2 --points 3",
    ),
    "evaluate": (
        "--protocol pope/strict --data pope --rescore pope/said --out o --resamples 5 --partial --seed 1",
        "--protocol pope --data pope --model pocket --method cmac --alpha 2 --controls c --limit 3 --batch-size 4",
        "--protocol mme --data pope --rescore pope/said --group random --model-name x",
        "--list",
    ),
    "report": ("runs --out o --title T --images . --examples 1 --seed 2", "runs --leaderboard o.md"),
    "preferences": (
        "--pairs pairs.jsonl --holdout 0.5 --out o --seed 1",
        "--prompts prompts.jsonl --rho 0.9 --corrector pocket --rejected-by plain --out o --temperature 0.5",
        "--pocket 4 --pocket-single 0.5 --out o",
    ),
    "train": (
        "--config capl --config.data=pairs.jsonl --config.steps=2 --config.optimizer.peak=1e-4 --workdir w",
        "--config sft --config.data=pairs.jsonl --workdir w --no-distributed",
    ),
    "convert": ("pocket out --dtype float16 --scheme hub --max-shard-size 1.5 --overwrite --adapter a --processor p",),
    "plan": (
        "7b --batch 8 --method cmac --alpha 2 --devices 8 --tensor 8 --device h100 --device mine=80,3000,900",
        "7b 13b --table --counts 1,8 --objective sft --full --train x --rank 4 --accumulate 2 --remat --out p.json",
        "config.json --data 2 --fsdp 2 --images 2 --prompt-tokens 100 --new-tokens 10 --quant int8 --dtype bfloat16",
    ),
    "serve": (
        "--model pocket --name x --methods cmac,vcd:alpha=1 --alias a=cmac:alpha=1 --aliases-only --key-file key.txt",
        "--host 127.0.0.1 --port 0 --allow-host x --state s --dtype float32 --quant int8 --generation-config plain",
    ),
    "fit": ("vti --pairs pairs.jsonl --out f.safetensors --model pocket --batch-size 2 --limit 3 --seed 1",),
    "verify": ("pocket --record r.json --methods cmac,vcd --scratch .", "pocket --files-only --methods none"),
    "pocket-world": ("--out o --split test --images 3 --seed 1", "--sample s.png"),
    "pocket-benchmark": ("--methods vcd sevi-focused --images 5 --captions 5 --batch-size 2 --out o --markdown m.md",),
    "pocket-training": (
        "--out o --steps 2 --images 10 --captions 10 --parts capl --config.preference.steps=3 --resamples 5",
    ),
    "pocket-report": ("--images 20 --batch-size 2 --seed 1 --out o",),
}  # fmt: skip


@functools.cache
def files() -> make.Files:
    """The files and folders that the command lines name."""
    pope = {f"pope/{name}": content for name, content in benchmark_files("pope").items()}
    runs = {f"runs/{name}": content for name, content in run_files().items() if name.endswith("scores.json")}
    own = {"q.jsonl": lines(ASKED), "pairs.jsonl": lines(PAIRS[:1]), "prompts.jsonl": lines(PROMPTS)}
    own["key.txt"] = b"secret\n"
    config = {"config.json": json.dumps({"model_type": "llava"}).encode()}
    return {"a.png": PNG, "b.png": PNG, "0.png": PNG, **pope, **runs, **own, **config}


def _is_safe(word: str) -> bool:
    """Whether a word refers to nothing outside the folder and is possible on a command line."""
    value = word.rpartition("=")[2]
    return not any(piece in word for piece in ("\x00", "..")) and not {"/", "~"} & {value[:1], word[:1]}


@st.composite
def command_lines(draw, name: str) -> list[str]:
    """Words in which some are changed, left out, doubled or exchanged."""
    words = draw(st.sampled_from(LINES[name])).split()
    words = draw(make.changed(words, make.texts | make.numbers.map(make.written_json), most=3))
    return [word for word in words if isinstance(word, str) and _is_safe(word)]


@contextlib.contextmanager
def _not_computing() -> Iterator[None]:
    for name in COMPUTES:  # a module that was imported meanwhile would keep the stand-in
        pkgutil.resolve_name(f"lvlm_jax.{name}")
    with contextlib.ExitStack() as stack:
        for name in COMPUTES:
            stack.enter_context(mock.patch(f"lvlm_jax.{name}", _reached))
        stack.enter_context(mock.patch.dict("os.environ", HF_HUB_OFFLINE="1"))
        stack.enter_context(mock.patch.object(sys, "argv", ["lvlm"]))
        stack.enter_context(mock.patch.object(warnings, "formatwarning"))
        filters = list(logging.getLogger("absl").filters)
        try:
            yield
        except Reached:
            pass
        finally:
            logging.getLogger("absl").filters[:] = filters


def command(name: str, words: list[str], folder: Path) -> None:
    make.write(files(), folder)
    with contextlib.chdir(folder), _not_computing():
        printed = sys.stderr.tell()
        try:
            main.run(name, words)
        except SystemExit as error:
            sys.stderr.seek(printed)
            said = sys.stderr.read()
            if error.code == 2:
                _check_error(name, said)
            if error.code != 0:
                raise Fault("traceback", f"exit code {error.code}: {said[:300]}") from None


def _check_error(name: str, said: str) -> None:
    """Raises the error that a command has printed."""
    last = said.splitlines()[-1] if said else ""
    start = f"lvlm {name}: "
    raise LVLMError(last.removeprefix(start)) if last.startswith(start) else Fault("message", said[:300])


def _reader(name: str) -> Reader:
    def read(words: list[str], folder: Path) -> Any:
        return command(name, words, folder)

    return Reader(f"lvlm {name}", command_lines(name), read, 1.0 if len(LINES[name]) > 1 else 0.5)


READERS = tuple(map(_reader, LINES))
