"""The public face: thin wrappers over functions of `generation` that users may jit, shard, vmap, differentiate."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax import parallel, weights
from lvlm_jax.attention import Tap, Tapped
from lvlm_jax.compilation import enable_cache
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import answer, branches, defaults, drivers, replay, scheduler, streaming, sweep
from lvlm_jax.generation.host import Host
from lvlm_jax.generation.output import Output
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.generation.state import State, Step
from lvlm_jax.journal.record import model_hash
from lvlm_jax.methods import Method
from lvlm_jax.methods.parse import method_for
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import inputs, load
from lvlm_jax.processors.layout import Inputs
from lvlm_jax.weights import lora, names, peft, plan


class LVLM:
    """A vision-language model: parameters, configuration, processor.

    Attributes:
        params: the parameters, a plain nested dict of arrays.
        config: the configuration.
        folder: where the checkpoint was read from; None for parameters made elsewhere.
        mesh: the devices, or None for the default device.
        generation_config, allow_urls: see `from_pretrained`.
        adapter: where an adapter was read from; None without one.

    Raises:
        LVLMError: parameters of other shapes than the configuration's.
    """

    def __init__(self, params: dict, config: FamilyConfig, folder: str | Path | None = None, mesh=None):
        self.params, self.config, self.mesh, self.generation_config = params, config, mesh, "plain"
        self.allow_urls, self.adapter = False, None
        self.folder = None if folder is None else Path(folder)
        if params:
            plan.check_shapes(params, config)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike,
        dtype: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        vision_tower: str | os.PathLike | None = None,
        adapter: str | os.PathLike | None = None,
        quant: str | None = None,
        generation_config: str = "plain",
        allow_urls: bool = False,
    ) -> "LVLM":
        """Loads a Hugging Face checkpoint.

        Args:
            path_or_hub_id: a folder, a GGUF file of a LLaMA, the id of a repository on the hub, or "pocket" or "smol",
                the models of this package.
            dtype: of weights, caches and products: "float32", "bfloat16", "float16" or "auto", see `weights.names`.
            mesh: devices to spread the parameters over (`parallel.make_mesh`, `parallel.mesh_for`).
            vision_tower: CLIP folder of an original LLaVA checkpoint that comes without its tower.
            adapter: folder or hub id of a PEFT LoRA adapter, which stays beside the weights until they are saved.
            quant: "int8" keeps the decoder's weights as 8-bit integers and computes in `dtype` (`weights.quantize`).
            generation_config: "checkpoint" or "plain", see `generation.defaults`.
            allow_urls: whether images in messages are downloaded from `http` and `https` addresses.

        Raises:
            LVLMError: anything about the checkpoint or the adapter that cannot be used, named.
        """
        number_type, generation_config = weights.parameter_dtype(names.dtype(dtype)), defaults.check(generation_config)
        enable_cache()
        folder = weights.resolve_checkpoint(names.checkpoint(path_or_hub_id))
        config = weights.model_config(folder, vision_tower)
        place = parallel.placing(mesh, config.text.num_heads, config.text.num_kv_heads)
        params = weights.load_parameters(folder, config, number_type, place, vision_tower, quant)
        params = params if adapter is None else peft.load_adapter(adapter, params, config)
        model = cls(params, config, folder, mesh)
        model.adapter, model.generation_config, model.allow_urls = adapter, generation_config, allow_urls
        return model

    def save_pretrained(self, folder: str | os.PathLike, overwrite: bool = False) -> Path:
        """Writes a Hugging Face checkpoint folder that transformers loads, adapters merged into the weights.

        Raises:
            LVLMError: the folder is in the way or cannot be written, or the model is quantized.
        """
        return weights.save_checkpoint(folder, lora.merge(self.params), self.config, self.folder, overwrite=overwrite)

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's transformers processor, read when first needed; an `LVLMError` where it has none."""
        if self.folder is None:
            raise LVLMError("this model was not read from a folder, so it has no processor; prepare arrays")
        return load.load_processor(self.folder, self.config)

    @cached_property
    def hash(self) -> str | None:
        """The hash of the checkpoint, and of an adapter; None for parameters made elsewhere."""
        adapter = self.adapter and weights.resolve_checkpoint(self.adapter)
        return self.folder and model_hash(self.folder, adapter)

    def _method(self, given: Any) -> Method | None:
        return method_for(given, lambda: self.hash, str(self.folder or "this model"))

    @property
    def host(self) -> Host:
        """Devices and tokenizers, as the functions of `generation` take them."""
        speaks = self.folder is not None and load.has_processor(self.folder, self.config)
        tokenizer = (lambda: self.processor.tokenizer) if speaks else None
        return Host(self.mesh, tokenizer, lambda: load.words_tokenizer(self.processor))

    def _call(self, messages: Any, method: Any) -> tuple[dict, FamilyConfig, Inputs, Method | None]:
        """What most functions of `generation` take first."""
        return self.params, self.config, self.prepare(messages), self._method(method)

    def _settled(self, decoding: Decoding, choice: str | None = None) -> Decoding:
        """The settings with the checkpoint's own, where this call or the loading of the model asked for them."""
        return defaults.settled(decoding, choice or self.generation_config, self.folder)

    def prepare(self, messages: inputs.Messages | Inputs) -> Inputs:
        """Lays out HF chat messages (one conversation or a list), or the arrays of a HF processor.

        Raises:
            LVLMError: malformed messages, unreadable images, placeholders without images, a prompt beyond the context.
        """
        if isinstance(messages, Inputs):
            return messages
        if isinstance(messages, Mapping):
            return inputs.from_arrays(messages, self.config)
        return inputs.from_messages(self.processor, self.config, messages, self.allow_urls)

    def encode_images(self, images: Sequence[Any]) -> list[inputs.EncodedImage]:
        """Runs the tower over images (paths, PIL images or arrays) once, for use in place of the images in messages.

        Raises:
            LVLMError: an unreadable image, no processor, or a family whose image tokens depend on more than the image.
        """
        inputs.check_encodes_ahead(self.config)
        pixels = inputs.pixels_of(self.processor, images, self.allow_urls)
        return branches.encode_images(self.params, self.config, pixels, self.mesh)

    def logits(self, prompt: Any, method: Method | str | None = None) -> Float[Array, "B U V"]:
        """Logits at every prompt token, in one pass without a cache, of the main branch of `method`.

        Columns are those of the arrays given (for messages, of the longest prompt); at padding they mean nothing.
        """
        return branches.logits(*self._call(prompt, method), self.mesh)

    def read(self, prompt: Any, tap: Tap, method: Method | str | None = None) -> Tapped:
        """What `tap` asks for, from one forward pass over a prompt without a cache, in the columns of its `prepare`."""
        return branches.full_forward(*self._call(prompt, method), tap, self.mesh)[1]

    def prefill(
        self,
        prompt: Any,
        method: Method | str | None = None,
        max_length: int | None = None,
        share_prefix: bool = True,
        tap: Tap | bool = False,
    ) -> tuple[State, Step]:
        """Runs the prompt and returns the logits of the first answer token.

        Args:
            max_length: tokens that the state must hold, the prompt's at least; default 128 more than the prompt.
            share_prefix: False runs the whole prompt once per branch, for comparison.
            tap: what steps return besides logits; True is the attention of the last row in all layers and heads.
        """
        arguments, options = self.prefill_arguments(prompt, method, max_length)
        tap = tap if isinstance(tap, Tap) else Tap(layers=None if tap else ())
        with parallel.ambient(self.mesh):
            return drivers.prefill(*arguments, **options, share_prefix=share_prefix, tap=tap)

    def prefill_arguments(
        self, prompt: Any, method: Method | str | None = None, max_length: int | None = None
    ) -> tuple[tuple, dict[str, Any]]:
        """What `prefill` passes to `generation.forward.prefill`, for those who lower, vmap or time it themselves."""
        *model, prompt, method = self._call(prompt, method)
        return branches.prefill_arguments(
            *model, prompt, method, branches.answer_capacity(prompt, max_length), self.host
        )

    def decode(self, state: State, tokens: Int[Array, "B"] | Sequence[int]) -> tuple[State, Step]:
        """Appends a token per sample to `state`, which is donated, and returns the next logits. Full: an error."""
        return drivers.decode(self.params, self.config, state, tokens)

    def generate(
        self,
        messages: Any,
        method: Method | str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        generation_config: str | None = None,
    ) -> Output:
        """Answers a batch of conversations.

        Args:
            messages: anything `prepare` takes.
            method: a method of `lvlm_jax.methods`; None for plain decoding.
            max_new_tokens, ..., length_penalty: checked and explained in `generation.settings.Decoding`.
            generation_config: for this call; None as the model was loaded.

        Raises:
            LVLMError: unusable messages or settings.
        """
        sampling = (temperature, top_k, top_p, repetition_penalty, seed)
        decoding = Decoding(max_new_tokens, *sampling, stop, stop_token_ids, num_beams, length_penalty)
        return answer.generate(*self._call(messages, method), self._settled(decoding, generation_config), self.host)

    def generate_many(
        self,
        requests: Iterable[scheduler.Request],
        method: Method | str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        batch_size: int = 8,
    ) -> Iterator[tuple[int, Output | LVLMError]]:
        """Answers any number of conversations by continuous batching: an answer that ends makes room for another.

        Args:
            requests: conversations, each with its seed; drawn as they are needed.
            batch_size: answers under way at once.

        Yields:
            A conversation's number, from 0, and its answer or what is wrong with it, in the order in which answers end.

        Raises:
            LVLMError: unusable settings, or a method whose rows cannot be replaced (`scheduler.obstacle`).
        """
        sampling = (temperature, top_k, top_p, repetition_penalty)
        given = Decoding(max_new_tokens, *sampling, stop=stop, stop_token_ids=stop_token_ids)
        options = (self._method(method), self._settled(given), batch_size, self.host)
        return scheduler.generate_many(self.params, self.config, self.prepare, requests, *options)

    def sweep(
        self,
        messages: Any,
        methods: Sequence[Method | str],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[Output]:
        """Answers a batch, as `generate` does, for each of many strengths of one method, in one program."""
        decoding = self._settled(Decoding(max_new_tokens, temperature, seed=seed))
        methods = [self._method(method) for method in sweep.listed(methods)]
        return sweep.generate(self.params, self.config, self.prepare(messages), methods, decoding, self.host)

    def stream(
        self,
        messages: Any,
        method: Method | str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """Yields the answer to one conversation (more are an error) piece by piece; otherwise as `generate`."""
        decoding = Decoding(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop, stop_token_ids)
        return streaming.stream(*self._call(messages, method), self._settled(decoding), self.host)

    def attention(
        self, messages: Any, tokens: Sequence[Sequence[int]], method: Method | str | None = None
    ) -> list[Float[np.ndarray, "L T H N"]]:
        """Where the main branch looked while it produced given answers.

        Args:
            messages, method: as for the `generate` that gave the answers.
            tokens: the T answer tokens of each conversation, as `Output.tokens` has them.

        Returns:
            Per conversation the weights, in the row that produced each token, of its N image tokens, in order.
        """
        return replay.image_attention(*self._call(messages, method), tokens, self.host)
