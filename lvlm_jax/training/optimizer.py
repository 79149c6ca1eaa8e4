"""The optimizer of every recipe: AdamW with warm-up, cosine decay, global-norm clipping and a weight-decay mask."""

from typing import Any

import jax
import optax

DECAYED = ("kernel", "lora_a", "lora_b")


def schedule(settings: Any) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `peak`, then half a cosine down to `peak * final`.

    Args:
        settings: has the fields `steps`, `warmup` (a number of steps, or below 1 a share of all steps), `peak`, and
            `final` (the last rate as a share of the peak).
    """
    steps, warmup = settings.steps, settings.warmup
    # At most a third of the steps, so that a short trial run reaches its peak too.
    warmup = min(round(warmup * steps) if warmup < 1 else int(warmup), steps // 3)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else settings.peak,
        peak_value=settings.peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=settings.peak * settings.final,
    )


def decayed(params: Any) -> Any:
    """Which parameters have weight decay: matrices of projections and adapters, not norms, biases or embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make(settings: Any) -> optax.GradientTransformation:
    """AdamW with these settings.

    Args:
        settings: those of `schedule`, and `clip` (global norm), `beta1`, `beta2`, `weight_decay`; optionally `rates`, a
            factor on the learning rate for top-level parts of the parameters.
    """
    adamw = optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            schedule(settings), b1=settings.beta1, b2=settings.beta2, weight_decay=settings.weight_decay, mask=decayed
        ),
    )
    factors = settings.get("rates", {})

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adamw.update(gradient, state, params)
        scaled = {part: optax.tree.scale(factors.get(part, 1.0), updates[part]) for part in updates}
        return scaled, state

    return optax.GradientTransformation(adamw.init, update)
