"""Measures a training step, DPO with LoRA: tokens a second and peak memory, beside the same step in torch with peft.

    python tools/bench_train.py --size pocket --batch 8 --runs 9 --out bench_train.json
    python tools/bench_train.py --size 0.5b --batch 1 --runs 5
    python tools/bench_train.py --size 7b --dtype bfloat16 --batch 4 --length 1024        on an accelerator

A step: policy and reference (the same weights without the adapters) score both answers of each pair, all rows of the
same length and with one image; the sigmoid loss; its gradient in the adapters of all decoder projections; clipping;
AdamW. Tokens are those of both answers' rows, image tokens included.

torch gets the same weights, adapters, pairs, loss and optimizer, and the same savings as this library: the vision tower
runs once for a pair, and logits are computed only at answer tokens. The comparison is on a CPU in float32. Each side
has a process of its own, and they step in turns, because shared machines drift. Every figure is the median of --runs
steps with their minimum and maximum; ratios are taken turn by turn. The losses of all steps must agree within 1e-4, or
the exit code is 1. On a CPU, memory is that of the whole process: `resident_bytes` before the first step, with
libraries and weights, and `peak_bytes` during the steps. `program_bytes` is the peak of our step according to the
compiler.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import sys
import tempfile

import bench_parts
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lvlm_jax import compilation, models, weights
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.files import write_whole
from lvlm_jax.parallel.peaks import peak_flops
from lvlm_jax.training import monitor, optimizer, pairwise
from lvlm_jax.training.data.pair_batches import PAIR
from lvlm_jax.training.step import State, make_step
from lvlm_jax.version import __version__
from lvlm_jax.weights import lora, parts, peft
from lvlm_jax.weights.tables import flatten, unflatten

BETA = 0.1
ALPHA_OVER_RANK = 2.0
TOLERANCE = 1e-4  # of losses, in nats
# A constant rate; the fields are those of `training.optimizer`.
ADAMW = dict(steps=1, peak=1e-5, final=1.0, warmup=0, clip=1.0, beta1=0.9, beta2=0.999, weight_decay=0.0)


def command_line(words: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = common.Parser(prog="tools/bench_train.py", description=__doc__)
    parser.add_argument("--size", choices=("pocket", *bench_parts.SIZES), default="pocket",
                        help="model, as in tools/bench.py (default pocket)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of products and frozen weights; adapters are float32 (default float32)")  # fmt: skip
    parser.add_argument("--batch", type=common.number(int, 1), default=4, metavar="N",
                        help="pairs per step (default 4)")  # fmt: skip
    parser.add_argument("--length", type=common.number(int, 1), metavar="N",
                        help="tokens per row: the image's, 48 of the prompt, and the answer's "
                        "(default: the image's and 128)")  # fmt: skip
    parser.add_argument("--rank", type=common.number(int, 1), default=16, metavar="N",
                        help="rank of the adapters (default 16)")  # fmt: skip
    parser.add_argument("--runs", type=common.number(int, 1), default=5, metavar="N",
                        help="timed steps per figure, after one untimed step (default 5)")  # fmt: skip
    parser.add_argument("--against", choices=("peft", "none"),
                        help="what to compare with (default: peft on a CPU in float32, else none)")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="file to which the JSON is also written")
    arguments = parser.parse_args(words)
    if arguments.against == "peft" and arguments.dtype != "float32":
        raise LVLMError("the comparison with peft is in float32; leave --dtype or --against peft out")
    return arguments


def problem(arguments: argparse.Namespace) -> tuple[object, dict, dict, dict]:
    """(config, adapters, frozen, batch); the same for the same arguments on the same platform.

    The adapters' matrices B are random too. If they were 0, policy and reference would be equal, and the loss would be
    the same whether or not a program is correct.
    """
    params, config = bench_parts.model_of(arguments.size, arguments.dtype)
    adapters, frozen = lora.attach_adapters(
        params, arguments.rank, ALPHA_OVER_RANK * arguments.rank, lora.TARGETS, 0.0, jax.random.key(0)
    )
    rng, drawn = np.random.default_rng(1), flatten(adapters)
    for path, leaf in drawn.items():
        if path.endswith("/lora_b"):
            drawn[path] = jnp.asarray(0.01 * rng.standard_normal(leaf.shape), jnp.float32)
    return config, unflatten(drawn), frozen, random_pairs(config, arguments.batch, arguments.length)


def random_pairs(config, count: int, length: int | None) -> dict:
    """A batch like those of `training.pair_batches`, whose rows have no padding: text, image, text, answer.

    Raises:
        LVLMError: `length` leaves no token for an answer, or exceeds the model's context.
    """
    (before, after), image = bench_parts.TEXT_TOKENS, config.tokens_per_image
    prompt = before + image + after
    length = image + 128 if length is None else length
    if not prompt < length <= config.text.max_position_embeddings:
        raise LVLMError(
            f"length is {length}; expected more than the {prompt} tokens of image and prompt, and at most the context "
            f"of {config.text.max_position_embeddings}"
        )
    rng, words = np.random.default_rng(0), bench_parts.words_of(config)
    tokens = rng.choice(words, (count, length))
    tokens[:, before : before + image] = config.image_token_id
    image_id = (tokens == config.image_token_id).astype(np.int32)
    columns = np.broadcast_to(np.arange(prompt, length, dtype=np.int32), (count, length - prompt))
    side = config.vision.image_size
    batch = {
        "images": rng.standard_normal((count, 3, side, side)).astype(np.float32),
        "ids": np.arange(count, dtype=np.int32),
        "weight": np.ones(count, np.float32),
    }
    for name in PAIR:
        own = tokens.copy()
        own[:, prompt:] = rng.choice(words, columns.shape)
        answers = np.broadcast_to(np.arange(length) >= prompt, tokens.shape)
        batch[name] = {"tokens": own, "answers": answers, "image_id": image_id, "columns": columns}
    return batch


class Ours:
    """The step of `train.py`, ready to be timed."""

    def __init__(self, arguments: argparse.Namespace, folder: pathlib.Path):
        config, adapters, frozen, batch = problem(arguments)
        scorer = pairwise.Scorer(models.build(config, jnp.dtype(arguments.dtype)), None, image_count=1)
        settings = {"loss": "sigmoid", "beta": BETA, "label_smoothing": 0.0}
        objective = functools.partial(pairwise.metrics, scorer, settings)
        transformation = optimizer.make(ConfigDict(ADAMW))
        self.state, self.rest = State.create(adapters, transformation), (frozen, jax.device_put(batch))
        step = make_step(objective, {"preference": 1.0}, transformation)
        self.program = step.lower(self.state, *self.rest).compile()
        device, count = jax.devices()[0], 2 * batch[PAIR[0]]["tokens"].size
        self.about = {
            "platform": device.platform,
            "machine": bench_parts.machine(),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(frozen)),
            "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(adapters)),
            "length": batch[PAIR[0]]["tokens"].shape[1],
            "answer_tokens": batch[PAIR[0]]["columns"].shape[1],
            "tokens": count,
            "flops": monitor.flops_per_token(adapters, frozen) * count,
            "peak_flops": peak_flops(device.device_kind),
            "program_bytes": bench_parts.program_bytes(self.program),
            "versions": {"jax": jax.__version__},
            "resident_bytes": reset_peak(),
        }

    def step(self) -> tuple[float, float]:
        """Seconds and loss of a step."""
        seconds, (self.state, metrics) = bench_parts.seconds(lambda: self.program(self.state, *self.rest))
        return seconds, float(metrics["objective"].value)

    def peak_bytes(self) -> int:
        """Peak bytes on the device; on a CPU, of the process since it was set up."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or peak_bytes()


class Peft:
    """The same step in torch, from the files that `prepare` wrote, ready to be timed."""

    def __init__(self, arguments: argparse.Namespace, folder: pathlib.Path):
        import peft
        import torch
        import transformers

        self.torch = torch
        base = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
        with np.load(folder / "batch.npz") as arrays:
            self.pixels = torch.from_numpy(arrays["images"])
            self.tokens = torch.from_numpy(np.concatenate([arrays[name] for name in PAIR]).astype(np.int64))
            self.answer = int(arrays["answer"])
        self.image_token = base.config.image_token_id
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        betas = ADAMW["beta1"], ADAMW["beta2"]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=ADAMW["peak"], betas=betas, eps=1e-8, weight_decay=ADAMW["weight_decay"]
        )
        versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
        self.about = {"versions": versions, "threads": torch.get_num_threads(), "resident_bytes": reset_peak()}

    def step(self) -> tuple[float, float]:
        """Seconds and loss of a step."""
        return bench_parts.seconds(self._step)

    def _step(self) -> float:
        torch = self.torch
        with torch.no_grad():
            embeddings = self._embeddings()
            with self.model.disable_adapter():
                reference = self._logps(embeddings)
        chosen, rejected = (self._logps(embeddings) - reference).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, ADAMW["clip"])
        self.optimizer.step()
        return loss.item()

    def _embeddings(self):
        """Embeddings of all rows, chosen answers first; each image is encoded once."""
        model = self.model.get_base_model()
        pictures = self.torch.cat(list(model.get_image_features(self.pixels).pooler_output)).repeat(2, 1)
        embedded = model.get_input_embeddings()(self.tokens)
        return embedded.masked_scatter((self.tokens == self.image_token)[..., None], pictures)

    def _logps(self, embeddings):
        """Log-probability of each row's answer."""
        mask = self.torch.ones_like(self.tokens)
        logits = self.model(
            inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=self.answer + 1, use_cache=False
        ).logits[:, :-1]
        targets = self.tokens[:, -self.answer :, None]
        return logits.log_softmax(dim=-1).gather(2, targets)[..., 0].sum(dim=1)

    def peak_bytes(self) -> int:
        """Peak bytes of the process since it was set up."""
        return peak_bytes()


def prepare(arguments: argparse.Namespace, folder: pathlib.Path) -> None:
    """Writes weights, adapters and pairs for torch."""
    config, adapters, frozen, batch = problem(arguments)
    whole = flatten(parts.join(adapters, frozen))
    base = {path: leaf for path, leaf in whole.items() if "/lora_" not in path}
    weights.save_checkpoint(folder / "model", unflatten(base), config)
    peft.save_adapter(folder / "adapter", unflatten(whole), config)
    tokens = {name: batch[name]["tokens"] for name in PAIR}
    answer = batch[PAIR[0]]["columns"].shape[1]
    np.savez(folder / "batch.npz", images=batch["images"], answer=answer, **tokens)


def reset_peak() -> int:
    """Resets the recorded peak memory (only possible on Linux); returns the bytes that this process holds now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, such as a compiler's
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The largest resident size of this process since `reset_peak`."""
    status = pathlib.Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(kind: str, arguments: argparse.Namespace, folder: pathlib.Path, pipe) -> None:
    """The main function of a process: answers requests from the pipe, until the request is "peak"."""
    # Programs that XLA's CPU backend loads from the persistent cache run slower.
    os.environ[compilation.SWITCH] = "0"
    try:
        if kind == "prepare":
            pipe.send(prepare(arguments, folder))
            return
        runner = {"ours": Ours, "peft": Peft}[kind](arguments, folder)
        pipe.send(runner.about)
        while pipe.recv() == "step":
            pipe.send(runner.step())
        pipe.send(runner.peak_bytes())
    except LVLMError as error:
        pipe.send(error)


class Worker:
    """A process that runs `serve`; its first message is in `about`."""

    def __init__(self, kind: str, arguments: argparse.Namespace, folder: pathlib.Path):
        context = multiprocessing.get_context("spawn")  # a forked process would inherit the state of a started JAX
        self._pipe, theirs = context.Pipe()
        self._kind = kind
        self._process = context.Process(target=serve, args=(kind, arguments, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.about = self._answer()

    def ask(self, what: str):
        """The process's answer to "step" or "peak"."""
        self._pipe.send(what)
        return self._answer()

    def _answer(self):
        try:
            message = self._pipe.recv()
        except EOFError as error:
            self._process.join()
            raise LVLMError(
                f"the process of {self._kind} ended with code {self._process.exitcode}; its last words are above "
                "(-9: out of memory, give a smaller --batch or --length)"
            ) from error
        if isinstance(message, LVLMError):
            raise message
        return message


def measure(arguments: argparse.Namespace) -> dict:
    """All figures that the command reports."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        workers = {"ours": Worker("ours", arguments, folder)}
        about = workers["ours"].about
        on_cpu = about["platform"] == "cpu"
        if arguments.against == "peft" and not on_cpu:
            raise LVLMError(
                f"the comparison with peft is on a CPU, and this is {about['machine']}; give --against none, or set "
                "JAX_PLATFORMS=cpu"
            )
        if arguments.against == "peft" or (arguments.against is None and on_cpu and arguments.dtype == "float32"):
            Worker("prepare", arguments, folder)
            workers["peft"] = Worker("peft", arguments, folder)
        timed = {kind: [] for kind in workers}
        for _ in range(arguments.runs + 1):
            for kind, worker in workers.items():
                timed[kind].append(worker.ask("step"))
        peaks = {kind: worker.ask("peak") for kind, worker in workers.items()}

    result = {name: getattr(arguments, name) for name in ("size", "dtype", "batch", "rank", "runs")}
    result |= {name: about[name] for name in ("parameters", "trained_parameters", "length", "answer_tokens")}
    for kind, steps in timed.items():
        durations = [seconds for seconds, _ in steps[1:]]
        result[kind] = {
            "seconds": bench_parts.summary(durations, 4),
            "tokens_per_s": bench_parts.summary([about["tokens"] / seconds for seconds in durations], 1),
            "resident_bytes": workers[kind].about["resident_bytes"],
            "peak_bytes": peaks[kind],
            "losses": [loss for _, loss in steps],
        }
    ours = result["ours"] | {"program_bytes": about["program_bytes"]}
    if about["peak_flops"] and arguments.dtype == "bfloat16":  # the known peaks are those of bfloat16
        # As train.py logs it: without the FLOPs of the reference, the tower and the products QKᵀ and PV.
        shares = [about["flops"] / seconds / about["peak_flops"] for seconds, _ in timed["ours"][1:]]
        ours["mfu"] = bench_parts.summary(shares, 4)
    result["ours"] = ours
    if "peft" in timed:
        both = list(zip(timed["ours"], timed["peft"], strict=True))
        apart = max(abs(one - other) for (_, one), (_, other) in both)
        result |= {
            "speed_over_peft": bench_parts.summary([theirs / own for (own, _), (theirs, _) in both[1:]], 3),
            "peak_over_peft": round(peaks["ours"] / peaks["peft"], 3),
            "largest_loss_difference": apart,
            "losses_agree": bool(apart <= TOLERANCE),
        }
        result["peft"]["threads"] = workers["peft"].about["threads"]
    versions = {"lvlm_jax": __version__, "python": platform.python_version()}
    for worker in workers.values():
        versions |= worker.about["versions"]
    return result | {
        "machine": about["machine"],
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": "python tools/bench_train.py " + " ".join(sys.argv[1:]),
    }


def main(words: list[str]) -> int:
    """Measures, prints the JSON and writes it where `--out` says. Returns 1 if the losses do not agree."""
    arguments = command_line(words)
    figures = measure(arguments)
    report = json.dumps(figures, indent=2)
    print(report)
    if arguments.out:
        write_whole(arguments.out, report + "\n")
    if "losses_agree" not in figures:
        return 0
    says = "agree" if figures["losses_agree"] else "do NOT agree"
    print(
        f"losses {says}: at most {figures['largest_loss_difference']:.1e} apart over {arguments.runs + 1} steps",
        file=sys.stderr,
    )
    return 0 if figures["losses_agree"] else 1


if __name__ == "__main__":
    common.run(main)
