"""Measures prefill, decoding and methods against greedy decoding, transformers and the machine's memory bandwidth.

    python tools/bench.py --size 0.5b --methods cmac --out bench.json
    python tools/bench.py --size 7b --dtype bfloat16 --methods cmac --transformers none
    python tools/bench.py --size 0.5b --quant int8 --methods "" --transformers float32,bfloat16

Weights are random and made on the device. Every figure is the median of `--runs` runs with their minimum and maximum.
Compared programs are measured in turns within each run, and each method's tokens right after the same number of
greedy tokens, because shared machines drift. Beside each figure is its roofline:

    least time  =  max(bytes that must move / read bandwidth, FLOPs of the products / peak)

with the weights and caches read once, and both ceilings measured in the same turns.
"""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import sys
import tempfile
from typing import NamedTuple

import bench_parts
import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import LVLM, methods, weights
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import decode_loop
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.planning import products
from lvlm_jax.planning.programs import weights_read
from lvlm_jax.processors.layout import bucket
from lvlm_jax.version import __version__
from lvlm_jax.weights.quantize import QUANTS, quantize

DTYPES = ("float32", "bfloat16")


def command_line(words: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = common.Parser(prog="tools/bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=("pocket", *bench_parts.SIZES), default="0.5b", help="model (default 0.5b)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and caches (default float32)")
    parser.add_argument(
        "--quant", choices=("none", *QUANTS), default="none",
        help="quantize the decoder's kernels; unquantized weights and transformers are measured too (default none)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="conversations at once (default 1)")
    parser.add_argument("--images", type=int, default=1, help="images per conversation (default 1)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded in a run (default 32)")
    parser.add_argument("--runs", type=int, default=5, help="runs per figure (default 5)")
    parser.add_argument("--decodes", type=int, default=1, help="timed decodes after each prefill (default 1)")
    parser.add_argument(
        "--methods", default="cmac", help="names separated by commas, or all; empty for no method (default cmac)"
    )
    parser.add_argument(
        "--transformers", metavar="DTYPES",
        help="dtypes in which transformers' `generate` is measured: float32, bfloat16, both with a comma, or none "
        "(default: that of --dtype)",
    )  # fmt: skip
    parser.add_argument("--out", help="file to which the JSON is also written")
    arguments = parser.parse_args(words)
    dtype = arguments.dtype if arguments.transformers is None else arguments.transformers
    arguments.transformers = [] if dtype == "none" else dtype.split(",")
    if unknown := set(arguments.transformers) - set(DTYPES):
        raise LVLMError(f"--transformers is {dtype!r}, with {min(unknown)!r}; expected {', '.join(DTYPES)} or none")
    return arguments


class Ours:
    """One way of decoding (a method, or None) of this library, ready to be timed."""

    def __init__(self, params: dict, config, inputs, method, new_tokens: int):
        self.params, self.config, self.inputs = params, config, inputs
        self.limit = jnp.int32(new_tokens)
        self.room = bucket(new_tokens)
        self.stop = np.asarray([-1], np.int32)
        model = LVLM(params, config)
        longest = int(inputs.lengths.max())
        self.arguments, self.options = model.prefill_arguments(inputs, method, longest + self.room)
        self.prefilled = None

    def prefill(self):
        return decode_loop.prefill(*self.arguments, **self.options)

    def begin(self, prefilled):
        state, step = prefilled
        keys = sample_keys(0, self.inputs.batch)
        return decode_loop.begin(
            state, step.combined, self.inputs.tokens, Sampling.of(), keys, self.stop, answer_capacity=self.room
        )

    def run(self) -> tuple[float, float, np.ndarray]:
        """Milliseconds of the prefill, milliseconds per decoded token, and the tokens."""
        self.prefilled = None  # its caches would count twice
        prefill, self.prefilled = bench_parts.seconds(self.prefill)
        return prefill * 1e3, *self.decode()

    def decode(self) -> tuple[float, np.ndarray]:
        """Milliseconds per decoded token, and the tokens, after the last prefill."""
        answers = jax.block_until_ready(self.begin(jax.tree.map(jnp.copy, self.prefilled)))
        decode, answers = bench_parts.seconds(lambda: decode_loop.run(self.params, self.config, answers, self.limit))
        return decode * 1e3 / (int(self.limit) - 1), np.asarray(answers.tokens)[:, : int(self.limit)]

    def needs(self) -> "Needs":
        """The compiler's figures for the prefill and for one token of the decode loop."""
        prefill = decode_loop.prefill.lower(*self.arguments, **self.options).compile()
        state, step = self.prefill()
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches))
        answers = self.begin((state, step))
        decode = decode_loop.run.lower(self.params, self.config, answers, self.limit).compile()
        return Needs(
            max(bench_parts.program_bytes(prefill), bench_parts.program_bytes(decode)),
            sum(leaf.nbytes for leaf in jax.tree.leaves(weights_read(self.params))) + cache,
            products.flops_of(prefill),
            products.flops_of(decode),
        )


class Needs(NamedTuple):
    """What one way of decoding needs.

    Attributes:
        peak_bytes: the larger peak of the two programs, prefill and decode loop.
        moved: bytes that a prefill or a step (one token of each conversation) must read: weights and caches, once.
        prefill_flops, step_flops: FLOPs of the matrix products.
    """

    peak_bytes: int
    moved: int
    prefill_flops: float
    step_flops: float


class Transformers:
    """`generate` of transformers on the same weights, ready to be timed."""

    def __init__(self, params: dict, config, inputs, tokens: np.ndarray, new_tokens: int, dtype: str):
        import torch
        from transformers import LlavaForConditionalGeneration

        self.torch, self.new_tokens = torch, new_tokens
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, dtype)
        with tempfile.TemporaryDirectory() as folder:
            weights.save_checkpoint(pathlib.Path(folder) / "model", params, config)
            model = LlavaForConditionalGeneration.from_pretrained(pathlib.Path(folder) / "model", dtype=dtype)
        self.model = model.to(device).eval()
        self.inputs = {
            "input_ids": torch.from_numpy(tokens),
            "attention_mask": torch.ones(tokens.shape, dtype=torch.long),
            "pixel_values": torch.from_numpy(inputs.pixels).to(dtype),
        }
        self.inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}

    def generate(self, count: int):
        with self.torch.no_grad():
            tokens = self.model.generate(
                **self.inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return tokens.cpu().numpy()[:, -count:]

    prefilled = None  # every call begins with the prompt

    def decode(self) -> tuple[float, np.ndarray]:
        """Milliseconds per further token, and the tokens."""
        return self.run()[1:]

    def run(self) -> tuple[float, float, np.ndarray]:
        """Milliseconds to the first token, with image and prefill; milliseconds per further token; the tokens."""
        first, _ = bench_parts.seconds(lambda: self.generate(1))
        whole, tokens = bench_parts.seconds(lambda: self.generate(self.new_tokens))
        return first * 1e3, (whole - first) * 1e3 / (self.new_tokens - 1), tokens


def measure(arguments: argparse.Namespace) -> dict:
    """All figures that the command reports."""
    # No persistent compilation cache: programs that XLA's CPU backend loads from one ran 10 to 20 % slower.
    params, config = bench_parts.model_of(arguments.size, arguments.dtype)
    count, wide = sum(leaf.size for leaf in jax.tree.leaves(params)), params
    params = params if arguments.quant == "none" else quantize(params)
    config = bench_parts.with_context(config, arguments.images)
    inputs, tokens = bench_parts.random_prompt(config, arguments.batch, arguments.images)
    chosen = [name for name in arguments.methods.split(",") if name]
    if chosen == ["all"]:
        # All but OPERA, whose beam search this decode loop does not run, and methods that need a fitted file.
        chosen = [name for name in methods.names() if name != "opera" and not hasattr(methods.get(name), "fitted")]
    runners = {"greedy": Ours(params, config, inputs, None, arguments.new_tokens)}
    if arguments.quant != "none":  # the quantized model is compared with this one
        runners[arguments.dtype] = Ours(wide, config, inputs, None, arguments.new_tokens)
    for name in chosen:
        # The random model has no tokenizer, so the disturbing instruction is given as token ids.
        method = methods.ICD(tokens=tuple(range(100, 120))) if name == "icd" else methods.get(name)()
        runners[name] = Ours(params, config, inputs, method, arguments.new_tokens)
    theirs = {f"transformers {dtype}": dtype for dtype in arguments.transformers}
    for name, dtype in theirs.items():
        runners[name] = Transformers(wide, config, inputs, tokens, arguments.new_tokens, dtype)
    encode = lambda: decode_loop.encode_images(params, config, inputs.pixels)  # noqa: E731
    for name, runner in runners.items():
        runner.run()  # compiles and warms up
        if name != "greedy":
            runner.prefilled = None  # caches of all methods would fill the memory
    jax.block_until_ready(encode())

    figures = {name: {"prefill": [], "decode": [], "greedy decode": []} for name in runners}
    encoded, read, copied, peaks = [], [], [], []
    for _ in range(arguments.runs):
        read.append(bench_parts.bandwidth(copy=False))
        copied.append(bench_parts.bandwidth(copy=True))
        peaks.append(bench_parts.peak(arguments.dtype))
        encoded.append(bench_parts.seconds(encode)[0] * 1e3)
        for name, runner in runners.items():
            prefill, *decoded = runner.run()
            figures[name]["prefill"].append(prefill)
            for turn in range(arguments.decodes):
                decode, generated = runner.decode() if turn else decoded
                near = decode if name == "greedy" else runners["greedy"].decode()[0]
                figures[name]["decode"].append(decode)
                figures[name]["greedy decode"].append(near)
            figures[name]["tokens"] = generated
            if name != "greedy":
                runner.prefilled = None

    greedy = figures["greedy"]
    needs = {name: runner.needs() for name, runner in runners.items() if name not in theirs}
    ceilings = statistics.median(read) * 1e6, statistics.median(peaks) * 1e6  # per millisecond
    result = {
        "size": arguments.size,
        "parameters": count,
        "dtype": arguments.dtype,
        "quant": arguments.quant,
        "batch": arguments.batch,
        "images": arguments.images,
        "prompt_tokens": tokens.shape[1],
        "new_tokens": arguments.new_tokens,
        "runs": arguments.runs,
        "read_gb_per_s": bench_parts.summary(read),
        "copy_gb_per_s": bench_parts.summary(copied),
        "peak_gflop_per_s": bench_parts.summary(peaks),
        "encode_images_ms": bench_parts.summary(encoded),
        "methods": {},
        "machine": bench_parts.machine(),
        "versions": {"lvlm_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "command": "python tools/bench.py " + " ".join(sys.argv[1:]),
    }
    for name, values in figures.items():
        decode = statistics.median(values["decode"])
        entry = {
            "prefill_ms": bench_parts.summary(values["prefill"], 1),
            "decode_ms_per_token": bench_parts.summary(values["decode"]),
            "tokens_per_s": round(arguments.batch * 1e3 / decode, 2),
        }
        if name in theirs:
            import transformers

            result["versions"] |= {"torch": runners[name].torch.__version__, "transformers": transformers.__version__}
            entry["prefill_includes_images"] = True
            entry["same_tokens_as_greedy"] = bool((values["tokens"] == greedy["tokens"]).all())
            entry["ours_over_theirs"] = bench_parts.summary(_ratios(values["decode"], values["greedy decode"]))
        else:
            need = needs[name]
            entry["peak_bytes"] = need.peak_bytes
            entry["peak_over_greedy"] = round(need.peak_bytes / needs["greedy"].peak_bytes, 3)
            entry["decode_over_greedy"] = bench_parts.summary(_ratios(values["decode"], values["greedy decode"]), 3)
            entry["prefill_over_greedy"] = bench_parts.summary(_ratios(values["prefill"], greedy["prefill"]), 3)
            entry["roofline"] = {
                "prefill": roofline(need.moved, need.prefill_flops, *ceilings, statistics.median(values["prefill"])),
                "decode": roofline(need.moved, need.step_flops, *ceilings, decode),
            }
        result["methods"][name] = entry
    achieved = needs["greedy"].moved / statistics.median(greedy["decode"]) / 1e6
    result["decode_gb_per_s"] = round(achieved, 2)
    result["decode_over_read_bandwidth"] = round(achieved / statistics.median(read), 3)
    result["decode_over_copy_bandwidth"] = round(achieved / statistics.median(copied), 3)
    return result


def roofline(moved: float, flops: float, bandwidth: float, peak: float, seconds: float) -> dict:
    """Bytes, FLOPs, the least milliseconds that they take, and these as a share of the measured milliseconds.

    Args:
        bandwidth, peak: bytes and FLOPs per millisecond.
        seconds: the measured time, in milliseconds too.
    """
    least = max(moved / bandwidth, flops / peak)
    return {"bytes": moved, "flops": flops, "least_ms": round(least, 2), "reached": round(least / seconds, 3)}


def _ratios(these: list[float], those: list[float]) -> list[float]:
    """The ratios of measurements that were made in the same turn."""
    return [a / b for a, b in zip(these, those, strict=True)]


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
