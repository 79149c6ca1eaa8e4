"""Learns the strengths of methods by gradient, with the model frozen.

For a pair of answers, y_w chosen and y_l rejected, with π_s the model under the method with strengths s:

    L(s) = -log σ(β [log π_s(y_w) - log π_s(y_l)]) + λ NLL_s(y_w)

π_s is computed by `generation.forcing`: every row of an answer has the edits of its own decode step, contrast branches
run, and plausibility cuts are soft. NLL is a mean over the tokens of each chosen answer, then over pairs. There is no
reference model. A strength is one number, or has a value per layer, or per layer and head (`learned.per`); a bijection
enforces bounds (`training.strengths`). Strengths without a gradient (counts, thresholds, seeds) stay as they are, and
are refused if requested by name. The result is `method.safetensors`, which `--method learned:FILE` runs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import forcing
from lvlm_jax.journal.record import file_hash
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method, chain
from lvlm_jax.methods.base import FORMS
from lvlm_jax.methods.cuts import soften
from lvlm_jax.methods.fitted import Source, settings_text
from lvlm_jax.methods.learned import Learned, write
from lvlm_jax.methods.parse import method_for
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import multiple_of
from lvlm_jax.training import loop
from lvlm_jax.training.data import columns, pair_files
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import PAIR, EncodedRow, Encoder
from lvlm_jax.training.data.pair_files import Pair
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.preference_losses import per_pair, preferred
from lvlm_jax.training.registry import Check, Objective, one_of
from lvlm_jax.training.samples import Samples
from lvlm_jax.training.strengths import Strengths

ROOM = 16  # answers are padded to a multiple of this many tokens, because every new length compiles a program
FILE = "method.safetensors"


@dataclasses.dataclass(frozen=True)
class PromptedRow(EncodedRow):
    """A row that also has its prompt as chat messages with images, as at inference."""

    conversation: tuple = ()


def prompted_row(encoder: Encoder, pair: Pair) -> PromptedRow:
    """Turns a pair into a row.

    Raises:
        LVLMError: the rejected side has its own images.
    """
    if pair.rejected_images is not None:
        raise LVLMError(f"row {pair.id} has rejected_images; learned_method compares answers about the same images")
    row = encoder.pair(pair)
    return PromptedRow(**{field.name: getattr(row, field.name) for field in dataclasses.fields(row)},
                 conversation=tuple(pair.conversation()))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scored:
    """Batches by step, made in the training process. They contain everything that does not depend on strengths.

    Attributes:
        batches: which rows a step takes.
        model: the frozen model.
        method: the initial method.
    """

    batches: Batches
    model: LVLM
    method: Method

    def __call__(self, step: int) -> dict[str, Any]:
        order = self.batches.order(step)
        return self.of([self.batches.rows[index] for index in order], order, len(order))

    def of(self, rows: Sequence[PromptedRow], ids: Sequence[int], size: int) -> dict[str, Any]:
        """Rows as a batch of `size`; the rest is padding with weight 0."""
        padded = [*rows, *[rows[-1]] * (size - len(rows))]
        prompt = self.model.prepare([list(row.conversation) for row in padded])
        answers = [[_answer(row.sequences[name].tokens()) for name in PAIR] for row in padded]
        longest = max(len(answer) for pair in answers for answer in pair)
        forced = forcing.forced_inputs(
            self.model.params, self.model.config, prompt, self.method, answers, self.model.host,
            multiple_of(ROOM, longest),
        )  # fmt: skip
        weight = np.array([row.weight for row in rows] + [0.0] * (size - len(rows)), np.float32)
        number = np.array([*ids, *[0] * (size - len(rows))], np.int32)
        return {"ids": number, "weight": weight, "opened": forced}

    def steps(self, epochs: float) -> int:
        """See `Batches.steps`."""
        return self.batches.steps(epochs)


def _answer(tokens: Any) -> list[int]:
    """The answer tokens of a sequence, the stop token included."""
    return tokens.ids[tokens.answers].tolist()


def metrics(
    config: FamilyConfig,
    strengths: Strengths,
    settings: Mapping[str, float],
    image_count: int,
    trainable: Any,
    frozen: Any,
    batch: Mapping[str, Any],
    key: jax.Array | None,
) -> dict[str, Mean]:
    """Loss and metrics of a batch. Pure.

    Args:
        settings: `beta` and `softness`.
        trainable: θ, the unbounded numbers from which `Strengths` computes the strengths.
        frozen: the model's parameters.

    Returns:
        Per pair: `preference`, `nll` (of the chosen answer, nats per token), `margin` (log π(y_w) - log π(y_l)),
            `accuracy` (whether the margin is above 0).
    """
    del key
    method = soften(chain(*strengths.members_at(trainable)), settings["softness"])
    nll, margin = likelihoods(frozen, config, batch["opened"], method, image_count)
    metrics_found = {
        "preference": preferred(settings["beta"] * margin),
        "nll": nll,
        "margin": margin,
        "accuracy": (margin > 0).astype(np.float32),
    }
    return {name: per_pair(values, batch["weight"]) for name, values in metrics_found.items()}


def likelihoods(
    params: Any, config: FamilyConfig, forced: forcing.ForcedInputs, method: Method | None, image_count: int
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """NLL of the chosen answers in nats per token, and the margin log π(y_w) - log π(y_l), under a method. Pure."""
    logps = forcing.logprobs(params, config, forced, method, image_count).sum(axis=-1)
    return -logps[:, 0] / forced.in_answer[:, 0].sum(axis=-1), logps[:, 0] - logps[:, 1]


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`."""
    del module, workdir
    samples = Samples.read(model, config, pair_files.read_pairs, prompted_row, "preference pairs", "pairs.jsonl")
    settings, strengths = config.learned, strengths_of(model, config)
    source = Scored(
        Batches(samples.train, samples.encoder, config.batch, 1, config.seed, samples.shares),
        model,
        chain(*strengths.members),
    )
    chosen = {name: float(settings[name]) for name in ("beta", "softness")}
    pure = functools.partial(metrics, model.config, strengths, chosen, samples.image_count)
    judge = _evaluation(pure, strengths, source, samples.held_out) if samples.held_out else None
    terms = {"preference": 1.0} | ({"nll": settings.nll} if settings.nll else {})
    return loop.Task(config.recipe, pure, terms, source, judge, source.batches.describe)


def _evaluation(
    pure: Callable, strengths: Strengths, source: Scored, rows: Sequence[PromptedRow]
) -> Callable[[Any, Any], dict[str, Mean]]:
    """The `evaluate` of the task: the metrics over all rows."""
    score = jax.jit(pure)

    def evaluate(trainable: Any, frozen: Any) -> dict[str, Mean]:
        strengths.refuse_unmoved(jax.device_get(trainable))
        total: dict[str, Mean] = {}
        for first in range(0, len(rows), source.batches.batch):
            chunk = rows[first : first + source.batches.batch]
            batch = source.of(chunk, range(first, first + len(chunk)), source.batches.batch)
            sums = jax.device_get(score(trainable, frozen, batch, None))
            total = {name: total[name] + mean if total else mean for name, mean in sums.items()}
        return total

    return evaluate


def strengths_of(model: LVLM, config: ConfigDict) -> Strengths:
    """The strengths that a run learns.

    Raises:
        LVLMError: there is no such method, or the strengths cannot be learned.
    """
    settings = config.learned
    method = method_for(settings.method, lambda: model.hash, config.model)
    if method is None:
        raise LVLMError("learned.method is 'none'; name a method, or several as in pai+sevi+vaf")
    members = getattr(method, "members", (method,))
    text = model.config.text
    return Strengths.of(members, settings.per, text.num_layers, text.num_heads, columns.words(settings.strengths))


def divide(model: LVLM, config: ConfigDict) -> tuple[Any, Any]:
    """(trainable, frozen): θ of the strengths, and all parameters of the model."""
    return jax.tree.map(jax.numpy.asarray, strengths_of(model, config).start()), model.params


def export(trained: Any, model: LVLM, config: ConfigDict, workdir: Path) -> Path:
    """Writes the learned method into a file; returns its path.

    Raises:
        LVLMError: a strength did not change, or the file cannot be written.
    """
    strengths, theta = strengths_of(model, config), jax.device_get(trained)
    strengths.refuse_unmoved(theta)
    settings = {name: value for name, value in config.learned.items()}
    source = Source(
        "learned",
        model.hash,
        "+".join(file_hash(path) for path in columns.files(config.data)),
        settings_text(settings | {"seed": config.seed, "batch": config.batch, "peak": config.optimizer.peak}),
    )
    write(workdir / FILE, Learned(strengths.members_at(theta), source))
    return workdir / FILE


def _check(config: ConfigDict) -> None:
    if config.lora.enabled or config.train:
        raise LVLMError(
            "learned_method trains strengths and no parameter of the model; set lora.enabled=False, train=''"
        )
    if config.loop.workers:
        raise LVLMError("learned_method makes batches with the model, in its own process; set loop.workers=0")
    if config.accumulate != 1:
        raise LVLMError("learned_method takes a batch in one piece; set accumulate=1 and a smaller batch")
    if config.length_groups != 1:
        raise LVLMError("learned_method takes samples as they are drawn; set length_groups=1")
    if config.loop.answers:
        raise LVLMError("learned_method generates no answers while it learns; set loop.answers=0")
    if max(config.mesh.fsdp, config.mesh.tensor) > 1 or (config.mesh.data not in (1, -1)):
        raise LVLMError("learned_method runs on one device; set mesh.data, mesh.fsdp and mesh.tensor to 1")


OBJECTIVE = Objective(
    "learned_method",
    task,
    section="learned",
    defaults={"method": "pai+sevi+vaf", "per": "layer", "strengths": "", "beta": 0.1, "nll": 1.0, "softness": 1.0},
    docs={
        "method": "the methods whose strengths are learned, written as for --method; given values are the start values",
        "per": "finest form of a strength, if the method allows it: model (one number), layer or head",
        "strengths": "the strengths to learn, as in pai.alpha,omega; empty: all that have a gradient",
        "beta": "factor on the difference of the answers' log-probabilities",
        "nll": "weight of the chosen answer's negative log-likelihood",
        "softness": "softness of plausibility cuts, in nats; towards 0 they become the hard cuts of a generation",
    },
    checks=(
        one_of("per", FORMS),
        Check("beta", "a number above 0, such as 0.1", lambda value: 0 < value < math.inf),
        Check("nll", "a weight of at least 0", lambda value: 0 <= value < math.inf),
        Check("softness", "a number of nats above 0, such as 1.0", lambda value: 0 < value < math.inf),
    ),
    check=_check,
    shared={"lora.enabled": False, "train": "", "mesh.data": 1, "loop.workers": 0, "optimizer.peak": 0.05},
    divide=divide,
    export=export,
)
