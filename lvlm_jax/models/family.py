"""What a model family is: a configuration that answers for it, and a tower and connector before the common decoder.

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
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import DecoderConfig
from lvlm_jax.models.decoder import Decoded
from lvlm_jax.models.pictures import Arrays, Pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyConfig(abc.ABC):
    """The configuration of a model, and what the library asks of its family.

    A subclass must have `from_hf`, `pictures`, `blank` and `token_map`. The other hooks have defaults, which fit a
    family with a processor in transformers that writes one placeholder for each image token.

    Attributes:
        text: the decoder.
        vision: the vision tower; families have classes of their own for it.
        image_token_id: the placeholder: what stands in a prompt for an image token. It may lie behind the vocabulary.
        eos_token_ids: tokens that end an answer.
        pad_token_id: what fills up the prompts of a batch.
        bos_token_id: what a prompt begins with; -1 for none.
        model_type: the family's key in `FAMILIES`.
        hf: the Hugging Face configuration as read, for writing it back; takes no part in equality.
        nested_images: a class attribute; processors are told which images come together in one prompt.
        processor_name: a class attribute; the class of transformers that reads the processor, where it is not the one
            of `model_type`.
        reads_instruction: a class attribute; an image's tokens depend on the text of its prompt (see `instructed`).
        tiled: a class attribute; pictures are cut into tiles beside a view of the whole.
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
        """Checks that tokens named by the configuration have rows in the embedding.

        Raises:
            LVLMError: one has none.
        """
        rows = self.text.vocab_size
        named = {"pad_token_id": (self.pad_token_id,), "eos_token_id": self.eos_token_ids}
        for name, tokens in named.items():
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
            hf: transformers' configuration object of it; None for a family that transformers does not carry.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """

    @classmethod
    def nested(cls, raw: dict) -> dict:
        """`config.json` with the decoder's fields in `text_config`, where transformers expects them."""
        return raw

    @abc.abstractmethod
    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """What the tower takes of all images of a batch; None without images.

        Args:
            parts: what the processor made of the images, one mapping for each call of it.
            prompts: token ids `Int[T]` of each sample, with placeholders.

        Raises:
            LVLMError: arrays that are missing, of other shapes, not finite, or that do not fit the prompts.
        """

    @abc.abstractmethod
    def blank(self) -> Pictures:
        """One empty image of the smallest form, as `pictures` would give it; parameters are created with it."""

    @abc.abstractmethod
    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"] | None:
        """Which of an image's tokens, from 0, shows each place of the picture; None where tokens have no places.

        Args:
            pictures: of `pictures`.
            image: its number among them.
        """

    @property
    def tokens_per_image(self) -> int | None:
        """How many tokens every image takes, if they follow from the picture alone; None otherwise.

        With a number, images can be encoded ahead of their prompts and used in several.
        """
        return None

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Attributes of the processor that older checkpoints leave out, by name; set where its file has none."""
        return {}

    def stop_tokens(self, generation: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens that end an answer, given the checkpoint's `generation_config.json` (empty without one).

        Raises:
            LVLMError: stop words that are not supported.
        """
        given = generation.get("eos_token_id")
        if given is None:
            return self.eos_token_ids
        tokens = tuple(given) if isinstance(given, list) else (given,)
        if not all(type(token) is int for token in tokens):
            raise LVLMError(
                f"generation_config.json: eos_token_id is {str(given)[:60]!r}; expected a token id, or a list of them"
            )
        return tokens

    def mark_images(self, prompt: np.ndarray) -> np.ndarray:
        """A prompt `Int[T]` with placeholders where the family's tokenizer writes other tokens for images.

        Raises:
            LVLMError: a prompt whose images cannot be told.
        """
        return prompt

    def placed(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The prompts, with placeholders where the family's processor leaves them out.

        Args:
            parts: as for `pictures`.
            prompts: token ids `Int[T]` of each sample.

        Raises:
            LVLMError: images that could belong to any of the prompts.
        """
        del parts
        return prompts

    def instructed(self, geometry: Mapping[str, np.ndarray], words: Sequence[int], keep: bool) -> dict[str, np.ndarray]:
        """The geometry of the same images, read with other words; only if `reads_instruction`.

        Args:
            geometry: of `pictures`; empty without images.
            words: ids of the vocabulary in which the instruction is read.
            keep: whether the instruction follows the words, or gives way to them.

        Raises:
            LVLMError: words outside that vocabulary, or an instruction that becomes too long.
        """
        raise NotImplementedError(f"images of {self.model_type} are read without an instruction")

    def shown(self, pictures: Pictures, picture: Callable[[int, int], np.ndarray]) -> Float[np.ndarray, "R ..."]:
        """The tower's pixels if all images showed one picture; by default each row is a picture.

        Args:
            pictures: the images that it replaces.
            picture: gives its pixel values `Float[3, height, width]` at a height and a width.
        """
        return np.broadcast_to(picture(*pictures.pixels.shape[2:]), pictures.pixels.shape)

    def altered(
        self, pictures: Pictures, index: Int[np.ndarray, "R"], change: Callable[[Array, Array], Array]
    ) -> Float[Array, "R ..."]:
        """The tower's pixels with every picture changed; by default each row is a picture.

        Args:
            pictures: the images.
            index: handed on with each row.
            change: makes of pixel values `Float[3, height, width]` and an index others.
        """
        return jax.vmap(change)(jnp.asarray(pictures.pixels), jnp.asarray(index))


class VisionLanguageModel(nn.Module):
    """Base of the families' modules: what generation asks of a model.

    A family makes `language_model` (a `Decoder`) and its tower in `setup`, and says in
    `encode_images(pixels, **geometry)` what becomes of `Pictures`: image tokens in reading order, as `Float[I, P, E]`
    or flat `Float[N, E]`, where tokens behind the last image only fill a bucket. Decoders with deepstack layers are
    given tokens of E (1 + layers) channels.
    """

    config: FamilyConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def embed(
        self, tokens: Int[Array, "B T"], image_tokens: Float[Array, "*N E"] | None = None
    ) -> Float[Array, "B T E"]:
        """Token embeddings, image placeholders replaced by the image tokens in reading order."""
        if image_tokens is None:
            return self.language_model.embed(tokens)
        placeholder = tokens == self.config.image_token_id
        # A placeholder may lie behind the vocabulary; it is replaced, so any word will do.
        embedded = self.language_model.embed(jnp.where(placeholder, 0, tokens))
        flat = image_tokens.reshape(-1, image_tokens.shape[-1]).astype(embedded.dtype)
        embedded = jnp.pad(embedded, ((0, 0), (0, 0), (0, flat.shape[1] - embedded.shape[2])))
        order = jnp.cumsum(placeholder.reshape(-1)).reshape(tokens.shape) - 1
        return jnp.where(placeholder[..., None], flat[jnp.clip(order, 0, flat.shape[0] - 1)], embedded)

    def salience(self, pixels: Float[Array, "R ..."], **geometry: Array) -> Float[Array, "N"]:
        """How much the tower's class token looks at each image token, in reading order.

        Raises:
            LVLMError: the tower has none.
        """
        del pixels, geometry
        raise LVLMError(
            f"the tower of {self.config.model_type} has no class token whose attention could rank image tokens; use "
            "another method"
        )

    def decode(self, x, contexts, caches=None, transforms=None, tap=None) -> Decoded:
        """See `Decoder.__call__`."""
        return self.language_model(x, contexts, caches, transforms, tap)

    def exit_logits(self, hidden: Float[Array, "*T E"], norm: bool) -> Float[Array, "*T V"]:
        """See `Decoder.exit_logits`."""
        return self.language_model.exit_logits(hidden, norm)

    def head(self, hidden: Float[Array, "*T E"]) -> Float[Array, "*T V"]:
        """Next-token logits in float32."""
        return self.language_model.head(hidden)

    def __call__(self, tokens: Int[Array, "B T"], pixels: Float[Array, "R ..."], geometry: dict, context) -> jax.Array:
        """Logits of every row, without a cache; also what creates the parameters."""
        image_tokens = self.encode_images(pixels, **geometry)
        return self.head(self.decode(self.embed(tokens, image_tokens)[None], context).hidden[0])


class Family(NamedTuple):
    """The two classes of a family."""

    config: type[FamilyConfig]
    module: type[VisionLanguageModel]


# By the `model_type` of a `config.json`; every file of this folder adds its own.
FAMILIES: dict[str, Family] = {}

# Families whose published `config.json` has another `model_type`, by that one.
PUBLISHED_AS: dict[str, str] = {}


def family(
    *model_types: str, published_as: str | None = None
) -> Callable[[type[VisionLanguageModel]], type[VisionLanguageModel]]:
    """Registers a module class, and with it the configuration class that annotates its field `config`.

    Args:
        model_types: the family's keys in `FAMILIES`. The key table of `x` is `TABLE` in `weights/x.py`; if there is a
            file `processors/x.py`, its `load` makes the processor.
        published_as: the `model_type` of the published `config.json`, where it is another one.

    Raises:
        ValueError: a model type that another family has.
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
