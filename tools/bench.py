"""Measures prefill, decoding and methods against greedy decoding, transformers and the machine's memory bandwidth.

    python tools/bench.py --size 0.5b --methods cmac --out bench.json
    python tools/bench.py --size 7b --dtype bfloat16 --methods cmac --transformers none
    python tools/bench.py --size 0.5b --quant int8 --methods "" --transformers float32,bfloat16

Weights are random and made on the device. Every figure is the median of `--runs` runs with their minimum and maximum;
what is compared is measured in turns within one run, because shared machines drift. Beside each stands its roofline:

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
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # a clone need not be installed

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import LVLM, cli, methods, models, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import drivers
from lvlm_jax.generation.layout import bucket, lay_out
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.models.pictures import whole_pictures
from lvlm_jax.parallel.programs import weights_read
from lvlm_jax.version import __version__
from lvlm_jax.weights.quantize import QUANTS, quantize

CLIP_LARGE = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14,
)  # fmt: skip
SIZES = {
    # LLaVA-1.5's shape at half a billion decoder parameters, and LLaVA-1.5-7B itself: CLIP ViT-L/14 at 336 pixels in
    # front (576 image tokens), multi-head attention, untied embeddings of 32064 tokens.
    "0.5b": dict(
        model_type="llava", image_token_index=32000, vision_config=CLIP_LARGE,
        text_config=dict(
            model_type="llama", hidden_size=1024, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=16, num_key_value_heads=16, vocab_size=32064, max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
    ),
    "7b": dict(
        model_type="llava", image_token_index=32000, vision_config=CLIP_LARGE,
        text_config=dict(
            model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
    ),
}  # fmt: skip
DTYPES = ("float32", "bfloat16")
TEXT_TOKENS = (8, 40)  # before and after the image, as in a chat template with a question


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(
        prog="tools/bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=("pocket", *SIZES), default="0.5b", help="model (default 0.5b)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and caches")
    parser.add_argument(
        "--quant", choices=("none", *QUANTS), default="none",
        help="of the decoder's kernels; --dtype alone and transformers are measured beside it (default none)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, default=1, help="conversations at once, one image each (default 1)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded in a run (default 32)")
    parser.add_argument("--runs", type=int, default=5, help="runs per figure (default 5)")
    parser.add_argument(
        "--methods", default="cmac", help="names, separated by commas, or all (default cmac; empty for none)"
    )
    parser.add_argument(
        "--transformers", metavar="DTYPES",
        help="float32, bfloat16, both with a comma, or none: its `generate` beside ours (default that of --dtype)",
    )  # fmt: skip
    parser.add_argument("--out", help="write the JSON there too")
    arguments = parser.parse_args(words)
    named = arguments.dtype if arguments.transformers is None else arguments.transformers
    arguments.transformers = [] if named == "none" else named.split(",")
    if unknown := set(arguments.transformers) - set(DTYPES):
        raise LVLMError(
            f"--transformers is {named!r}, with {min(unknown)!r}; expected {', '.join(DTYPES)} or none"
        )
    return arguments


def random_parameters(config, dtype: jnp.dtype) -> dict:
    """Normal weights of deviation 0.02, made on the device; norms are one."""
    leaves, tree = jax.tree.flatten_with_path(models.abstract_parameters(config, dtype))
    draw = jax.jit(lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            jnp.ones(leaf.shape, dtype) if path[-1].key == "scale" else draw(key, leaf.shape)
            for (path, leaf), key in zip(leaves, keys, strict=True)
        ],
    )


def model_of(size: str, dtype: str) -> tuple[dict, object]:
    """Parameters and configuration: the pocket model, or random weights of a size in SIZES."""
    if size == "pocket":
        model = LVLM.from_pretrained(cli.checkpoint("pocket"), dtype=dtype)
        return model.params, model.config
    config = models.config_from_hf(SIZES[size])
    return random_parameters(config, jnp.dtype(dtype)), config


def words_of(config) -> np.ndarray:
    """All tokens but the image's placeholder."""
    return np.setdiff1d(np.arange(config.text.vocab_size, dtype=np.int32), config.image_token_id)


def random_prompt(config, batch: int) -> tuple:
    """Inputs of `batch` conversations with one image each, all alike in length."""
    rng, words = np.random.default_rng(0), words_of(config)
    before, after = TEXT_TOKENS
    rows = [
        np.concatenate(
            [
                rng.choice(words, before),
                np.full(config.tokens_per_image, config.image_token_id),
                rng.choice(words, after),
            ]
        )
        for _ in range(batch)
    ]
    side = config.vision.image_size
    pixels = rng.standard_normal((batch, 3, side, side)).astype(np.float32)
    columns = [np.arange(len(row)) for row in rows]
    inputs = lay_out(
        rows, columns, len(rows[0]), whole_pictures(pixels, config.tokens_per_image), config.image_token_id, 0,
        config.text.max_position_embeddings,
    )  # fmt: skip
    return inputs, np.stack(rows)


def seconds(call) -> tuple[float, object]:
    """How long a call takes until its arrays are ready, and what it returns."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def summary(values: list[float], digits: int = 2) -> dict:
    """Median and range, rounded."""
    rounded = [round(value, digits) for value in values]
    return {"median": round(statistics.median(values), digits), "min": min(rounded), "max": max(rounded)}


def bandwidth(copy: bool) -> float:
    """GB/s of one pass over a gigabyte: read only, or read and written."""
    array = jnp.ones((2**28,), jnp.float32)
    call = jax.jit((lambda x: x + 1) if copy else jnp.sum)
    call(array).block_until_ready()
    typical = statistics.median(seconds(lambda: call(array))[0] for _ in range(5))
    return array.nbytes * (2 if copy else 1) / typical / 1e9


def peak(dtype: str) -> float:
    """GFLOP/s of one large product of matrices, exact to float32 if they are."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((side, side), dtype)
    call = jax.jit(lambda x: jnp.dot(x, x, precision="highest"))
    call(matrix).block_until_ready()
    return 2 * side**3 / statistics.median(seconds(lambda: call(matrix))[0] for _ in range(3)) / 1e9


def program_bytes(compiled) -> int:
    """What a program holds at its peak: arguments, results that are not aliased to them, temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


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

    def prefill(self):
        return drivers.prefill(*self.arguments, **self.options)

    def begin(self, prefilled):
        state, step = prefilled
        keys = sample_keys(0, self.inputs.batch)
        return drivers.begin(
            state, step.combined, self.inputs.tokens, Sampling.of(), keys, self.stop, room=self.room
        )

    def run(self) -> tuple[float, float, np.ndarray]:
        """Milliseconds of the prefill and per decoded token, and the tokens."""
        prefill, prefilled = seconds(self.prefill)
        answers = jax.block_until_ready(self.begin(prefilled))
        decode, answers = seconds(lambda: drivers.run(self.params, self.config, answers, self.limit))
        steps = int(self.limit) - 1
        return prefill * 1e3, decode * 1e3 / steps, np.asarray(answers.tokens)[:, : int(self.limit)]

    def needs(self) -> "Needs":
        """What the compiler says of the prefill and of the decode loop, whose FLOPs are those of one token."""
        prefill = drivers.prefill.lower(*self.arguments, **self.options).compile()
        state, step = self.prefill()
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches))
        answers = self.begin((state, step))
        decode = drivers.run.lower(self.params, self.config, answers, self.limit).compile()
        return Needs(
            max(program_bytes(prefill), program_bytes(decode)),
            sum(leaf.nbytes for leaf in jax.tree.leaves(weights_read(self.params))) + cache,
            prefill.cost_analysis()["flops"],
            decode.cost_analysis()["flops"],
        )


class Needs(NamedTuple):
    """What a way of decoding needs of the machine.

    Attributes:
        peak_bytes: the larger footprint of its two programs.
        moved: bytes of a step, one token of each conversation; a prefill moves as many: weights once, caches once.
        prefill_flops, step_flops: of all operations.
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

    def run(self) -> tuple[float, float, np.ndarray]:
        """Milliseconds of image, prefill and first token together, and per further token; the tokens."""
        first, _ = seconds(lambda: self.generate(1))
        whole, tokens = seconds(lambda: self.generate(self.new_tokens))
        return first * 1e3, (whole - first) * 1e3 / (self.new_tokens - 1), tokens


def measure(arguments: argparse.Namespace) -> dict:
    """All figures of one command."""
    # No persistent compilation cache: programs that XLA's CPU backend loads from one ran 10 to 20 % slower.
    params, config = model_of(arguments.size, arguments.dtype)
    count, wide = sum(leaf.size for leaf in jax.tree.leaves(params)), params
    params = params if arguments.quant == "none" else quantize(params)
    inputs, tokens = random_prompt(config, arguments.batch)
    chosen = [name for name in arguments.methods.split(",") if name]
    if chosen == ["all"]:
        chosen = [
            name for name in methods.names() if name != "opera"
        ]  # a beam search, no decoder to time beside
    runners = {"greedy": Ours(params, config, inputs, None, arguments.new_tokens)}
    if arguments.quant != "none":  # what it is compared with
        runners[arguments.dtype] = Ours(wide, config, inputs, None, arguments.new_tokens)
    for name in chosen:
        # The random model has no tokenizer, so the disturbing instruction is given as token ids.
        method = methods.ICD(tokens=tuple(range(100, 120))) if name == "icd" else methods.get(name)()
        runners[name] = Ours(params, config, inputs, method, arguments.new_tokens)
    theirs = {f"transformers {dtype}": dtype for dtype in arguments.transformers}
    for name, dtype in theirs.items():
        runners[name] = Transformers(wide, config, inputs, tokens, arguments.new_tokens, dtype)
    encode = lambda: drivers.encode_images(params, config, inputs.pixels)  # noqa: E731
    for runner in runners.values():
        runner.run()  # compiles, and warms up
    jax.block_until_ready(encode())

    figures = {name: {"prefill": [], "decode": []} for name in runners}
    encoded, read, copied, peaks = [], [], [], []
    for _ in range(arguments.runs):
        read.append(bandwidth(copy=False))
        copied.append(bandwidth(copy=True))
        peaks.append(peak(arguments.dtype))
        encoded.append(seconds(encode)[0] * 1e3)
        for name, runner in runners.items():
            prefill, decode, generated = runner.run()
            figures[name]["prefill"].append(prefill)
            figures[name]["decode"].append(decode)
            figures[name]["tokens"] = generated

    greedy = figures["greedy"]
    needs = {name: runner.needs() for name, runner in runners.items() if name not in theirs}
    ceilings = statistics.median(read) * 1e6, statistics.median(peaks) * 1e6  # of a millisecond
    result = {
        "size": arguments.size,
        "parameters": count,
        "dtype": arguments.dtype,
        "quant": arguments.quant,
        "batch": arguments.batch,
        "prompt_tokens": tokens.shape[1],
        "new_tokens": arguments.new_tokens,
        "runs": arguments.runs,
        "read_gb_per_s": summary(read),
        "copy_gb_per_s": summary(copied),
        "peak_gflop_per_s": summary(peaks),
        "encode_images_ms": summary(encoded),
        "methods": {},
        "machine": machine(),
        "versions": {"lvlm_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "command": "python tools/bench.py " + " ".join(sys.argv[1:]),
    }
    for name, values in figures.items():
        decode = statistics.median(values["decode"])
        entry = {
            "prefill_ms": summary(values["prefill"], 1),
            "decode_ms_per_token": summary(values["decode"]),
            "tokens_per_s": round(arguments.batch * 1e3 / decode, 2),
        }
        if name in theirs:
            import transformers

            result["versions"] |= {
                "torch": runners[name].torch.__version__,
                "transformers": transformers.__version__,
            }
            entry["prefill_includes_images"] = True
            entry["same_tokens_as_greedy"] = bool((values["tokens"] == greedy["tokens"]).all())
            entry["ours_over_theirs"] = summary(_ratios(values["decode"], greedy["decode"]))
        else:
            need = needs[name]
            entry["peak_bytes"] = need.peak_bytes
            entry["peak_over_greedy"] = round(need.peak_bytes / needs["greedy"].peak_bytes, 3)
            entry["decode_over_greedy"] = summary(_ratios(values["decode"], greedy["decode"]), 3)
            entry["prefill_over_greedy"] = summary(_ratios(values["prefill"], greedy["prefill"]), 3)
            entry["roofline"] = {
                "prefill": roofline(
                    need.moved, need.prefill_flops, *ceilings, statistics.median(values["prefill"])
                ),
                "decode": roofline(need.moved, need.step_flops, *ceilings, decode),
            }
        result["methods"][name] = entry
    achieved = needs["greedy"].moved / statistics.median(greedy["decode"]) / 1e6
    result["decode_gb_per_s"] = round(achieved, 2)
    result["decode_over_read_bandwidth"] = round(achieved / statistics.median(read), 3)
    result["decode_over_copy_bandwidth"] = round(achieved / statistics.median(copied), 3)
    return result


def roofline(moved: float, flops: float, bandwidth: float, peak: float, taken: float) -> dict:
    """What must move and be computed, the least milliseconds for it, and their share in those it took.

    Args:
        bandwidth, peak: bytes and FLOPs of a millisecond.
    """
    least = max(moved / bandwidth, flops / peak)
    return {"bytes": moved, "flops": flops, "least_ms": round(least, 2), "reached": round(least / taken, 3)}


def _ratios(these: list[float], those: list[float]) -> list[float]:
    """Ratios of measurements taken in the same turn."""
    return [a / b for a, b in zip(these, those, strict=True)]


def machine() -> str:
    """The device in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} x {device.device_kind}"
    lines = (
        pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if pathlib.Path("/proc/cpuinfo").exists()
        else []
    )
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def main(words: list[str]) -> int:
    """Measures, prints the JSON and writes it where `--out` says."""
    arguments = parse(words)
    report = json.dumps(measure(arguments), indent=2)
    print(report)
    if arguments.out:
        pathlib.Path(arguments.out).write_text(report + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
