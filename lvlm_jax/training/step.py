"""The update: the gradient of a weighted sum of means, over one batch or several parts of it, and the optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lvlm_jax.training.losses import Mean

Metrics = dict[str, Mean]
# (trainable, frozen, batch, key) -> metrics; trainable and frozen are disjoint nested dicts of parameters.
Objective = Callable[[Any, Any, Any, jax.Array], Metrics]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes during training."""

    step: Any  # an integer array, or a placeholder while JAX rebuilds a tree
    trainable: Any
    optimizer: optax.OptState

    @classmethod
    def create(cls, trainable: Any, transformation: optax.GradientTransformation) -> "State":
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.int32), trainable, transformation.init(trainable))


def loss(metrics: Metrics, terms: Mapping[str, float], counts: Mapping[str, jax.Array]) -> jax.Array:
    """The loss Σ_k w_k · total_k / count_k over `terms`; a term with count 0 is 0."""
    return sum(weight * Mean(metrics[name].total, counts[name]).value for name, weight in terms.items())


def make_step(
    objective: Objective,
    terms: Mapping[str, float],
    transformation: optax.GradientTransformation,
    seed: int = 0,
    accumulate: int = 1,
    shardings: Any = None,
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """Makes the jitted update: (state, frozen, batch) -> (state, metrics). The state is donated.

    With `accumulate` > 1 every leaf of a batch has a leading axis of that size, and the parts go through the model one
    after the other. Each term is divided by its count over the whole batch, so the gradient equals that of the
    undivided batch even if the parts have different counts. Randomness (dropout) depends only on seed, step and part.

    Args:
        terms: weights of the metrics that are minimised; see `loss`.
        shardings: shardings of the new (state, metrics), as for `jax.jit`; None leaves them to the compiler.

    Returns:
        The update. Its metrics are those that the argument `objective` computes, summed over the parts, and two more:
        `objective` (the loss) and `gradient_norm`.
    """

    def gradient_of(
        trainable: Any, frozen: Any, batch: Any, key: jax.Array, counts: dict | None
    ) -> tuple[Any, Metrics]:
        def part(trainable: Any) -> tuple[jax.Array, Metrics]:
            metrics = objective(trainable, frozen, batch, key)
            return loss(metrics, terms, _counts(metrics, terms) if counts is None else counts), metrics

        return jax.grad(part, has_aux=True)(trainable)

    def accumulated(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[Any, Metrics]:
        parts = (batch, jax.random.split(key, accumulate))
        # Counts do not depend on parameters: this pass's other results are unused, so the compiler drops them.
        every = jax.lax.map(lambda part: _counts(objective(trainable, frozen, *part), terms), parts)
        counts = {name: jax.lax.stop_gradient(count.sum(axis=0)) for name, count in every.items()}

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient_of(trainable, frozen, *part, counts)), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes = jax.eval_shape(gradient_of, trainable, frozen, *first, counts)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            gradient, metrics = gradient_of(state.trainable, frozen, batch, key, None)
        else:
            gradient, metrics = accumulated(state.trainable, frozen, batch, key)
        updates, optimizer = transformation.update(gradient, state.optimizer, state.trainable)
        one = jnp.ones(())
        metrics = metrics | {
            "objective": Mean(loss(metrics, terms, _counts(metrics, terms)), one),
            "gradient_norm": Mean(optax.tree.norm(gradient), one),
        }
        return State(state.step + 1, optax.apply_updates(state.trainable, updates), optimizer), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def _counts(metrics: Metrics, terms: Mapping[str, float]) -> dict[str, jax.Array]:
    return {name: metrics[name].count for name in terms}
