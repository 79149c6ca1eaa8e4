"""Measures tokens per second over batch sizes, on prompts whose answers differ in length.

    python tools/bench_throughput.py --out throughput.json
    python tools/bench_throughput.py --batches 1,8,64 --prompts 256 --method cmac --no-transformers

Every figure covers all work from conversations to texts, including images and prompts, on one set of questions about
drawn scenes. The three ways are plain batches (sorted by length of prompt, each as long as its longest answer),
continuous batching (when an answer ends, the next prompt takes its row), and transformers' `generate` on the plain
batches. They take turns within a run, because shared machines drift; figures are medians with minimum and maximum. A
first pass, which is not timed, compiles and checks whether all ways give the same answers.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import bench_parts
import jax
import numpy as np
from PIL import Image

from lvlm_jax import LVLM, compilation
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import scheduler
from lvlm_jax.generation.questions import conversation, length_class
from lvlm_jax.methods import parse
from lvlm_jax.pocket.conversations import DETAILED_PROMPTS, LIST_PROMPTS, SHORT_PROMPTS
from lvlm_jax.pocket.scenes import render, scene_at
from lvlm_jax.version import __version__

PROMPTS = (*SHORT_PROMPTS, *DETAILED_PROMPTS, *LIST_PROMPTS)
BATCHES = "1,2,4,8,16,32,64"


def command_line(words: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = common.Parser(
        prog="tools/bench_throughput.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="pocket", help="checkpoint folder or hub id (default pocket)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and caches (default float32)"
    )
    parser.add_argument("--method", default="none", help="none, or a method with its own settings (default none)")
    parser.add_argument("--batches", default=BATCHES, help=f"batch sizes separated by commas (default {BATCHES})")
    parser.add_argument("--prompts", type=common.number(int, 1), default=128, help="number of prompts (default 128)")
    parser.add_argument(
        "--max-new-tokens", type=common.number(int, 1), default=128, help="tokens of the longest answer (default 128)"
    )
    parser.add_argument("--runs", type=common.number(int, 1), default=3, help="runs per figure (default 3)")
    parser.add_argument("--no-transformers", action="store_true", help="do not compare with transformers")
    parser.add_argument("--out", help="file to which the JSON is also written")
    return parser.parse_args(words)


def captions(count: int) -> list[tuple[str, list[dict]]]:
    """Prompts about drawn scenes, with their conversations, sorted by length."""
    texts = [PROMPTS[number % len(PROMPTS)] for number in range(count)]
    order = sorted(range(count), key=lambda number: length_class(texts[number]))
    pictures = {number: Image.fromarray(render(scene_at("test", number))) for number in order}
    return [(texts[number], conversation([pictures[number]], texts[number])) for number in order]


class Ours:
    """Plain batches, or continuous batching, of this library: from conversations to answers."""

    def __init__(self, model: LVLM, method, limit: int, continuous: bool):
        self.model, self.continuous = model, continuous
        self.options = {"method": method, "max_new_tokens": limit}

    def __call__(self, conversations: list[list[dict]], batch: int) -> list[list[int]]:
        """The tokens of every answer."""
        if self.continuous:
            requests = ((one, 0) for one in conversations)
            outputs = dict(self.model.generate_many(requests, batch_size=batch, **self.options))
            for output in outputs.values():
                if isinstance(output, LVLMError):
                    raise output
            return [outputs[number].tokens[0] for number in range(len(conversations))]
        return [
            row
            for some, count in in_batches(conversations, batch)
            for row in self.model.generate(some, **self.options).tokens[:count]
        ]


class Transformers:
    """`generate` of transformers with the same checkpoint, on the same plain batches."""

    def __init__(self, model: LVLM, dtype: str, limit: int):
        import torch
        from transformers import AutoModelForImageTextToText

        self.torch, self.ours, self.limit = torch, model, limit
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, dtype)
        theirs = AutoModelForImageTextToText.from_pretrained(model.folder, dtype=self.dtype)
        self.theirs = theirs.to(self.device).eval()
        self.stops = np.asarray(model.config.eos_token_ids)

    def __call__(self, conversations: list[list[dict]], batch: int) -> list[list[int]]:
        """The tokens of every answer."""
        return [row for some, count in in_batches(conversations, batch) for row in self._answers(some)[:count]]

    def _answers(self, conversations: list[list[dict]]) -> list[list[int]]:
        inputs = self.ours.prepare(conversations)
        if inputs.geometry:
            raise LVLMError("transformers are compared for models of whole pictures only; add --no-transformers")
        longest = int(inputs.lengths.max())
        arrays = {
            "input_ids": self.torch.from_numpy(inputs.tokens[:, -longest:]).long(),
            "attention_mask": self.torch.from_numpy(inputs.image_id[:, -longest:] >= 0).long(),
            "pixel_values": self.torch.from_numpy(inputs.pixels).to(self.dtype),
        }
        arrays = {name: tensor.to(self.device) for name, tensor in arrays.items()}
        with self.torch.no_grad():
            tokens = self.theirs.generate(
                **arrays, max_new_tokens=self.limit, do_sample=False, eos_token_id=self.stops.tolist(),
                pad_token_id=self.ours.config.pad_token_id,
            )  # fmt: skip
        return [self._cut(row) for row in tokens[:, longest:].cpu().numpy()]

    def _cut(self, row: np.ndarray) -> list[int]:
        """An answer up to and including its stop token."""
        ends = np.flatnonzero(np.isin(row, self.stops))
        return row[: ends[0] + 1 if len(ends) else None].tolist()


def in_batches(conversations: list[list[dict]], batch: int):
    """Batches of equal size, each with its number of real conversations; copies fill the last batch."""
    for start in range(0, len(conversations), batch):
        some = conversations[start : start + batch]
        yield some + some[-1:] * (batch - len(some)), len(some)


def curve(ways: dict, conversations: list[list[dict]], batches: list[int], runs: int) -> dict:
    """Batch size -> figures of every way to answer the conversations.

    Args:
        ways: name -> function of conversations and a batch size that returns the tokens of every answer. The answers
            of the other ways are compared with those of the first way.
        runs: number of timed runs.
    """
    reference, by_batch = None, {}
    for batch in batches:
        same = {}
        for name, way in ways.items():
            tokens = way(conversations, batch)
            reference = reference or tokens
            same[name] = sum(one == other for one, other in zip(tokens, reference, strict=True)) / len(conversations)
        rates = {name: [] for name in ways}
        for _ in range(runs):
            for name, way in ways.items():
                start = time.perf_counter()
                tokens = way(conversations, batch)
                rates[name].append(sum(map(len, tokens)) / (time.perf_counter() - start))
        by_batch[str(batch)] = {
            name: {"tokens_per_s": bench_parts.summary(values), "same_answers": round(same[name], 4)}
            | {
                f"over_{other}": bench_parts.summary([one / two for one, two in zip(values, rates[other], strict=True)])
                for other in ways
                if other != name
            }
            for name, values in rates.items()
        }
    lengths = [len(row) for row in reference]
    spread = {"median": statistics.median(lengths), "min": min(lengths), "max": max(lengths)}
    return {"answer_tokens": spread | {"all": sum(lengths)}, "batches": by_batch}


def measure(arguments: argparse.Namespace) -> dict:
    """All figures that the command reports."""
    try:
        batches = [int(size) for size in arguments.batches.split(",")]
    except ValueError as error:
        raise LVLMError(f"batches are {arguments.batches!r}; expected numbers, by commas") from error
    method = parse.build_method(arguments.method, arguments)
    why = scheduler.obstacle(method, None)
    if why:
        raise LVLMError(f"continuous batching is not possible: {why}; choose another method")
    # Programs that XLA's CPU backend loads from the persistent cache run slower.
    os.environ[compilation.SWITCH] = "0"
    model = LVLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    limit = arguments.max_new_tokens
    ways = {name: Ours(model, method, limit, name == "continuous") for name in ("batches", "continuous")}
    versions = {"lvlm_jax": __version__, "jax": jax.__version__, "python": platform.python_version()}
    if not arguments.no_transformers:
        import transformers

        ways["transformers"] = Transformers(model, arguments.dtype, limit)
        versions |= {"transformers": transformers.__version__, "torch": ways["transformers"].torch.__version__}
    conversations = [one for _, one in captions(arguments.prompts)]
    return {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "method": arguments.method,
        "prompts": arguments.prompts,
        "max_new_tokens": limit,
        "runs": arguments.runs,
        **curve(ways, conversations, batches, arguments.runs),
        "machine": bench_parts.machine(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": "python tools/bench_throughput.py " + " ".join(sys.argv[1:]),
    }


def main(words: list[str]) -> int:
    """Measures, prints the JSON and writes it where `--out` says."""
    arguments = command_line(words)
    report = json.dumps(measure(arguments), indent=2)
    print(report)
    if arguments.out:
        pathlib.Path(arguments.out).write_text(report + "\n")
    return 0


if __name__ == "__main__":
    common.run(main)
