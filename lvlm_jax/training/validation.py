"""Metrics of a held-out set, on the devices that hold the parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lvlm_jax.training import placement
from lvlm_jax.training.data.pair_batches import Batch, EncodedRow, Encoder, in_order
from lvlm_jax.training.losses import Mean

Objective = Callable[[Any, Any, Batch, jax.Array | None], dict[str, Mean]]


def on_mesh(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch with its rows spread over the mesh; without a mesh, the batch unchanged."""
    return batch if mesh is None else placement.put(batch, placement.of_batch(batch, mesh))


def evaluation(
    objective: Objective, rows: Sequence[EncodedRow], encoder: Encoder, size: int, mesh: Mesh | None
) -> Callable[[Any, Any], dict[str, Mean]] | None:
    """Makes the `evaluate` of a `loop.Task`: the objective's metrics over all rows, without dropout; None without rows.

    Args:
        size: rows per batch.
    """
    if not rows:
        return None
    score = jax.jit(lambda trainable, frozen, batch: objective(trainable, frozen, batch, None))

    def evaluate(trainable: Any, frozen: Any) -> dict[str, Mean]:
        total: dict[str, Mean] = {}
        for batch in in_order(rows, encoder, size):
            # Metrics are read before the next batch starts, so that only one batch is in memory.
            metrics = jax.device_get(score(trainable, frozen, on_mesh(batch, mesh)))
            total = {name: total[name] + mean if total else mean for name, mean in metrics.items()}
        return total

    return evaluate
