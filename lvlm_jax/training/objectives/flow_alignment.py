"""Flow-alignment training: trains the effect of SEVI (arXiv 2505.14257) into the weights.

SEVI mixes the attention logits z of heads that look elsewhere with those of heads that look where visual information
has flowed (`methods.sevi`). At inference, SEVI needs explicit attention and is not available in other software. Here
the edited model is the teacher, and the student is the same model without any edit:

    L = 1/R Σ_t Σ_l Σ_h KL(sg softmax(ẑ_lht) ‖ softmax(z_lht))  +  μ 1/R Σ_t KL(sg p̂_t ‖ p_t)

t: the R rows of the batch that predict an answer token. During generation, SEVI edits exactly these rows (the
    prompt's last row and every decoded one), so one pass over prompt and answer sees what generation would.
l, h: layers that SEVI edits, and the heads that the current stage moves. Stage 1 moves heads outside the semantic
    heads (toward the global heads' mean); stage 2 moves global heads (toward the core heads' maximum). The sum is not
    divided by their number, so a row with more misplaced heads has more weight.
z, ẑ: the student's own attention logits over the columns that the row sees, and SEVI's edit of them (both stages);
    sg: no gradient.
p̂, p: next-token distributions of the teacher, which is the base model under the whole edit, and of the student.

Samples without an image have no moved heads, and neither have rows before a conversation's last image: there only the
second term acts, and keeps the student close to the base. Answers only select the rows to compare; a wrong answer is
not imitated, because both terms are divergences of distributions.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from lvlm_jax.attention.each_row import map_rows
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.sevi import SEVI, Moved, aligned
from lvlm_jax.training import forward, loop
from lvlm_jax.training.data import flow_data
from lvlm_jax.training.data.pair_batches import CONVERSATION, Encoder
from lvlm_jax.training.data.pair_files import Conversation
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.registry import Check, Objective, one_of
from lvlm_jax.training.samples import Samples
from lvlm_jax.weights import parts

STAGES = (1, 2)
(SEQUENCE,) = CONVERSATION
BASE = "base"  # in the frozen part: the trained parameters before training, unless adapters are trained


class Flow(NamedTuple):
    """Sums over edited layers, heads and answer rows, per sample and stage; the student's layers accumulate them.

    Attributes:
        divergence: KL(edited ‖ own attention) of the heads that the stage moves, in nats.
        moved: number of heads that the stage moves.
    """

    divergence: Float[Array, "B 2"]
    moved: Float[Array, "B 2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnswerRows(Method):
    """The rows of right-padded samples that predict answer tokens, edited by SEVI.

    Attributes:
        sevi: the edit.
        index: the rows of each sample; an index past the last row selects none.
    """

    sevi: SEVI
    index: Int[Array, "B A"]

    rows: ClassVar[str] = "all"
    by_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, sevi: SEVI, sequence: forward.Sequence, **more: Any) -> "AnswerRows":
        """The answer rows of a sequence of `forward`, in which row t predicts token t + 1."""
        columns = sequence["columns"]
        strengths = jax.tree.map(jnp.asarray, sevi)  # as for every method inside a compiled program
        return cls(strengths, jnp.where(columns > 0, columns - 1, sequence["tokens"].shape[1]), **more)

    def active(self, layer, num_layers, phase):
        return self.sevi.active(layer, num_layers, phase)

    def edit(
        self, site, logits: Float[Array, "B H T S"]
    ) -> tuple[Float[Array, "B H A S"], Float[Array, "B H A S"], Moved, Bool[Array, "B A S"]]:
        """Of the rows in `index`: logits; edited logits without gradient; moved heads; visible columns.

        The values of rows that are not in the site are arbitrary; see `places`.
        """
        own, visible = self.take_rows(site, logits)
        fixed = jax.lax.stop_gradient(own)
        edited, moved = aligned(fixed, visible, site.after_image, self.sevi.omega, self.sevi.kappa)
        return own, edited, moved, visible

    def take_rows(self, site, logits: Float[Array, "B H T S"]) -> tuple[Float[Array, "B H A S"], Bool[Array, "B A S"]]:
        """The logits of the rows in `index`, and the columns that these rows see."""
        places = self.places(site)
        own = jnp.take_along_axis(logits, places[:, None, :, None], axis=2, mode="clip")
        return own, jnp.take_along_axis(site.mask, places[:, :, None], axis=1, mode="clip")

    def places(self, site) -> Int[Array, "B A"]:
        """Indices in the site of the rows in `index`; for rows outside the site, an index past the last row."""
        rows, place = site.row_index.shape[0], self.index - site.row_index[0]
        return jnp.where((place >= 0) & (place < rows), place, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher(AnswerRows):
    """Edits the rows in `index` by SEVI, in one pass and as generation does token by token (`attention.each_row`)."""

    def logits(self, site, logits):
        own, visible = self.take_rows(site, logits)
        post_image = jnp.take_along_axis(site.post_image, self.places(site), axis=1, mode="clip")
        rows = dataclasses.replace(site, logits=own, mask=visible, post_image=post_image)
        edited = map_rows(self.sevi.logits, rows, own, columns=self.index, carry_axis=None)

        def put(rows: Float[Array, "H T S"], index: Int[Array, " A"], new: Float[Array, "H A S"]) -> jax.Array:
            return rows.at[:, index].set(new, mode="drop")

        return jax.vmap(put)(logits, self.places(site), edited)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Student(AnswerRows):
    """Changes nothing; its carry is a `Flow`: how far the attention of the rows in `index` is from SEVI's.

    Attributes:
        weight: weight of each row; 0 if `index` selects no row.
    """

    weight: Float[Array, "B A"]

    def begin(self, context, embeddings):
        zeros = jnp.zeros((embeddings.shape[0], len(STAGES)), jnp.float32)
        return Flow(zeros, zeros)

    def statistics(self, site, weights):
        own, edited, moved, visible = self.edit(site, site.logits)
        weight = jnp.where(self.places(site) < site.row_index.shape[0], self.weight, 0)
        heads = jnp.stack([stage[..., 0] for stage in moved], axis=-1) * weight[:, None, :, None]
        divergence = kl_divergence(edited, own, visible[:, None])[..., None] * heads
        return Flow(divergence.sum(axis=(1, 2)), heads.sum(axis=(1, 2)))

    def observe(self, site, weights):
        return jax.tree.map(jnp.add, site.carry, self.over_all_rows(site, weights))


def kl_divergence(
    target: Float[Array, "*R S"], logits: Float[Array, "*R S"], mask: Bool[Array, "*#R S"] | None = None
) -> Float[Array, "*R"]:
    """KL(softmax(target) ‖ softmax(logits)) in nats over the last axis, restricted to `mask`."""
    if mask is not None:
        floor = jnp.finfo(jnp.float32).min
        target, logits = jnp.where(mask, target, floor), jnp.where(mask, logits, floor)
    target_logprobs, logprobs = jax.nn.log_softmax(target), jax.nn.log_softmax(logits)
    terms = jnp.exp(target_logprobs) * (target_logprobs - logprobs)
    return (terms if mask is None else jnp.where(mask, terms, 0)).sum(axis=-1)


def with_base(trainable: Mapping, frozen: Mapping) -> dict:
    """The frozen part, with copies of the parameters that training will change.

    The teacher needs them: with new adapters, the frozen part is the complete base model. Without adapters, the
    frozen part is incomplete. If training continues from an adapter, the teacher has that adapter too.
    """
    return {**frozen, BASE: jax.tree.map(jnp.copy, trainable)}


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The objective and its evaluation, on batches of conversations (`pair_batches`) with `stage` Int[B] added.

    Attributes:
        module: the model.
        sevi: the teacher's edit.
        mu: weight of the second term; at 0 the teacher never runs.
    """

    module: nn.Module
    sevi: SEVI
    mu: float

    @property
    def terms(self) -> dict[str, float]:
        """The metrics to minimise, with weights."""
        return {"attention_kl": 1.0} | ({"answer_kl": self.mu} if self.mu else {})

    def objective(self, trainable: Mapping, frozen: Mapping, batch: Mapping, key: jax.Array | None) -> dict[str, Mean]:
        """The terms over a batch, in nats per answer token, and further metrics. Pure.

        Args:
            trainable, frozen: the two parts of the parameters; the latter may be from `with_base`.
            key: PRNG key of the adapters' dropout; None to disable it.

        Returns:
            attention_kl: divergence of the heads that the sample's stage moves, summed over edited layers and heads.
            answer_kl, agreement: KL(teacher ‖ student) of answer tokens, and the share of them with the same most
                likely token; only if `mu` is above 0.
            moved_1, moved_2: share of the heads (in edited layers and answer rows) that each stage would move.
        """
        base, params = _models(trainable, frozen)
        rngs = None if key is None else {"dropout": key}
        pictures, base_pictures = self._pictures(trainable, params, base, batch, rngs)
        logits, flow, weight = self._student(params, pictures, batch, rngs)
        current = jnp.take_along_axis(flow.divergence, batch["stage"][:, None] - 1, axis=1)
        metrics = {"attention_kl": Mean(current.sum(), weight.sum())} | self._shares(flow, weight)
        if self.mu:
            metrics |= compared(self._teacher(base, base_pictures, batch), logits, weight)
        return metrics

    def measure(self, trainable: Mapping, frozen: Mapping, batch: Mapping) -> dict[str, Mean]:
        """Compares student and base with the teacher on held-out answers; means per answer token as in `objective`.

        Returns:
            answer_kl, agreement, moved_1, moved_2: as in `objective`, of the student.
            attention_kl_1, attention_kl_2: the student's first term in either stage.
            base_answer_kl, base_agreement: the same figures of the base model before training, without the edit.
        """
        base, params = _models(trainable, frozen)
        pictures, base_pictures = self._pictures(trainable, params, base, batch)
        teacher = self._teacher(base, base_pictures, batch)
        logits, flow, weight = self._student(params, pictures, batch)
        plain, _ = self._answers(base, base_pictures, batch, None)
        divergence = flow.divergence.sum(axis=0)
        return {
            **compared(teacher, logits, weight),
            **{f"base_{name}": mean for name, mean in compared(teacher, plain, weight).items()},
            **{f"attention_kl_{stage}": Mean(divergence[stage - 1], weight.sum()) for stage in STAGES},
            **self._shares(flow, weight),
        }

    def _pictures(
        self, trainable: Mapping, params: dict, base: dict, batch: Mapping, rngs: forward.Rngs = None
    ) -> tuple[jax.Array, jax.Array]:
        """Image tokens for the student and for the base: the same, unless training changes how images are encoded."""
        own = forward.image_tokens(self.module, params, batch, rngs)
        alike = trainable.keys() <= {"language_model"}
        return own, own if alike else forward.image_tokens(self.module, base, batch)

    def _student(
        self, params: dict, pictures: jax.Array, batch: Mapping, rngs: forward.Rngs = None
    ) -> tuple[Float[Array, "B A V"], Flow, Float[Array, "B A"]]:
        """Logits of the answer tokens, the attention's `Flow`, and the weight of the tokens."""
        weight = (batch[SEQUENCE]["columns"] > 0) * batch["weight"][:, None]
        logits, flow = self._answers(
            params, pictures, batch, Student.of(self.sevi, batch[SEQUENCE], weight=weight), rngs
        )
        return logits, flow, weight

    def _teacher(self, base: dict, pictures: jax.Array, batch: Mapping) -> Float[Array, "B A V"]:
        return self._answers(base, pictures, batch, Teacher.of(self.sevi, batch[SEQUENCE]))[0]

    def _answers(
        self,
        params: dict,
        pictures: Float[Array, "*N E"],
        batch: Mapping,
        method: AnswerRows | None,
        rngs: forward.Rngs = None,
    ) -> tuple[Float[Array, "B A V"], Any]:
        """Logits of the answer tokens, and the method's carry."""
        sequence = batch[SEQUENCE]
        embeddings = forward.embed(self.module, params, sequence["tokens"], pictures)
        image_id, axes = sequence["image_id"], sequence.get("axes")
        decoded = forward.decode(self.module, params, image_id, embeddings, method, rngs=rngs, axes=axes)
        logits, _, _ = forward.answer_logits(self.module, params, decoded.hidden[0], sequence, rngs)
        return logits, decoded.carries[0]

    def _shares(self, flow: Flow, weight: Float[Array, "B A"]) -> dict[str, Mean]:
        text = self.module.config.text
        layers = sum(self.sevi.active(layer, text.num_layers, "prefill") for layer in range(text.num_layers))
        heads = weight.sum() * layers * text.num_heads
        return {f"moved_{stage}": Mean(flow.moved[:, stage - 1].sum(), heads) for stage in STAGES}


def compared(
    teacher: Float[Array, "B A V"], logits: Float[Array, "B A V"], weight: Float[Array, "B A"]
) -> dict[str, Mean]:
    """`answer_kl` and `agreement` between the teacher and a model with these `logits`."""
    same = (teacher.argmax(axis=-1) == logits.argmax(axis=-1)).astype(jnp.float32)
    return {
        "answer_kl": Mean((kl_divergence(teacher, logits) * weight).sum(), weight.sum()),
        "agreement": Mean((same * weight).sum(), weight.sum()),
    }


def _models(trainable: Mapping, frozen: Mapping) -> tuple[dict, dict]:
    """The parameters of the base, and those of the student."""
    rest = {name: part for name, part in frozen.items() if name != BASE}
    return parts.join(frozen.get(BASE, {}), rest), parts.join(trainable, rest)


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`; generated answers are stored in the folder `answers` of `workdir`."""
    alignment = _alignment(model, module, config.flow)

    def read_data(path: str) -> list[Conversation]:
        longest = min(config.length, model.config.text.max_position_embeddings - 1)
        return flow_data.read(path, model, alignment.sevi, longest, config.batch, workdir / "answers")

    kind, example = "prompts or conversations", "prompts.jsonl"
    samples = Samples.read(model, config, read_data, Encoder.conversation, kind, example)
    result = samples.task(
        alignment.objective,
        alignment.terms,
        lambda trainable, frozen, batch, _: alignment.measure(trainable, frozen, batch),
    )
    total = config.steps or result.source.steps(config.epochs)
    return dataclasses.replace(
        result,
        source=flow_data.Staged(result.source, config.flow.stage, total),
        evaluate=result.evaluate and _with_ratio(result.evaluate),
    )


def _alignment(model: LVLM, module: nn.Module, settings: ConfigDict) -> Alignment:
    sevi = SEVI(omega=settings.omega, kappa=settings.kappa, start_layer=settings.start_layer)
    sevi.active(0, model.config.text.num_layers, "prefill")  # raises for layers that the model does not have
    return Alignment(module, sevi, float(settings.mu))


def _with_ratio(measured: Callable[[Any, Any], dict[str, Mean]]) -> Callable[[Any, Any], dict[str, Mean]]:
    """Adds `closer` to `measured`: the base's `answer_kl` divided by the student's."""

    def evaluate(trainable: Any, frozen: Any) -> dict[str, Mean]:
        metrics = measured(trainable, frozen)
        base, own = metrics["base_answer_kl"].total, metrics["answer_kl"].total
        return metrics | {"closer": Mean(base / jnp.maximum(own, jnp.finfo(jnp.float32).tiny), jnp.ones(()))}

    return evaluate


OBJECTIVE = Objective(
    "flow_alignment",
    task,
    section="flow",
    defaults={
        "stage": "both",
        "omega": 4.0,  # the teacher is SEVI, here in its focused setting
        "kappa": 0.2,
        "start_layer": 4 / 32,
        "mu": 1.0,
    },
    docs={
        "stage": "which heads are trained: 1, 2 or both",
        "omega": "SEVI's omega: weight of the better heads",
        "kappa": "SEVI's kappa: share of a head's attention to text on one token that makes a core head",
        "start_layer": "SEVI's start_layer: first edited layer, as a share of the depth",
        "mu": "weight of the divergence of answer tokens",
    },
    checks=(
        one_of("stage", flow_data.STAGES),
        Check("mu", "a weight of at least 0", lambda value: 0 <= value < math.inf),
    ),
    with_base=with_base,
)
