"""The one attention function.

    positions → logits → mask → weights → values

The rows (queries) of all branches attend to the shared prefix in one product; each branch's rows also attend to the
branch's own columns after the prefix. A transform sees the last `explicit_rows` rows of its branch. Without transforms,
only the plain program is traced.

A long prompt or training sequence never has its whole T x S map in memory. Rows that no transform sees stream over
blocks of columns (`stream`). Rows of a transform with `Transform.by_rows` are computed a few at a time. Any other
transform gets the whole map of its own rows, in its own layers.
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
from lvlm_jax.attention.lazy_mask import LazyMask
from lvlm_jax.attention.rotary import Rotation, rotate
from lvlm_jax.attention.stream import streaming_attention
from lvlm_jax.attention.tap import Tap
from lvlm_jax.attention.transform import Site, Transform, mixes, overrides, rows_in, splits_by_rows
from lvlm_jax.native import each_rows_dot

LARGEST_MAP = 2**26  # elements [B, H, R, S] of one map if the rows can be split, 256 MiB in float32
MIN_ROWS = 16  # the fewest rows computed at a time, however many columns there are
SHORT_QUERY = 64  # rows of a query whose map is small compared with the keys and values


# A pytree, because `jax.checkpoint` flattens the arguments of a layer that the backward pass recomputes.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["transforms", "carries"],
    meta_fields=["layer", "num_layers", "tap", "exit_logits", "project"],
)
@dataclasses.dataclass(frozen=True)
class LayerEdits:
    """The transforms that edit one layer, and the request for its attention weights.

    Attributes:
        transforms: the transform of each branch, or None if nothing edits the branch.
        carries: the carry of each branch, from the layer before.
        layer, num_layers: index of this layer, from 0; number of layers.
        tap: which attention weights to return.
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
        """The transform of a branch, if its stages run in this layer."""
        transform = self.transforms[branch]
        if transform is None or not transform.attends():
            return None
        return transform if transform.active(self.layer, self.num_layers, phase) else None

    @property
    def tapped(self) -> bool:
        return self.tap is not None and self.tap.wants(self.layer)

    def of(self, branch: int) -> "LayerEdits":
        """The edits of one branch."""
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
    """Computes the attention of one layer for every branch.

    Args:
        queries: per branch, rotated to the ordinary positions.
        columns: keys rotated to their own positions, and values.
        contexts: rows, columns and masks of each branch; the same object if branches share a prompt.
        shift: the rotation of `image_shift`, or None.
        edits: the transforms of each branch.
        window: sliding-window width of this layer.
        whole_images: image tokens also see later tokens of their image.

    Returns:
        Per branch the weighted sums of the values; the carries for the next layer; the tapped weights after all edits.
    """
    batch, heads, rows, _ = queries[0].shape
    small = rows <= SHORT_QUERY and batch * heads * rows * contexts[0].image_id.shape[1] <= LARGEST_MAP
    if contexts[0].streams and not small:
        branches = [
            _streamed_branch(
                query, columns.alone(branch), contexts[branch], shift, edits.of(branch), window, whole_images
            )
            for branch, query in enumerate(queries)
        ]
        outputs, carries, tapped = zip(*branches, strict=True)
        return outputs, carries, _stack_taps(tapped, contexts)
    outputs, carries, weights = _whole_map(queries, columns, contexts, shift, edits, window, whole_images)
    return (
        outputs,
        carries,
        _stack_taps([edits.tap.select(rows) for rows in weights], contexts) if edits.tapped else None,
    )


def _streamed_branch(
    query: Float[Array, "B H T D"],
    columns: LayerCache,
    context: Context,
    shift: Rotation | None,
    edits: LayerEdits,
    window: int | None,
    whole_images: bool,
) -> tuple[Float[Array, "B H T D"], Any, Float[Array, "B G R S"] | None]:
    """Attention of one branch: plain rows are streamed, explicit rows are computed all at once or a few at a time.
    Returns outputs, carry and tapped weights."""
    transform, total = edits.at(0, context.phase), query.shape[2]
    if transform is not None and shift is None and not edits.tapped:
        lazy_mask = context.lazy_mask(window, whole_images)
        if mixed := _mixture(transform, query, columns.own[0], lazy_mask, context, edits):
            return sum(mixed).astype(query.dtype), edits.carries[0], None
    explicit = 0
    if transform is not None:
        rows = rows_in(transform, edits.layer, edits.num_layers, context.phase)
        explicit = 1 if rows == "last" else context.explicit_rows
    if shift is not None:  # image columns have other positions for these rows
        explicit = max(explicit, context.explicit_rows)
    if edits.tapped:
        explicit = total if edits.tap.rows == "all" else max(explicit, 1)
    plain, parts, carry, tapped = total - explicit, [], edits.carries[0], None
    if plain:
        block, lazy_mask = columns.own[0], context.lazy_mask(window, whole_images).rows(0, plain)
        # Plain rows come first and see no later column, unless image tokens see their whole image.
        if total == block.length and not whole_images:
            block, lazy_mask = block.first(plain), lazy_mask.columns(0, plain)
        parts.append(streaming_attention(query[:, :, :plain], block.key, block.value, lazy_mask))
    if explicit:
        attend_rows = functools.partial(
            _whole_map, columns=columns, shift=shift, edits=edits, window=window, whole_images=whole_images
        )
        rows, rows_context = query[:, :, plain:], context.cut(plain, explicit)
        splits = transform is None or splits_by_rows(transform, edits.layer, edits.num_layers, context.phase)
        if splits and not (edits.tapped and edits.tap.rows == "all"):
            attend_rows = functools.partial(_row_blocks, attend_rows, transform)
        (mixed,), (carry,), (weights,) = attend_rows((rows,), contexts=(rows_context,))
        parts.append(mixed.astype(parts[0].dtype if parts else mixed.dtype))
        tapped = edits.tap.select(weights) if edits.tapped else None
    return jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0], carry, tapped


def _mixture(
    transform: Transform,
    query: Float[Array, "B H T D"],
    block: Block,
    lazy_mask: LazyMask,
    context: Context,
    edits: LayerEdits,
) -> list[Float[Array, "B H T D"]]:
    """The weighted attentions whose sum is that of `Transform.mixture`; empty if it does not apply."""
    if not mixes(transform) or rows_in(transform, edits.layer, edits.num_layers, context.phase) != "all":
        return []
    pairs = transform.mixture(edits.layer, edits.num_layers, context, edits.carries[0], lazy_mask)
    return [weight * streaming_attention(query, block.key, block.value, mask) for weight, mask in pairs or ()]


def _row_blocks(
    attend_rows: Callable,
    transform: Transform | None,
    queries: tuple[Float[Array, "B H R D"]],
    contexts: tuple[Context],
) -> tuple[tuple, tuple, tuple]:
    """Runs `attend_rows` on a few rows at a time; the returned weights are those of the last few rows."""
    (rows,), (context,) = queries, contexts
    batch, heads, total, _ = rows.shape
    limit = max(MIN_ROWS, LARGEST_MAP // (batch * heads * context.image_id.shape[1]))
    if total <= limit:
        return attend_rows(queries, contexts=contexts)
    starts = jnp.arange((total - 1) // limit) * limit
    last = total - 1 - (total - 1) % limit

    def run(start: Int[Array, ""] | int, count: int = limit, **more: Any) -> Any:
        def run_rows(start: Int[Array, ""] | int) -> Any:
            part = jax.lax.dynamic_slice_in_dim(rows, start, count, axis=2)
            return attend_rows((part,), contexts=(context.cut(start, count),), **more)

        return jax.checkpoint(run_rows)(start)  # the backward pass recomputes their maps instead of keeping them all

    options = {}
    if transform is not None and overrides(transform, "statistics"):

        def add(sums: Any, start: Int[Array, ""]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, run(start, only_statistics=True)), None

        sums, _ = jax.lax.scan(add, run(last, total - last, only_statistics=True), starts)
        options["statistics"] = sums
    mixed = jax.lax.map(lambda start: run(start, **options)[0][0], starts)
    (end,), carries, weights = run(last, total - last, **options)
    mixed = jnp.moveaxis(mixed, 0, 2).reshape(batch, heads, last, -1)
    return (jnp.concatenate([mixed, end], axis=2),), carries, weights


def _whole_map(
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
    """Outputs, carries and weights of every branch, from the whole map of the given rows.

    Args:
        statistics: the transform's statistics over all rows, if the given rows are only some of them.
        only_statistics: returns just the sums of `Transform.statistics` over these rows.
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
            return transform.statistics(*_softmax_stages(transform, site))
        edited, site = _edit(transform, site, statistics)
        weights.append(
            _with_edited_rows(_softmax(_unedited_rows(scores, site), _unedited_rows(mask[:, None], site)), edited)
        )
        sites.append(site)

    outputs = _mix(weights, columns)
    for branch, site in enumerate(sites):
        if site is None or not overrides(edits.transforms[branch], "values"):
            continue
        rows = site.logits.shape[2]
        replaced = edits.transforms[branch].values(
            site, weights[branch][:, :, -rows:], lambda rows, branch=branch: _mix_branch(rows, columns, branch)
        )
        outputs[branch] = _with_edited_rows(
            _unedited_rows(outputs[branch], site), replaced.astype(outputs[branch].dtype)
        )
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


def _unedited_rows(array: Array, site: Site) -> Array:
    """The rows of an array `[B, ?, T, ...]` before those that a transform sees."""
    return array[:, :, : array.shape[2] - site.logits.shape[2]]


def _with_edited_rows(plain: Array, edited: Array) -> Array:
    """Concatenates unedited and edited rows."""
    return jnp.concatenate([plain, edited], axis=2) if plain.shape[2] else edited


def _stack_taps(
    tapped: Sequence[Float[Array, "B G R S"] | None], contexts: tuple[Context, ...]
) -> Float[Array, "N B G R S"] | None:
    """Stacks the tapped weights of all branches, or returns only the main branch's if branches have columns of their
    own."""
    if tapped[0] is None:
        return None
    return jnp.stack(tapped if all(context is contexts[0] for context in contexts) else tapped[:1])


def _edit(transform: Transform, site: Site, statistics: Any = None) -> tuple[Float[Array, "B H R S"], Site]:
    """Runs the logits, mask and weights stages of one branch; returns weights, and a site for the values stage."""
    site, weights = _softmax_stages(transform, site)
    site = dataclasses.replace(site, statistics=statistics)
    site = dataclasses.replace(site, carry=transform.observe(site, weights))
    return transform.weights(site, weights), site


def _softmax_stages(transform: Transform, site: Site) -> tuple[Site, Float[Array, "B H R S"]]:
    """Returns the site after the logits stage, and the weights after the mask stage."""
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
    """Logits in which post-image rows see image columns through the shifted image keys."""
    plain = context.positions.shape[1] - context.explicit_rows
    block = (context.post_image_rows()[:, :, None] & context.image_columns()[:, None, :])[:, None]
    cross = _logits(tuple(query[:, :, plain:] for query in queries), shifted(columns, shift))
    return [
        jnp.concatenate([ordinary[:, :, :plain], jnp.where(block, calibrated, ordinary[:, :, plain:])], axis=2)
        for ordinary, calibrated in zip(_logits(queries, columns), cross, strict=True)
    ]


def shifted(columns: LayerCache, shift: Rotation) -> LayerCache:
    """The same columns with every key rotated further by `shift`, whose angles are zero outside images."""

    def turn(block: Block, start: int) -> Block:
        part = Rotation(
            shift.cosine[:, start : start + block.length], shift.sine[:, start : start + block.length], shift.pairs
        )
        return Block(rotate(block.key, part.heads(axis=1)), block.value)

    prefix = columns.prefix and turn(columns.prefix, 0)
    start = columns.prefix.length if columns.prefix else 0
    return LayerCache(prefix, tuple(turn(block, start) for block in columns.own))


def _mix(weights: list[Float[Array, "B H T _"]], columns: LayerCache) -> list[Float[Array, "B H T D"]]:
    """The product of weights and values for every branch; reads the prefix once for all of them."""
    if columns.prefix is None:
        return [_weighted(rows, block) for rows, block in zip(weights, columns.own, strict=True)]
    split = columns.prefix.length
    shared = _for_all_branches(_weighted, tuple(rows[..., :split] for rows in weights), columns.prefix)
    own = [_weighted(rows[..., split:], block) for rows, block in zip(weights, columns.own, strict=True)]
    return [prefix + suffix for prefix, suffix in zip(shared, own, strict=True)]


def _for_all_branches(
    product: Callable[[jax.Array, Block], jax.Array], rows: tuple[jax.Array, ...], prefix: Block
) -> list[jax.Array]:
    """A product of every branch's rows with the shared prefix, reading the prefix once."""

    def together(*rows: jax.Array) -> list[jax.Array]:
        return jnp.split(product(jnp.concatenate(rows, axis=2), prefix), len(rows), axis=2)

    def one_by_one(*rows: jax.Array) -> list[jax.Array]:
        return [product(row, prefix) for row in rows]

    # A CPU keeps the prefix of one layer in its cache between two products, and multiplies single rows much faster.
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
    logits = each_rows_dot(grouped, block.key, out_first=True)
    return logits.reshape(batch, heads, rows, -1) * size**-0.5


def _weighted(weights: Float[Array, "B H T S"], block: Block) -> Float[Array, "B H T D"]:
    batch, heads, rows, columns = weights.shape
    grouped = weights.reshape(batch, block.value.shape[1], -1, columns).astype(block.value.dtype)
    mixed = each_rows_dot(grouped, block.value)
    return mixed.reshape(batch, heads, rows, -1)


def _softmax(
    logits: Float[Array, "B H T S"], mask: Bool[Array, "B T S"] | Bool[Array, "B #H T S"]
) -> Float[Array, "B H T S"]:
    """Softmax over visible columns; a row that sees none (padding) gets finite, meaningless weights."""
    mask = mask[:, None] if mask.ndim == 3 else mask
    return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)
