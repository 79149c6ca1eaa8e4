"""The parts of a model family: a configuration class, and a module with a tower and a connector before the common
decoder.

A family's file defines a subclass of `FamilyConfig` and one of `VisionLanguageModel`, and registers the latter:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MyConfig(FamilyConfig): ...

    @family("my_model_type")
    class MyModel(VisionLanguageModel):
        config: MyConfig
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import DecoderConfig
from lvlm_jax.models.decoder import DecoderOutput
from lvlm_jax.models.pictures import Arrays, Pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyConfig(abc.ABC):
    """The configuration of a model, with the hooks that the library calls.

    A subclass must define `from_hf`, `pictures`, `blank` and `token_map`. The defaults of the other hooks fit a family
    whose processor in transformers writes one placeholder per image token.

    Attributes:
        text: the decoder.
        vision: the vision tower, of a class of the family's own.
        image_token_id: the placeholder of an image token in a prompt. It may be larger than any id of the vocabulary.
        eos_token_ids: tokens that end an answer.
        pad_token_id: the padding token.
        bos_token_id: the beginning-of-text token; -1 for none.
        model_type: the family's key in `FAMILIES`.
        hf: the original Hugging Face configuration, for writing it back; ignored by equality.
        nested_images: class attribute; whether processors get a list of images per prompt.
        processor_name: class attribute; the processor's class in transformers, if it is not that of `model_type`.
        reads_instruction: class attribute; image tokens depend on the text of the prompt (see `instructed`).
        tiled: class attribute; images are split into tiles beside a view of the whole.
    """

    text: DecoderConfig
    vision: Any
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int = -1
    model_type: str
    hf: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    nested_images: ClassVar[bool] = False
    processor_name: ClassVar[str | None] = None
    reads_instruction: ClassVar[bool] = False
    tiled: ClassVar[bool] = False

    def __post_init__(self):
        """Checks that the embedding has a row for every special token.

        Raises:
            LVLMError: a row is missing.
        """
        rows = self.text.vocab_size
        special = {"pad_token_id": (self.pad_token_id,), "eos_token_id": self.eos_token_ids}
        for name, tokens in special.items():
            if stray := [token for token in tokens if token >= rows]:
                raise LVLMError(
                    f"{name} is {stray[0]}, and the model's embedding has rows for 0 to {rows - 1}; correct it in "
                    "config.json or generation_config.json"
                )

    @classmethod
    @abc.abstractmethod
    def from_hf(cls, raw: dict, hf: Any) -> "FamilyConfig":
        """Reads the configuration of a checkpoint.

        Args:
            raw: the dict of `config.json`.
            hf: its configuration object in transformers; None for a family without a class there.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """

    @classmethod
    def nested(cls, raw: dict) -> dict:
        """`config.json` with the decoder's fields moved to `text_config`, where transformers expects them."""
        return raw

    @abc.abstractmethod
    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs for all images of a batch; None without images.

        Args:
            parts: the processor's arrays, one mapping per call of it.
            prompts: token ids `Int[T]` of each sample, with placeholders.

        Raises:
            LVLMError: arrays are missing, have other shapes, are not finite, or do not fit the prompts.
        """

    @abc.abstractmethod
    def blank(self) -> Pictures:
        """One empty image of the smallest size, in the form of `pictures`; used to initialise parameters."""

    @abc.abstractmethod
    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"] | None:
        """For each position of the image, the image token (from 0) that covers it; None if tokens have no positions.

        Args:
            pictures: the result of `pictures`.
            image: the image's index in it.
        """

    @property
    def tokens_per_image(self) -> int | None:
        """How many tokens every image takes; None if images differ in this number, or if their tokens depend on the
        prompt.

        If it is a number, images can be encoded before their prompts and reused.
        """
        return None

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Attributes of the processor that older checkpoints leave out; set if the processor's file lacks them."""
        return {}

    def stop_tokens(self, generation: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens that end an answer, given the checkpoint's `generation_config.json` (empty without one).

        Raises:
            LVLMError: stop words that are not supported.
        """
        eos = generation.get("eos_token_id")
        if eos is None:
            return self.eos_token_ids
        tokens = tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(type(token) is int for token in tokens):
            raise LVLMError(
                f"generation_config.json: eos_token_id is {str(eos)[:60]!r}; expected a token id, or a list of them"
            )
        return tokens

    def mark_images(self, prompt: np.ndarray) -> np.ndarray:
        """Puts placeholders into a prompt `Int[T]` if the family's tokenizer writes other tokens for images.

        Raises:
            LVLMError: the images in the prompt are ambiguous.
        """
        return prompt

    def placed(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The prompts, with placeholders added if the family's processor leaves them out.

        Args:
            parts: as for `pictures`.
            prompts: token ids `Int[T]` of each sample.

        Raises:
            LVLMError: it is unclear which prompt an image belongs to.
        """
        del parts
        return prompts

    def instructed(self, geometry: Mapping[str, np.ndarray], words: Sequence[int], keep: bool) -> dict[str, np.ndarray]:
        """The geometry of the same images read with another instruction; only if `reads_instruction`.

        Args:
            geometry: the geometry of `pictures`; empty without images.
            words: token ids in the vocabulary of the instruction.
            keep: whether the old instruction follows the words, or is replaced by them.

        Raises:
            LVLMError: words outside that vocabulary, or an instruction that becomes too long.
        """
        raise NotImplementedError(f"images of {self.model_type} are read without an instruction")

    def valid_patches(self, geometry: Mapping[str, np.ndarray]) -> Bool[np.ndarray, "R P"] | None:
        """Which patches of each row of the tower's pixels are not filler, given the geometry; None for all."""
        return geometry.get("valid")

    def shown(self, pictures: Pictures, picture: Callable[[int, int], np.ndarray]) -> Float[np.ndarray, "R ..."]:
        """The tower's pixels if all images showed the same image; by default each row is an image.

        Args:
            pictures: the images that it replaces.
            picture: returns its pixel values `Float[3, height, width]` for a height and a width.
        """
        return np.broadcast_to(picture(*pictures.pixels.shape[2:]), pictures.pixels.shape)

    def altered(
        self, pictures: Pictures, index: Int[np.ndarray, "R"], change: Callable[[Array, Array], Array]
    ) -> Float[Array, "R ..."]:
        """The tower's pixels with every image changed; by default each row is an image.

        Args:
            pictures: the images.
            index: second argument of `change` for each row.
            change: maps pixel values `Float[3, height, width]` and an index to new pixel values.
        """
        return jax.vmap(change)(jnp.asarray(pictures.pixels), jnp.asarray(index))


class VisionLanguageModel(nn.Module):
    """Base class of the families' modules, with the functions that generation calls.

    A family creates `language_model` (a `Decoder`) and its tower in `setup`, and defines `encode_images(pixels,
    **geometry)`, which turns `Pictures` into image tokens in reading order: `Float[I, P, E]`, or flat `Float[N, E]`, in
    which tokens after the last image are filler. For a decoder with deepstack layers, tokens have E (1 + layers)
    channels.
    """

    config: FamilyConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def embed(
        self, tokens: Int[Array, "B T"], image_tokens: Float[Array, "*N E"] | None = None
    ) -> Float[Array, "B T E"]:
        """Token embeddings, with placeholders replaced by the image tokens in reading order."""
        if image_tokens is None:
            return self.language_model.embed(tokens)
        placeholder = tokens == self.config.image_token_id
        # A placeholder may have no row in the embedding; it is replaced anyway, so any row will do.
        embedded = self.language_model.embed(jnp.where(placeholder, 0, tokens))
        flat = image_tokens.reshape(-1, image_tokens.shape[-1]).astype(embedded.dtype)
        embedded = jnp.pad(embedded, ((0, 0), (0, 0), (0, flat.shape[1] - embedded.shape[2])))
        order = jnp.cumsum(placeholder.reshape(-1)).reshape(tokens.shape) - 1
        return jnp.where(placeholder[..., None], flat[jnp.clip(order, 0, flat.shape[0] - 1)], embedded)

    def salience(self, pixels: Float[Array, "R ..."], **geometry: Array) -> Float[Array, "N"]:
        """The attention that the tower's class token pays to each image token, in reading order.

        Raises:
            LVLMError: the tower has no class token.
        """
        del pixels, geometry
        raise LVLMError(
            f"the tower of {self.config.model_type} has no class token whose attention could rank image tokens; use "
            "another method"
        )

    def decode(self, x, contexts, caches=None, transforms=None, tap=None) -> DecoderOutput:
        """See `Decoder.__call__`."""
        return self.language_model(x, contexts, caches, transforms, tap)

    def exit_logits(self, hidden: Float[Array, "*T E"], norm: bool) -> Float[Array, "*T V"]:
        """See `Decoder.exit_logits`."""
        return self.language_model.exit_logits(hidden, norm)

    def head_with_exits(
        self, last: Float[Array, "N *T E"], exits: Float[Array, "X *T E"], norm: bool
    ) -> tuple[Float[Array, "N *T V"], Float[Array, "X *T V"]]:
        """See `Decoder.head_with_exits`."""
        return self.language_model.head_with_exits(last, exits, norm)

    def head(self, hidden: Float[Array, "*T E"]) -> Float[Array, "*T V"]:
        """Next-token logits in float32."""
        return self.language_model.head(hidden)

    def __call__(self, tokens: Int[Array, "B T"], pixels: Float[Array, "R ..."], geometry: dict, context) -> jax.Array:
        """Logits of every row, without a cache; also used to initialise the parameters."""
        image_tokens = self.encode_images(pixels, **geometry)
        return self.head(self.decode(self.embed(tokens, image_tokens)[None], context).hidden[0])


class Family(NamedTuple):
    """The two classes of a family."""

    config: type[FamilyConfig]
    module: type[VisionLanguageModel]


# By the `model_type` of `config.json`; every file of this folder adds its family.
FAMILIES: dict[str, Family] = {}

# Families whose published `config.json` has another `model_type`, by that `model_type`.
PUBLISHED_AS: dict[str, str] = {}


def family(
    *model_types: str, published_as: str | None = None
) -> Callable[[type[VisionLanguageModel]], type[VisionLanguageModel]]:
    """Registers a module class, and with it the configuration class that annotates its field `config`.

    Args:
        model_types: the family's keys in `FAMILIES`. The key table of `x` is `TABLE` in `weights/x.py`; if there is a
            file `processors/x.py`, its `load` makes the processor.
        published_as: the `model_type` of the published `config.json`, if it is another one.

    Raises:
        ValueError: another family already has the model type.
    """

    def register(module: type[VisionLanguageModel]) -> type[VisionLanguageModel]:
        for model_type in model_types:
            if model_type in FAMILIES:
                other = FAMILIES[model_type].module
                raise ValueError(f"model_type {model_type!r} of {module.__name__} is that of {other.__name__}")
            FAMILIES[model_type] = Family(module.__annotations__["config"], module)
        if published_as is not None:
            PUBLISHED_AS[published_as] = model_types[0]
        return module

    return register
