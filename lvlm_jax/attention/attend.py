"""The one attention function.

    positions → logits → mask → weights → values

Rows (queries) of all branches are multiplied with the shared prefix at once, and each branch's with its own block
of columns after it. A transform sees the last `explicit_rows` rows of its branch; without transforms nothing but
the plain program is traced.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention.cache import Block, LayerCache
from lvlm_jax.attention.context import Context
from lvlm_jax.attention.rotary import Rotation, rotate
from lvlm_jax.attention.transform import Site, Transform, overrides


@dataclasses.dataclass(frozen=True)
class LayerEdits:
    """What is done to, and asked of, one layer.

    Attributes:
        transforms: one (or None) per branch.
        carries: one per branch.
        layer, num_layers: index from 0, and the depth.
        tap: whether to return the attention weights of the last row.
    """

    transforms: tuple[Transform | None, ...]
    carries: tuple
    layer: int
    num_layers: int
    tap: bool = False

    def at(self, branch: int, phase: str) -> Transform | None:
        transform = self.transforms[branch]
        return transform if transform and transform.active(self.layer, self.num_layers, phase) else None


def attend(
    queries: tuple[Float[Array, "B H T D"], ...],
    columns: LayerCache,
    context: Context,
    shift: Rotation | None,
    edits: LayerEdits,
    window: int | None = None,
) -> tuple[tuple[Float[Array, "B H T D"], ...], tuple, Float[Array, "N B H S"] | None]:
    """Attention of one layer for every branch.

    Args:
        queries: per branch, rotated to the ordinary positions.
        columns: keys rotated to their own positions, and values.
        context: rows, columns, masks.
        shift: the rotation of `context.image_shift`, or None.
        edits: what each branch does to its rows.
        window: sliding-window width of this layer.

    Returns:
        Per branch the mixed values; the carries for the next layer; the final weights of the last row if tapped.
    """
    explicit = context.positions.shape[1] - context.explicit_rows
    logits = (
        _logits(queries, columns) if shift is None else _calibrated_logits(queries, columns, context, shift)
    )
    mask = context.mask(window)

    weights, sites = [], []
    for branch, scores in enumerate(logits):
        transform = edits.at(branch, context.phase)
        if transform is None:
            weights.append(_softmax(scores, mask))
            sites.append(None)
            continue
        site = Site(
            layer=edits.layer,
            num_layers=edits.num_layers,
            phase=context.phase,
            image_id=context.image_id,
            image=context.image_columns(),
            after_image=context.after_image_columns(),
            post_image=context.post_image_rows(),
            mask=mask[:, explicit:],
            logits=scores[:, :, explicit:],
            carry=edits.carries[branch],
            read_values=lambda branch=branch: _all_values(columns, branch),
        )
        edited, site = _edit(transform, site)
        plain = _softmax(scores[:, :, :explicit], mask[:, :explicit])
        weights.append(jnp.concatenate([plain, edited], axis=2))
        sites.append(site)

    outputs = _mix(weights, columns)
    for branch, site in enumerate(sites):
        if site is None or not overrides(edits.transforms[branch], "values"):
            continue
        replaced = edits.transforms[branch].values(
            site,
            weights[branch][:, :, explicit:],
            lambda rows, branch=branch: _mix_branch(rows, columns, branch),
        )
        plain = outputs[branch][:, :, :explicit]
        outputs[branch] = jnp.concatenate([plain, replaced.astype(plain.dtype)], axis=2)
    carries = tuple(site.carry if site else carry for site, carry in zip(sites, edits.carries, strict=True))
    tapped = jnp.stack([rows[:, :, -1] for rows in weights]) if edits.tap else None
    return tuple(outputs), carries, tapped


def _edit(transform: Transform, site: Site) -> tuple[Float[Array, "B H R S"], Site]:
    """Logits, mask and weights stages of one branch; the returned site goes on to the values stage."""
    site = dataclasses.replace(site, logits=transform.logits(site, site.logits))
    weights = _softmax(site.logits, transform.mask(site, site.mask[:, None]))
    site = dataclasses.replace(site, carry=transform.observe(site, weights))
    return transform.weights(site, weights), site


def _logits(rows: tuple[Float[Array, "B H T D"], ...], columns: LayerCache) -> list[Float[Array, "B H T S"]]:
    """Scaled attention logits of every branch's rows over the prefix and the branch's own columns."""
    own = [_product(query, block) for query, block in zip(rows, columns.own, strict=True)]
    if columns.prefix is None:
        return own
    shared = _for_all_branches(_product, rows, columns.prefix)
    return [jnp.concatenate(parts, axis=-1) for parts in zip(shared, own, strict=True)]


def _calibrated_logits(
    queries: tuple[Float[Array, "B H T D"], ...], columns: LayerCache, context: Context, shift: Rotation
) -> list[Float[Array, "B H T S"]]:
    """Logits whose cross-modal block, post-image rows x image columns, comes from the shifted image keys."""
    plain = context.positions.shape[1] - context.explicit_rows
    block = (context.post_image_rows()[:, :, None] & context.image_columns()[:, None, :])[:, None]
    cross = _logits(tuple(query[:, :, plain:] for query in queries), shifted(columns, shift))
    return [
        jnp.concatenate(
            [ordinary[:, :, :plain], jnp.where(block, calibrated, ordinary[:, :, plain:])], axis=2
        )
        for ordinary, calibrated in zip(_logits(queries, columns), cross, strict=True)
    ]


def shifted(columns: LayerCache, shift: Rotation) -> LayerCache:
    """The same columns with every key turned on by `shift`, whose angles are zero outside images."""

    def turn(block: Block, start: int) -> Block:
        part = Rotation(
            shift.cosine[:, start : start + block.length], shift.sine[:, start : start + block.length]
        )
        return Block(rotate(block.key, part.heads(axis=1)), block.value)

    prefix = columns.prefix and turn(columns.prefix, 0)
    start = columns.prefix.length if columns.prefix else 0
    return LayerCache(prefix, tuple(turn(block, start) for block in columns.own))


def _mix(weights: list[Float[Array, "B H T S"]], columns: LayerCache) -> list[Float[Array, "B H T D"]]:
    """Weights times values for every branch; the prefix is read once for all of them."""
    if columns.prefix is None:
        return [_weighted(rows, block) for rows, block in zip(weights, columns.own, strict=True)]
    split = columns.prefix.length
    shared = _for_all_branches(_weighted, tuple(rows[..., :split] for rows in weights), columns.prefix)
    own = [_weighted(rows[..., split:], block) for rows, block in zip(weights, columns.own, strict=True)]
    return [prefix + suffix for prefix, suffix in zip(shared, own, strict=True)]


def _for_all_branches(
    product: Callable[[jax.Array, Block], jax.Array], rows: tuple[jax.Array, ...], prefix: Block
) -> list[jax.Array]:
    """A product of every branch's rows with the shared prefix, which is read once."""

    def together(*rows: jax.Array) -> list[jax.Array]:
        return jnp.split(product(jnp.concatenate(rows, axis=2), prefix), len(rows), axis=2)

    def one_by_one(*rows: jax.Array) -> list[jax.Array]:
        return [product(row, prefix) for row in rows]

    # A CPU keeps one layer's prefix in its cache between two products, and multiplies single rows much faster.
    return jax.lax.platform_dependent(*rows, cpu=one_by_one, default=together)


def _mix_branch(
    weights: Float[Array, "B H R S"], columns: LayerCache, branch: int
) -> Float[Array, "B H R D"]:
    return _mix([weights], LayerCache(columns.prefix, (columns.own[branch],)))[0]


def _all_values(columns: LayerCache, branch: int) -> Float[Array, "B K S D"]:
    own = columns.own[branch].value
    return own if columns.prefix is None else jnp.concatenate([columns.prefix.value, own], axis=2)


def _product(query: Float[Array, "B H T D"], block: Block) -> Float[Array, "B H T S"]:
    """Scaled float32 logits. Query heads that share a key head become rows of one product (grouped-query attention)."""
    batch, heads, rows, size = query.shape
    grouped = query.reshape(batch, block.key.shape[1], -1, size)
    logits = jnp.einsum(
        "BKRD,BKSD->BKRS", grouped, block.key, precision=_precision(query), preferred_element_type=jnp.float32
    )
    return logits.reshape(batch, heads, rows, -1) * size**-0.5


def _weighted(weights: Float[Array, "B H T S"], block: Block) -> Float[Array, "B H T D"]:
    batch, heads, rows, columns = weights.shape
    grouped = weights.reshape(batch, block.value.shape[1], -1, columns).astype(block.value.dtype)
    mixed = jnp.einsum(
        "BKRS,BKSD->BKRD",
        grouped,
        block.value,
        precision=_precision(block.value),
        preferred_element_type=jnp.float32,
    )
    return mixed.reshape(batch, heads, rows, -1)


def _softmax(
    logits: Float[Array, "B H T S"], mask: Bool[Array, "B T S"] | Bool[Array, "B #H T S"]
) -> Float[Array, "B H T S"]:
    """Softmax over visible columns; a row that sees none (padding) gets finite, meaningless weights."""
    mask = mask[:, None] if mask.ndim == 3 else mask
    return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)


def _precision(operand: jax.Array) -> jax.lax.Precision:
    """float32 means float32: accelerators would otherwise round the operands of a product."""
    return jax.lax.Precision.HIGHEST if operand.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
