"""`Method`: a frozen dataclass whose numbers are array leaves and whose switches are static.

    @register("dim")
    class Dim(Method):
        kappa: Strength = strength(0.5, "share of the image logits that is removed")

        def logits(self, site, logits):
            return jnp.where(site.image[:, None, None, :], logits * (1 - self.kappa), logits)

`Dim(kappa=0.3)` can be passed to every public function, swept, `vmap`ped and differentiated; a new `kappa` compiles
nothing.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention import Transform
from lvlm_jax.attention.transform import STAGES, overrides
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import checks
from lvlm_jax.methods.tower import TowerEdit

Strength = float | np.floating | jax.Array

FORMS = ("model", "layer", "head")  # one number, one per layer, or one per layer and head

# How the contrast branch's prompt differs from the main one. "same": not at all, so rows before the edits are shared;
# "pixels" and "altered": other pixels, as the tower receives them or as whole images; "picture": another image;
# "tokens": changed image tokens; "fewer_tokens": some image tokens are left out; "no_image": no images; "text": other
# words instead of the system prompt.
CONTRAST_PROMPTS = ("same", "pixels", "altered", "picture", "tokens", "fewer_tokens", "no_image", "text")
OTHER_PICTURES = ("pixels", "altered", "picture")
OTHER_TOKENS = (*OTHER_PICTURES, "tokens")  # the same layout, other image tokens
OTHER_LAYOUTS = ("fewer_tokens", "no_image", "text")

# Results of the warm-up pass that a method can request: the fields of `WarmUp`.
WARM_UP_FIELDS = ("hidden", "attention", "tower", "probe")


class WarmUp(NamedTuple):
    """Results of the warm-up pass over a prompt; a field that no method requests is None.

    Attributes:
        hidden: all hidden states of the last prompt token, with and without images.
        attention: weights of the last prompt row, averaged over heads.
        tower: the decoder's input, with image tokens from a tower edited by `Method.tower_values`.
        probe: the carry of `Method.probe` after the last layer.
    """

    hidden: tuple[Float[Array, "L B E"], Float[Array, "L B E"]] | None = None
    attention: Float[Array, "L B T"] | None = None
    tower: Float[Array, "B T E"] | None = None
    probe: Any = None


class Readout(NamedTuple):
    """The results of a step, from which a method makes the next-token logits.

    Attributes:
        main, contrast: raw logits of the branches; `contrast` is None without a second branch.
        exits: the main branch's early-exit logits, in the order of `Method.exits`, then those of
            `Method.further_exits`; None if there are none.
        carry: the main branch's carry after the last layer.
        later_branches: raw logits of the third and later branches; None if there are none.
    """

    main: Float[Array, "B V"]
    contrast: Float[Array, "B V"] | None
    exits: Float[Array, "X B V"] | None
    carry: Any
    later_branches: Float[Array, "N B V"] | None = None


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
        default, doc, low, high: the number's default, its description, its bounds.
        per: the finest form that is allowed, one of FORMS. "layer" and "head" also allow an array with a value per
            layer `[L]`; "head" also one per layer and query head `[L, H]`. A stage then sees the value of its layer;
            for heads it has the shape `[H, 1, 1]`.
        flat: why the number has no gradient and cannot be learned, such as "a threshold"; "" if it has a gradient.
        cuts: whether the number rules tokens out. It then becomes a `cuts.Soft` when answers are scored for training.
        when: the name and the value of a switch; the number is used only if the switch has that value.
    """
    about = {"doc": doc, "low": low, "high": high, "per": per, "flat": flat, "cuts": cuts, "when": when}
    return dataclasses.field(default=default, metadata=about)


def switch(default: Any, doc: str, choices: tuple | None = None) -> Any:
    """A static field of a method. It belongs to the structure: another value compiles another program."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "static": True})


def data(doc: str) -> Any:
    """An optional array leaf that is not a strength, such as an image; None by default."""
    return dataclasses.field(default=None, metadata={"doc": doc, "data": True})


def fitted(doc: str) -> Any:
    """A field for the results of `lvlm fit` (`methods.fitted.Fitted`), given as a file name or as `Fitted`."""
    return dataclasses.field(default=None, metadata={"doc": doc, "fitted": True})


class Method(Transform):
    """Base class: greedy decoding with the attention stages of `Transform`, which change nothing.

    A method with one branch overrides stages and is its own transform. A contrastive method overrides `branches` and
    `combine`, and `contrast_prompt` if the second branch reads another prompt.

    Attributes:
        PRESETS: published settings, by name.
        exit_norm: whether early exits pass through the final norm.
        warm_up_fields: the fields of `WarmUp` that `after_warm_up` needs before the generation begins.
        search: the search that produces the answer (a name in `generation.searches`); None for token-by-token decoding.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    exit_norm: ClassVar[bool] = True
    warm_up_fields: ClassVar[tuple[str, ...]] = ()
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
        """The method's name in tables and plots."""
        return type(self).__name__

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Method":
        """The method with published settings.

        Args:
            name: a key of `PRESETS`.
            changes: settings that override those of the preset.

        Raises:
            LVLMError: there is no preset of that name, or a setting is invalid.
        """
        return cls(**cls.preset_settings(name, changes))

    @classmethod
    def preset_settings(cls, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of `preset`, as keyword arguments of the class.

        Raises:
            LVLMError: there is no preset of that name.
        """
        if name not in cls.PRESETS:
            hint = f"expected one of {', '.join(cls.PRESETS)}" if cls.PRESETS else "it has no presets"
            raise LVLMError(f"{cls.__name__} has no preset {name!r}; {hint}")
        return {**cls.PRESETS[name], **changes}

    def branches(self) -> tuple[Transform | None, ...]:
        """The attention edits of the main branch and of the contrast branch, if there is one; static structure.

        Further branches read the main branch's prompt.
        """
        return (self if any(overrides(self, stage) for stage in STAGES) else None,)

    def positions(
        self, position: Int[Array, "..."], images_before: Int[Array, "..."], image_tokens: Int[Array, "..."]
    ) -> Float[Array, "..."] | None:
        """The position of each image token as post-image rows see it; None for its ordinary position.

        Rotary attention depends only on differences of positions, so moving the rows equals moving the image tokens by
        the opposite amount. The function is elementwise, and its result applies to all layers and branches.

        Args:
            position: ordinary positions of the image tokens, [B, S]; [A, B, S] if the model has A position axes.
            images_before: the part of each position that comes from images. With one axis, it is the number of earlier
                image tokens; with several, the extents of earlier images plus the offset inside the token's own image.
            image_tokens: how much the sample's images add to later positions, [B, 1].
        """
        return None

    def contrast_prompt(self) -> str:
        """The kind of the contrast branch's prompt, one of CONTRAST_PROMPTS; static. If it is one of OTHER_LAYOUTS, the
        branch has no attention edits."""
        return "same"

    def contrast_pixels(self, pixels: Float[Array, "R ..."], image_index: Int[Array, " R"]) -> Float[Array, "R ..."]:
        """The contrast branch's images, if `contrast_prompt` is "pixels".

        Args:
            pixels: as the tower receives them: whole images or tiles [3, Y, X], or one row of patches per image [P, C].
            image_index: number of each row of `pixels` within its sample, from 0.
        """
        return pixels

    def contrast_image(self, picture: Float[Array, "3 Y X"], index: Int[Array, ""]) -> Float[Array, "3 Y X"]:
        """One image of the contrast branch (or one tile), if `contrast_prompt` is "altered".

        Args:
            picture: the main branch's image, as the pixel values that the tower receives, of any size.
            index: number of the image within its sample, from 0.
        """
        return picture

    def contrast_tokens(self, embeddings: Float[Array, "B T E"], image_id: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """The contrast branch's decoder input, if `contrast_prompt` is "tokens"; called after the warm-up pass."""
        return embeddings

    def tower_edit(self) -> TowerEdit | None:
        """The edit of the tower that encodes the main branch's images; None for the plain tower, as at a strength of 0.

        It is called before anything is compiled. The plain tower encodes the other images of a contrast branch, and the
        images in training.
        """
        return None

    def tower_values(self, layer: int, values: Float[Array, "R P C"], valid: Bool[Array, "R P"]) -> jax.Array:
        """Edited values of patches (all heads' channels) in the tower's attention, for the warm-up field "tower".

        Args:
            layer: layer of the tower.
            values: the unedited values.
            valid: patches that are not filler.
        """
        return values

    def keep_tokens(
        self, image_id: Int[Array, "B T"], image_count: int, salience: Float[Array, "B T"]
    ) -> Bool[Array, "B T"]:
        """Which columns the contrast branch keeps, if `contrast_prompt` is "fewer_tokens".

        Args:
            image_id: 0 for text, k >= 1 for the k-th image, -1 for padding.
            image_count: the largest number of images in a sample; static.
            salience: attention that the tower's class token pays to each image column; 0 elsewhere.
        """
        return image_id >= 0

    def contrast_picture(self, height: int, width: int) -> Float[np.ndarray, "3 Y X"]:
        """The contrast branch's image as pixel values, if `contrast_prompt` is "picture"; here an empty image."""
        return np.zeros((3, height, width), np.float32)

    def contrast_words(self) -> str | tuple[int, ...]:
        """The text (or its token ids) that replaces the system prompt, if `contrast_prompt` is "text"."""
        return ()

    def keeps_instruction(self) -> bool:
        """Whether `contrast_words` precede the instruction that a tower reads, or replace it; static."""
        return True

    def exits(self, num_layers: int) -> tuple[int, ...]:
        """Hidden states whose logits `combine` needs: 0 for the embeddings, i for the output of layer i - 1. Static."""
        return ()

    def further_exits(self, carry: Any) -> Float[Array, "X B E"] | None:
        """Further hidden states, computed by the edits, whose logits `combine` needs.

        In `Readout.exits`, these logits follow those of `exits`.

        Args:
            carry: the main branch's carry after the last layer.
        """
        return None

    def probe(self) -> Transform:
        """The edits of a warm-up pass over 2 B samples: B prompts with their images, then the same without images.

        Both halves run in lock-step, so an edit may depend on a layer's rows with and without images.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for a probe and has none")

    def after_warm_up(self, warm_up: WarmUp) -> "Method":
        """The method for the generation, given the results of the warm-up pass."""
        return self

    def start(self, batch: int) -> Any:
        """The memory before the first step of `batch` samples (a pytree of arrays, `[B, ...]` each)."""
        return ()

    @property
    def combines(self) -> bool:
        """Whether `combine` is overridden and has branches or exits to combine; static."""
        own = type(self).combine is not Method.combine
        exits = (type(self).exits, type(self).further_exits) != (Method.exits, Method.further_exits)
        return own and (len(self.branches()) > 1 or exits)

    @property
    def step_by_step(self) -> bool:
        """Whether a decode step's edits depend on those of earlier steps, so that steps cannot run at once; static.

        A method whose `remember` does not depend on the step overrides this with False.
        """
        return type(self).remember is not Method.remember

    @property
    def independent_rows(self) -> bool:
        """Whether a sample's answer depends on its own row alone, whichever columns its tokens occupy; static.

        Continuous batching requires it: when an answer ends, its row is given to another prompt.
        """
        return not self.warm_up_fields and type(self).remember is Method.remember

    def remember(self, carry: Any, previous: Any) -> Any:
        """The data of this step that edits of later steps need (a pytree of arrays, `[B, ...]` each).

        Args:
            carry: the main branch's carry after the last layer.
            previous: the return value of this function in the previous step; None in the pass over the prompt.
        """
        return previous

    def recall(self, previous: Any) -> "Method":
        """The method for the next decode step, given the return value of `remember` in the previous step."""
        return self

    def combine(self, readout: Readout, memory: Any) -> tuple[Float[Array, "B V"], Any]:
        """Next-token logits from the results of a step.

        Args:
            readout: raw logits of the branches and early exits.
            memory: the return value of `start`, or the memory of the previous step.

        Returns:
            Logits to sample from, -inf for tokens that are ruled out; and the memory for the next step.
        """
        return readout.main, memory


@dataclass_transform(frozen_default=True, field_specifiers=(strength, switch, data, fitted))
def frozen(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method a frozen dataclass and a pytree, without a name for the command line.

    JAX may put markers, specs or stacked arrays into the leaves of a tree, so rebuilding from a tree checks nothing.

    Raises:
        LVLMError: the class cannot be a dataclass.
    """
    own = vars(cls).get("__dataclass_params__")
    if own is not None and not own.frozen:
        raise LVLMError(f"{cls.__name__} is a mutable dataclass; leave @dataclass out")
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

    with contextlib.suppress(ValueError):  # already a pytree
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def contrast_kind(method: Method | None) -> str:
    """The kind of the contrast branch's prompt, one of CONTRAST_PROMPTS; "same" without a contrast branch.

    Raises:
        LVLMError: the method's value is not in CONTRAST_PROMPTS.
    """
    if method is None or len(method.branches()) < 2:
        return "same"
    kind = method.contrast_prompt()
    if kind not in CONTRAST_PROMPTS:
        raise LVLMError(
            f"{method.label}: contrast_prompt() is {kind!r}; expected one of {', '.join(map(repr, CONTRAST_PROMPTS))}"
        )
    return kind
