"""The one attention function.

    positions → logits → mask → weights → values

Rows (queries) of all branches are multiplied with the shared prefix at once, and each branch's with its own block
of columns after it. A transform sees the last `explicit_rows` rows of its branch; without transforms nothing but
the plain program is traced.

A long prompt and a training sequence are never a whole T x S map: rows that no transform sees stream over blocks of
columns (`stream`), and rows of a transform that takes them apart (`Transform.by_rows`) come a few at a time. Any other
transform gets the map of its own rows, in its own layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.cache import Block, LayerCache
from lvlm_jax.attention.context import Context
from lvlm_jax.attention.rotary import Rotation, rotate
from lvlm_jax.attention.stream import streamed
from lvlm_jax.attention.tap import Tap
from lvlm_jax.attention.transform import Site, Transform, overrides, rows_in, takes_rows_apart

LARGEST_MAP = 2**26  # elements [B, H, R, S] of the map of rows that a transform takes apart, 256 MiB in float32
FEWEST_ROWS = 16  # that come at a time, however long they are
FEW_ROWS = 64  # whose map is small beside that many columns' keys and values


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

    def of(self, branch: int) -> "LayerEdits":
        """Those of one branch."""
        return dataclasses.replace(self, transforms=(self.transforms[branch],), carries=(self.carries[branch],))


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
    batch, heads, rows, _ = queries[0].shape
    few = rows <= FEW_ROWS and batch * heads * rows * contexts[0].image_id.shape[1] <= LARGEST_MAP
    if contexts[0].streams and not few:
        branches = [
            _in_parts(query, columns.alone(branch), contexts[branch], shift, edits.of(branch), window, whole_images)
            for branch, query in enumerate(queries)
        ]
        outputs, carries, tapped = zip(*branches, strict=True)
        return outputs, carries, _stacked(tapped, contexts)
    outputs, carries, weights = _whole(queries, columns, contexts, shift, edits, window, whole_images)
    return outputs, carries, _stacked([edits.tap.select(rows) for rows in weights], contexts) if edits.tapped else None


def _in_parts(
    query: Float[Array, "B H T D"],
    columns: LayerCache,
    context: Context,
    shift: Rotation | None,
    edits: LayerEdits,
    window: int | None,
    whole_images: bool,
) -> tuple[Float[Array, "B H T D"], Any, Float[Array, "B G R S"] | None]:
    """One branch: its plain rows streamed, the others as whole or a few at a time; its carry; what is tapped."""
    transform, total = edits.at(0, context.phase), query.shape[2]
    explicit = 0
    if transform is not None:
        rows = rows_in(transform, edits.layer, edits.num_layers, context.phase)
        explicit = 1 if rows == "last" else context.explicit_rows
    if shift is not None:  # columns of images lie elsewhere for these rows
        explicit = max(explicit, context.explicit_rows)
    if edits.tapped:
        explicit = total if edits.tap.rows == "all" else max(explicit, 1)
    plain, parts, carry, tapped = total - explicit, [], edits.carries[0], None
    if plain:
        block, sight = columns.own[0], context.sight(window, whole_images).rows(0, plain)
        # Rows that are the first columns see no later one, unless images are seen whole.
        if total == block.length and not whole_images:
            block, sight = block.first(plain), sight.columns(0, plain)
        parts.append(streamed(query[:, :, :plain], block.key, block.value, sight))
    if explicit:
        whole = functools.partial(
            _whole, columns=columns, shift=shift, edits=edits, window=window, whole_images=whole_images
        )
        rows, cut = query[:, :, plain:], context.cut(plain, explicit)
        apart = transform is None or takes_rows_apart(transform, edits.layer, edits.num_layers, context.phase)
        if apart and not (edits.tapped and edits.tap.rows == "all"):
            whole = functools.partial(_by_rows, whole, transform)
        (mixed,), (carry,), (weights,) = whole((rows,), contexts=(cut,))
        parts.append(mixed.astype(parts[0].dtype if parts else mixed.dtype))
        tapped = edits.tap.select(weights) if edits.tapped else None
    return jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0], carry, tapped


def _by_rows(
    whole: Callable, transform: Transform | None, queries: tuple[Float[Array, "B H R D"]], contexts: tuple[Context]
) -> tuple[tuple, tuple, tuple]:
    """What `whole` gives for all rows of a branch, from a few at a time; weights are those of the last ones."""
    (rows,), (context,) = queries, contexts
    batch, heads, total, _ = rows.shape
    few = max(FEWEST_ROWS, LARGEST_MAP // (batch * heads * context.image_id.shape[1]))
    if total <= few:
        return whole(queries, contexts=contexts)
    starts = jnp.arange((total - 1) // few) * few
    last = total - 1 - (total - 1) % few

    def some(start: Int[Array, ""] | int, count: int = few, **more: Any) -> Any:
        def own(start: Int[Array, ""] | int) -> Any:
            part = jax.lax.dynamic_slice_in_dim(rows, start, count, axis=2)
            return whole((part,), contexts=(context.cut(start, count),), **more)

        return jax.checkpoint(own)(start)  # the backward pass computes their maps again, or would hold all of them

    given = {}
    if transform is not None and overrides(transform, "statistics"):

        def add(sums: Any, start: Int[Array, ""]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, some(start, only_statistics=True)), None

        sums, _ = jax.lax.scan(add, some(last, total - last, only_statistics=True), starts)
        given["statistics"] = sums
    mixed = jax.lax.map(lambda start: some(start, **given)[0][0], starts)
    (end,), carries, weights = some(last, total - last, **given)
    mixed = jnp.moveaxis(mixed, 0, 2).reshape(batch, heads, last, -1)
    return (jnp.concatenate([mixed, end], axis=2),), carries, weights


def _whole(
    queries: tuple[Float[Array, "B H T D"], ...],
    columns: LayerCache,
    contexts: tuple[Context, ...],
    shift: Rotation | None,
    edits: LayerEdits,
    window: int | None,
    whole_images: bool,
    statistics: Any = None,
    only_statistics: bool = False,
) -> Any:
    """Outputs, carries and weights of every branch, each from the whole map of the rows.

    Args:
        statistics: of the one transform, where these are only some of its rows.
        only_statistics: gives the sums of `Transform.statistics` over these rows, and nothing else.
    """
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
        if only_statistics:
            return transform.statistics(*_softened(transform, site))
        edited, site = _edit(transform, site, statistics)
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
    return tuple(outputs), carries, tuple(weights)


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


def _stacked(
    tapped: Sequence[Float[Array, "B G R S"] | None], contexts: tuple[Context, ...]
) -> Float[Array, "N B G R S"] | None:
    """What is tapped of every branch, or of the main one alone where branches have columns of their own."""
    if tapped[0] is None:
        return None
    return jnp.stack(tapped if all(context is contexts[0] for context in contexts) else tapped[:1])


def _edit(transform: Transform, site: Site, statistics: Any = None) -> tuple[Float[Array, "B H R S"], Site]:
    """Logits, mask and weights stages of one branch; the returned site goes on to the values stage."""
    site, weights = _softened(transform, site)
    site = dataclasses.replace(site, statistics=statistics)
    site = dataclasses.replace(site, carry=transform.observe(site, weights))
    return transform.weights(site, weights), site


def _softened(transform: Transform, site: Site) -> tuple[Site, Float[Array, "B H R S"]]:
    """The site behind the logits stage, and the weights behind the mask stage."""
    site = dataclasses.replace(site, logits=transform.logits(site, site.logits))
    return site, _softmax(site.logits, transform.mask(site, site.mask[:, None]))


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
