"""The one attention function.

    positions → logits → mask → weights → values

Rows (queries) of all branches are multiplied with the shared prefix at once, and each branch's with its own block
of columns after it. A transform sees the last `explicit_rows` rows of its branch; without transforms nothing but
the plain program is traced.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention.cache import Block, LayerCache
from lvlm_jax.attention.context import Context
from lvlm_jax.attention.rotary import Rotation, rotate
from lvlm_jax.attention.tap import Tap
from lvlm_jax.attention.transform import Site, Transform, overrides

CAUSAL_BLOCK = 64  # rows of one product in blocked attention


# A pytree, because a layer that is computed again in the backward pass takes its arguments apart.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["transforms", "carries"],
    meta_fields=["layer", "num_layers", "tap", "exit_logits", "project"],
)
@dataclasses.dataclass(frozen=True)
class LayerEdits:
    """What is done to, and asked of, one layer.

    Attributes:
        transforms: one (or None) per branch.
        carries: one per branch.
        layer, num_layers: index from 0, and the depth.
        tap: what is asked of the attention weights.
        exit_logits, project: as in `Stream` and `Site`.
    """

    transforms: tuple[Transform | None, ...]
    carries: tuple
    layer: int
    num_layers: int
    tap: Tap | None = None
    exit_logits: Callable | None = None
    project: Callable | None = None

    def at(self, branch: int, phase: str) -> Transform | None:
        """The transform whose stages run in this layer."""
        transform = self.transforms[branch]
        if transform is None or not transform.attends():
            return None
        return transform if transform.active(self.layer, self.num_layers, phase) else None

    @property
    def tapped(self) -> bool:
        return self.tap is not None and self.tap.wants(self.layer)


def attend(
    queries: tuple[Float[Array, "B H T D"], ...],
    columns: LayerCache,
    contexts: tuple[Context, ...],
    shift: Rotation | None,
    edits: LayerEdits,
    window: int | None = None,
    whole_images: bool = False,
) -> tuple[tuple[Float[Array, "B H T D"], ...], tuple, Float[Array, "N B G R S"] | None]:
    """Attention of one layer for every branch.

    Args:
        queries: per branch, rotated to the ordinary positions.
        columns: keys rotated to their own positions, and values.
        contexts: rows, columns and masks of each branch; one and the same where they share a prompt.
        shift: the rotation of `image_shift`, or None.
        edits: what each branch does to its rows.
        window: sliding-window width of this layer.
        whole_images: image tokens see the later ones of their image too.

    Returns:
        Per branch the mixed values; the carries for the next layer; the final weights that are tapped.
    """
    if contexts[0].blocked and not whole_images:
        mask = contexts[0].mask(window)
        mixed = tuple(_causal(query, own, mask) for query, own in zip(queries, columns.own, strict=True))
        return mixed, edits.carries, None
    logits = _logits(queries, columns) if shift is None else _calibrated_logits(queries, columns, contexts[0], shift)
    weights, sites = [], []
    for branch, (scores, context) in enumerate(zip(logits, contexts, strict=True)):
        mask = context.mask(window, whole_images)
        transform = edits.at(branch, context.phase)
        if transform is None:
            weights.append(_softmax(scores, mask))
            sites.append(None)
            continue
        site = _site(context, edits, branch, scores, mask, columns)
        edited, site = _edit(transform, site)
        weights.append(_after(_softmax(_before(scores, site), _before(mask[:, None], site)), edited))
        sites.append(site)

    outputs = _mix(weights, columns)
    for branch, site in enumerate(sites):
        if site is None or not overrides(edits.transforms[branch], "values"):
            continue
        rows = site.logits.shape[2]
        replaced = edits.transforms[branch].values(
            site, weights[branch][:, :, -rows:], lambda rows, branch=branch: _mix_branch(rows, columns, branch)
        )
        outputs[branch] = _after(_before(outputs[branch], site), replaced.astype(outputs[branch].dtype))
    carries = tuple(site.carry if site else carry for site, carry in zip(sites, edits.carries, strict=True))
    return tuple(outputs), carries, _tapped(weights, contexts, edits)


def _site(
    context: Context,
    edits: LayerEdits,
    branch: int,
    scores: Float[Array, "B H T S"],
    mask: Bool[Array, "B T S"],
    columns: LayerCache,
) -> Site:
    rows = 1 if edits.transforms[branch].rows == "last" else context.explicit_rows
    return Site(
        layer=edits.layer,
        num_layers=edits.num_layers,
        phase=context.phase,
        image_id=context.image_id,
        image_count=context.image_count,
        image=context.image_columns(),
        after_image=context.after_image_columns(),
        system=context.system_columns(),
        generated=context.generated_columns(),
        row_index=context.rows()[-rows:],
        post_image=context.post_image_rows()[:, -rows:],
        mask=mask[:, -rows:],
        logits=scores[:, :, -rows:],
        carry=edits.carries[branch],
        read_values=lambda: _all_values(columns, branch),
        project=edits.project,
    )


def _before(array: Array, site: Site) -> Array:
    """Of an array `[B, ?, T, ...]` the rows ahead of those a transform sees."""
    return array[:, :, : array.shape[2] - site.logits.shape[2]]


def _after(plain: Array, edited: Array) -> Array:
    """Rows that were left alone, then those that were edited."""
    return jnp.concatenate([plain, edited], axis=2) if plain.shape[2] else edited


def _tapped(
    weights: list[Float[Array, "B H T _"]], contexts: tuple[Context, ...], edits: LayerEdits
) -> Float[Array, "N B G R S"] | None:
    if not edits.tapped:
        return None
    seen = weights if all(context is contexts[0] for context in contexts) else weights[:1]
    return jnp.stack([edits.tap.select(rows) for rows in seen])


def _causal(query: Float[Array, "B H T D"], block: Block, mask: Bool[Array, "B T T"]) -> Float[Array, "B H T D"]:
    """Plain causal attention in blocks of rows: what lies above the diagonal is mostly not computed."""
    mixed = []
    for start in range(0, query.shape[2], CAUSAL_BLOCK):
        stop = min(start + CAUSAL_BLOCK, query.shape[2])
        seen = Block(block.key[:, :, :stop], block.value[:, :, :stop])
        weights = _softmax(_product(query[:, :, start:stop], seen), mask[:, start:stop, :stop])
        mixed.append(_weighted(weights, seen))
    return jnp.concatenate(mixed, axis=2)


def _edit(transform: Transform, site: Site) -> tuple[Float[Array, "B H R S"], Site]:
    """Logits, mask and weights stages of one branch; the returned site goes on to the values stage."""
    site = dataclasses.replace(site, logits=transform.logits(site, site.logits))
    weights = _softmax(site.logits, transform.mask(site, site.mask[:, None]))
    site = dataclasses.replace(site, carry=transform.observe(site, weights))
    return transform.weights(site, weights), site


def _logits(rows: tuple[Float[Array, "B H T D"], ...], columns: LayerCache) -> list[Float[Array, "B H T _"]]:
    """Scaled attention logits of every branch's rows over the prefix and the branch's own columns."""
    own = [_product(query, block) for query, block in zip(rows, columns.own, strict=True)]
    if columns.prefix is None:
        return own
    shared = _for_all_branches(_product, rows, columns.prefix)
    return [jnp.concatenate(parts, axis=-1) for parts in zip(shared, own, strict=True)]


def _calibrated_logits(
    queries: tuple[Float[Array, "B H T D"], ...], columns: LayerCache, context: Context, shift: Rotation
) -> list[Float[Array, "B H T _"]]:
    """Logits whose cross-modal block, post-image rows x image columns, comes from the shifted image keys."""
    plain = context.positions.shape[1] - context.explicit_rows
    block = (context.post_image_rows()[:, :, None] & context.image_columns()[:, None, :])[:, None]
    cross = _logits(tuple(query[:, :, plain:] for query in queries), shifted(columns, shift))
    return [
        jnp.concatenate([ordinary[:, :, :plain], jnp.where(block, calibrated, ordinary[:, :, plain:])], axis=2)
        for ordinary, calibrated in zip(_logits(queries, columns), cross, strict=True)
    ]


def shifted(columns: LayerCache, shift: Rotation) -> LayerCache:
    """The same columns with every key turned on by `shift`, whose angles are zero outside images."""

    def turn(block: Block, start: int) -> Block:
        part = Rotation(
            shift.cosine[:, start : start + block.length], shift.sine[:, start : start + block.length], shift.pairs
        )
        return Block(rotate(block.key, part.heads(axis=1)), block.value)

    prefix = columns.prefix and turn(columns.prefix, 0)
    start = columns.prefix.length if columns.prefix else 0
    return LayerCache(prefix, tuple(turn(block, start) for block in columns.own))


def _mix(weights: list[Float[Array, "B H T _"]], columns: LayerCache) -> list[Float[Array, "B H T D"]]:
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


def _mix_branch(weights: Float[Array, "B H R S"], columns: LayerCache, branch: int) -> Float[Array, "B H R D"]:
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
        "BKRS,BKSD->BKRD", grouped, block.value, precision=_precision(block.value), preferred_element_type=jnp.float32
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
