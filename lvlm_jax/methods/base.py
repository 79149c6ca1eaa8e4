"""What a method is: a frozen dataclass whose numbers are array leaves and whose switches are static.

    @register("dim")
    class Dim(Method):
        kappa: Strength = strength(0.5, "share of the image logits that is taken away")

        def logits(self, site, logits):
            return jnp.where(site.image[:, None, None, :], logits * (1 - self.kappa), logits)

`Dim(kappa=0.3)` can be passed to every call of the public face, swept, `vmap`ped and differentiated; changing
`kappa` recompiles nothing.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention import Transform
from lvlm_jax.attention.transform import STAGES, overrides
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import checks
from lvlm_jax.methods.cuts import Soft, plausible
from lvlm_jax.methods.fitted import Source

Strength = float | np.floating | jax.Array

FORMS = ("model", "layer", "head")  # one number, one of each layer, one of each layer and head

# How the prompt of a contrast branch differs from the main one's: not at all (rows before the edits are shared), its
# pictures' pixels changed as the tower takes them or as whole pictures, another picture in the place of each, its image
# tokens changed, some of them left out, no pictures, or words in the place of the system prompt.
CONTRAST_PROMPTS = ("same", "pixels", "altered", "picture", "tokens", "fewer_tokens", "no_image", "text")
OTHER_PICTURES = ("pixels", "altered", "picture")
OTHER_TOKENS = (*OTHER_PICTURES, "tokens")  # the same layout, other image tokens
OTHER_LAYOUTS = ("fewer_tokens", "no_image", "text")

# What a warm-up pass can be asked for: the fields of `Seen`.
WARM_UPS = ("hidden", "attention", "tower", "probe")


class Seen(NamedTuple):
    """What the warm-up pass saw of a prompt; None where it was not asked for.

    Attributes:
        hidden: all hidden states of the last prompt token, with and without images.
        attention: weights of the last prompt row, averaged over heads.
        tower: what the decoder reads, image tokens by the tower with the edit of `Method.tower_values`.
        probe: the carry of `Method.probe` after the last layer.
    """

    hidden: tuple[Float[Array, "L B E"], Float[Array, "L B E"]] | None = None
    attention: Float[Array, "L B T"] | None = None
    tower: Float[Array, "B T E"] | None = None
    probe: Any = None


class Readout(NamedTuple):
    """What a step has computed before the method makes one row of logits of it.

    Attributes:
        main, contrast: raw logits of the branches; `contrast` is None without a second branch.
        exits: the main branch's early-exit logits, in the order of `Method.exits`; None without any.
        carry: the main branch's carry after the last layer.
        others: raw logits of the branches behind the second; None without any.
    """

    main: Float[Array, "B V"]
    contrast: Float[Array, "B V"] | None
    exits: Float[Array, "X B V"] | None
    carry: Any
    others: Float[Array, "N B V"] | None = None


def strength(
    default: float | None,
    doc: str,
    low: float = -np.inf,
    high: float = np.inf,
    per: str = "model",
    flat: str = "",
    cuts: bool = False,
    when: tuple[str, Any] | None = None,
) -> Any:
    """A numeric field of a method: an array leaf, one finite number in `[low, high]`.

    Args:
        default, doc, low, high: its default, what it is in words, its bounds.
        per: the finest form it takes, one of FORMS. "layer" and "head": in the place of the number there may be an
            array with a value for each layer `[L]`; "head": or for each layer and query head `[L, H]`. A stage then
            finds a value of its layer, for heads of the shape `[H, 1, 1]`.
        flat: why it has no gradient and cannot be learned, such as "a threshold"; "" where it has one.
        cuts: it rules tokens out, and is a `cuts.Soft` where answers are scored for training.
        when: the name of a switch and the value that it must have for the number to be used at all.
    """
    about = {"doc": doc, "low": low, "high": high, "per": per, "flat": flat, "cuts": cuts, "when": when}
    return dataclasses.field(default=default, metadata=about)


def switch(default: Any, doc: str, choices: tuple | None = None) -> Any:
    """A static field of a method: part of its structure, so another value compiles another program."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "static": True})


def data(doc: str) -> Any:
    """An optional array leaf of a method that is no strength, such as a picture; None by default."""
    return dataclasses.field(default=None, metadata={"doc": doc, "data": True})


def fitted(doc: str) -> Any:
    """A field for what `lvlm fit` measured (`methods.fitted.Fitted`), given as a file's name or as its content."""
    return dataclasses.field(default=None, metadata={"doc": doc, "fitted": True})


class Method(Transform):
    """Base class: greedy decoding with the (identity) attention stages of `Transform`.

    A method with one branch overrides stages and is its own transform. A contrastive one overrides `branches`
    and `combine`, and `contrast_prompt` where the second branch reads something else.

    Attributes:
        PRESETS: settings by name.
        exit_norm: whether the final norm stands before the head of an early exit.
        primes: which fields of `Seen` `primed` wants before the generation begins.
        search: the search that finds the answer (a name of `generation.searches`); None for a method that writes it
            token by token.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    exit_norm: ClassVar[bool] = True
    primes: ClassVar[tuple[str, ...]] = ()
    search: ClassVar[str | None] = None

    def __init__(self, *arguments, **fields):
        raise LVLMError(f'{type(self).__name__} is not registered; write @methods.register("name") above the class')

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if {"low", "static", "fitted"} & field.metadata.keys():
                value = checks.checked(type(self), field, getattr(self, field.name))
                object.__setattr__(self, field.name, value)

    @property
    def label(self) -> str:
        """What a table or a plot calls the method."""
        return type(self).__name__

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Method":
        """The method with published settings.

        Args:
            name: of the settings, a key of `PRESETS`.
            changes: settings that overrule those of the preset.

        Raises:
            LVLMError: there is no preset of that name, or a setting cannot be used.
        """
        return cls(**cls.preset_settings(name, changes))

    @classmethod
    def preset_settings(cls, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of `preset`, as keyword arguments of the class.

        Raises:
            LVLMError: there is no preset of that name.
        """
        if name not in cls.PRESETS:
            known = f"expected one of {', '.join(cls.PRESETS)}" if cls.PRESETS else "it has none at all"
            raise LVLMError(f"{cls.__name__} has no preset {name!r}; {known}")
        return {**cls.PRESETS[name], **changes}

    def branches(self) -> tuple[Transform | None, ...]:
        """The attention edits of the main branch and, if there is one, of the contrast branch; static structure.

        Further branches read what the main one reads.
        """
        return (self if any(overrides(self, stage) for stage in STAGES) else None,)

    def positions(
        self, position: Int[Array, "..."], images_before: Int[Array, "..."], image_tokens: Int[Array, "..."]
    ) -> Float[Array, "..."] | None:
        """Where post-image rows, which keep their ordinary positions, see each image token; None for where it is.

        Rotary attention depends on differences of positions alone, so a method that moves rows as well moves image
        tokens by the opposite amount here. Elementwise; one answer for all layers and branches.

        Args:
            position: ordinary positions of the image tokens, [B, S]; [A, B, S] where the model counts along A axes.
            images_before: how much of each position is due to images: how many image tokens come strictly before it;
                with several axes the extents of earlier images and the place inside its own, [A, B, S].
            image_tokens: how much the sample's images add to the positions of what follows, [B, 1].
        """
        return None

    def contrast_prompt(self) -> str:
        """One of CONTRAST_PROMPTS; static. In a layout of its own (OTHER_LAYOUTS) the contrast branch is not edited."""
        return "same"

    def contrast_pixels(self, pixels: Float[Array, "R ..."], image_index: Int[Array, " R"]) -> Float[Array, "R ..."]:
        """The contrast branch's pictures, for "pixels".

        Args:
            pixels: as the tower takes them: whole pictures or tiles [3, Y, X], or one row of patches a picture [P, C].
            image_index: counts each sample's rows of them from 0.
        """
        return pixels

    def contrast_image(self, picture: Float[Array, "3 Y X"], index: Int[Array, ""]) -> Float[Array, "3 Y X"]:
        """A picture of the contrast branch, for "altered"; where pictures are cut into tiles, one of its tiles.

        Args:
            picture: its pixel values as the tower receives them, of any size.
            index: which of its sample's pictures it is, from 0.
        """
        return picture

    def contrast_tokens(self, embeddings: Float[Array, "B T E"], image_id: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """What the contrast branch's decoder reads, for "tokens"; asked after the warm-up pass."""
        return embeddings

    def tower_values(self, layer: int, values: Float[Array, "R P C"], valid: Bool[Array, "R P"]) -> jax.Array:
        """The values of patches in the attention of a layer of the tower, all heads' channels, for the warm-up "tower".

        Args:
            valid: patches that are there, and no filler.
        """
        return values

    def kept_tokens(
        self, image_id: Int[Array, "B T"], image_count: int, salience: Float[Array, "B T"]
    ) -> Bool[Array, "B T"]:
        """Which columns the contrast branch reads, for "fewer_tokens".

        Args:
            image_id: 0 text, k >= 1 the k-th image, -1 padding.
            image_count: no sample has more images; static.
            salience: of image columns, how much the tower's class token looks at them; 0 elsewhere.
        """
        return image_id >= 0

    def contrast_picture(self, height: int, width: int) -> Float[np.ndarray, "3 Y X"]:
        """The contrast branch's picture, for "picture", in pixel values of that size; here an empty one."""
        return np.zeros((3, height, width), np.float32)

    def contrast_words(self) -> str | tuple[int, ...]:
        """What the contrast branch reads in the place of the system prompt, for "text": a text, or token ids."""
        return ()

    def keeps_instruction(self) -> bool:
        """Where a tower reads an instruction: whether it stays behind `contrast_words` or gives way to them; static."""
        return True

    def exits(self, num_layers: int) -> tuple[int, ...]:
        """Hidden states whose logits `combine` wants: 0 the embeddings, i what layer i - 1 put out. Static."""
        return ()

    def probe(self) -> Transform:
        """The edits of a warm-up pass over 2 B samples, B prompts with their images and then the same without them.

        So both are run in lock-step, and what a layer's rows are with and without images can decide on its edit.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for a probe and has none")

    def primed(self, seen: Seen) -> "Method":
        """The method to go on with, given what the warm-up pass saw."""
        return self

    def start(self, batch: int) -> Any:
        """Memory from step to step of a generation of `batch` samples (a pytree of arrays, `[B, ...]` each)."""
        return ()

    @property
    def combines(self) -> bool:
        """Whether `combine` makes logits of its own: static. It has a rule, and something to apply it to."""
        own = type(self).combine is not Method.combine
        return own and (len(self.branches()) > 1 or type(self).exits is not Method.exits)

    @property
    def step_by_step(self) -> bool:
        """Whether a decode step's edits follow from those of earlier ones, so that they cannot be made at once; static.

        A `remember` that returns what it is given behind the prompt says no.
        """
        return type(self).remember is not Method.remember

    @property
    def independent_rows(self) -> bool:
        """Whether a sample's answer follows from its own row alone, in whatever columns its tokens lie; static.

        Continuous batching needs that: it gives the row of an answer that has ended to another prompt.
        """
        return not self.primes and type(self).remember is Method.remember

    def remember(self, carry: Any, kept: Any) -> Any:
        """What the edits of later steps need of this one (a pytree of arrays, `[B, ...]` each).

        Args:
            carry: the main branch's carry after the last layer.
            kept: what the step before returned; None behind the prompt.
        """
        return kept

    def recalled(self, kept: Any) -> "Method":
        """The method whose edits a decode step takes, given what `remember` returned in the step before."""
        return self

    def combine(self, readout: Readout, memory: Any) -> tuple[Float[Array, "B V"], Any]:
        """Next-token logits from what the step computed.

        Args:
            readout: raw logits of the branches and early exits.
            memory: what `start` or the step before returned.

        Returns:
            Logits to sample from, -inf where a token is ruled out, and the memory for the next step.
        """
        return readout.main, memory


@dataclass_transform(frozen_default=True, field_specifiers=(strength, switch, data, fitted))
def frozen(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method a frozen dataclass and a pytree, without a name for the command line.

    JAX puts what it likes into the leaves of a tree (markers, specs, stacked arrays), so nothing is checked where it
    builds one.

    Raises:
        LVLMError: the class cannot be a dataclass.
    """
    own = vars(cls).get("__dataclass_params__")
    if own is not None and not own.frozen:
        raise LVLMError(f"{cls.__name__} is a dataclass that can change; leave @dataclass out")
    if own is None:
        try:
            cls = dataclasses.dataclass(frozen=True)(cls)
        except (TypeError, ValueError) as error:  # a field without a type, a mutable default
            raise LVLMError(f"{cls.__name__}: {error}") from error
    static = tuple(field.name for field in dataclasses.fields(cls) if field.metadata.get("static"))
    leaves = tuple(field.name for field in dataclasses.fields(cls) if not field.metadata.get("static"))
    keys = tuple(map(jax.tree_util.GetAttrKey, leaves))

    def flatten(method):
        return [getattr(method, name) for name in leaves], tuple(getattr(method, name) for name in static)

    def flatten_with_keys(method):
        children, structure = flatten(method)
        return list(zip(keys, children, strict=True)), structure

    def unflatten(structure, children):
        method = object.__new__(cls)
        for name, value in zip((*static, *leaves), (*structure, *children), strict=True):
            object.__setattr__(method, name, value)
        return method

    with contextlib.suppress(ValueError):  # it is a pytree already
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def sources(method: Method | None) -> Iterator[Source]:
    """Where what was fitted or learned for a method and its members comes from."""
    if getattr(method, "source", None) is not None:
        yield method.source
    for member in getattr(method, "members", (method,)):
        for field in dataclasses.fields(member) if member is not None else ():
            if field.metadata.get("fitted") and getattr(member, field.name) is not None:
                yield getattr(member, field.name).source


def contrast_kind(method: Method | None) -> str:
    """Which of CONTRAST_PROMPTS the contrast branch reads; "same" also without one.

    Raises:
        LVLMError: the method names another.
    """
    if method is None or len(method.branches()) < 2:
        return "same"
    kind = method.contrast_prompt()
    if kind not in CONTRAST_PROMPTS:
        raise LVLMError(
            f"{method.label}: contrast_prompt() is {kind!r}; expected one of {', '.join(map(repr, CONTRAST_PROMPTS))}"
        )
    return kind


def contrasted(
    main: Float[Array, "B V"],
    contrast: Float[Array, "B V"],
    alpha: Float[Array, "#B #V"] | Strength,
    beta: Strength | Soft,
) -> Float[Array, "B V"]:
    """(1 + α) l - α l̃ on plausible tokens, -inf elsewhere."""
    return plausible((1 + alpha) * main - alpha * contrast, main, beta)
