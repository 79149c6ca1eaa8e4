"""`LVLM`, the public interface: thin wrappers over pure functions of `generation`.

Users may jit, shard, vmap and differentiate those functions themselves.
"""

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
from lvlm_jax.generation import answer, branches, decode_loop, defaults, replay, scheduler, streaming, sweep
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
        folder: the checkpoint's folder; None if the parameters do not come from a checkpoint.
        mesh: the devices, or None for the default device.
        generation_config, allow_urls: see `from_pretrained`.
        adapter: the adapter's folder or hub id; None without an adapter.

    Raises:
        LVLMError: the shapes of the parameters differ from the configuration's.
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
            dtype: number format of weights, caches and products: "float32", "bfloat16", "float16" or "auto"
                (see `weights.names`).
            mesh: devices to spread the parameters over (`parallel.make_mesh`, `parallel.mesh_for`).
            vision_tower: CLIP folder of an original LLaVA checkpoint that comes without its tower.
            adapter: folder or hub id of a PEFT LoRA adapter, which stays beside the weights until they are saved.
            quant: "int8" keeps the decoder's weights as 8-bit integers and computes in `dtype` (`weights.quantize`).
            generation_config: "checkpoint" or "plain", see `generation.defaults`.
            allow_urls: whether images in messages are downloaded from `http` and `https` addresses.

        Raises:
            LVLMError: the checkpoint or the adapter cannot be used; the message says why.
        """
        number_type, generation_config = (
            weights.parameter_dtype(names.dtype(dtype)),
            defaults.check_choice(generation_config),
        )
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
        """Writes a Hugging Face checkpoint that transformers can load, with adapters merged into the weights.

        Raises:
            LVLMError: the folder exists already or cannot be written, or the model is quantized.
        """
        return weights.save_checkpoint(folder, lora.merge(self.params), self.config, self.folder, overwrite=overwrite)

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's transformers processor, loaded on first use. Raises `LVLMError` if it has none."""
        if self.folder is None:
            raise LVLMError("this model was not read from a folder, so it has no processor; prepare arrays")
        return load.load_processor(self.folder, self.config)

    @cached_property
    def hash(self) -> str | None:
        """The hash of the checkpoint and its adapter; None if the parameters do not come from a checkpoint."""
        adapter = self.adapter and weights.resolve_checkpoint(self.adapter)
        return self.folder and model_hash(self.folder, adapter)

    def _method(self, method: Any) -> Method | None:
        return method_for(method, lambda: self.hash, str(self.folder or "this model"))

    @property
    def host(self) -> Host:
        """Devices and tokenizers, as the functions of `generation` take them."""
        has_processor = self.folder is not None and load.has_processor(self.folder, self.config)
        tokenizer = (lambda: self.processor.tokenizer) if has_processor else None
        return Host(self.mesh, tokenizer, lambda: load.words_tokenizer(self.processor))

    def _call(self, messages: Any, method: Any) -> tuple[dict, FamilyConfig, Inputs, Method | None]:
        """The first arguments of most functions in `generation`."""
        return self.params, self.config, self.prepare(messages), self._method(method)

    def _settled(self, decoding: Decoding, choice: str | None = None) -> Decoding:
        """Fills in the checkpoint's settings if `choice` (by default the model's) is "checkpoint"."""
        return defaults.with_defaults(decoding, choice or self.generation_config, self.folder)

    def prepare(self, messages: inputs.Messages | Inputs) -> Inputs:
        """Turns HF chat messages (one conversation or a list) or a HF processor's arrays into a token layout.

        Raises:
            LVLMError: malformed messages, an unreadable image, a placeholder without an image, or a prompt longer than
                the context.
        """
        if isinstance(messages, Inputs):
            return messages
        if isinstance(messages, Mapping):
            return inputs.from_arrays(messages, self.config)
        return inputs.from_messages(self.processor, self.config, messages, self.allow_urls)

    def encode_images(self, images: Sequence[Any]) -> list[inputs.EncodedImage]:
        """Runs the vision tower once; the results can replace the images in messages.

        Args:
            images: paths, PIL images or arrays.

        Raises:
            LVLMError: an image is unreadable, there is no processor, or the family's image tokens depend on more than
                the image.
        """
        inputs.check_encodes_ahead(self.config)
        pixels = inputs.pixels_of(self.processor, images, self.allow_urls)
        return branches.encode_images(self.params, self.config, pixels, self.mesh)

    def logits(self, prompt: Any, method: Method | str | None = None) -> Float[Array, "B U V"]:
        """Logits of the main branch of `method` at every prompt token, in one pass without a cache.

        The U columns are those of the given arrays or, for messages, those of the longest prompt. Logits at padding are
        meaningless.
        """
        return branches.logits(*self._call(prompt, method), self.mesh)

    def read(self, prompt: Any, tap: Tap, method: Method | str | None = None) -> Tapped:
        """The attention weights or hidden states that `tap` names, from one forward pass over a prompt."""
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
            max_length: how many tokens the cache must have room for, prompt included; by default 128 more than the
                prompt has.
            share_prefix: False runs the whole prompt once per branch, for comparison.
            tap: what each step returns besides logits; True means the attention of the last row in all layers and
                heads.
        """
        *model, prompt, method = self._call(prompt, method)
        tap = tap if isinstance(tap, Tap) else Tap(layers=None if tap else ())
        capacity = branches.answer_capacity(prompt, max_length)
        return branches.prefill(*model, prompt, method, capacity, self.host, share_prefix, tap)

    def prefill_arguments(
        self, prompt: Any, method: Method | str | None = None, max_length: int | None = None
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments that `prefill` passes to `generation.forward.prefill`, for users who lower, vmap or time it."""
        *model, prompt, method = self._call(prompt, method)
        return branches.prefill_arguments(
            *model, prompt, method, branches.answer_capacity(prompt, max_length), self.host
        )

    def decode(self, state: State, tokens: Int[Array, "B"] | Sequence[int]) -> tuple[State, Step]:
        """Appends one token per sample and returns the next logits. `state` is donated.

        Raises:
            LVLMError: the cache is full.
        """
        return decode_loop.decode(self.params, self.config, state, tokens)

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
            max_new_tokens, ..., length_penalty: see `generation.settings.Decoding`.
            generation_config: "checkpoint" or "plain" for this call; None for the model's own setting.

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
        """Answers any number of conversations by continuous batching: when an answer ends, the next conversation
        starts.

        Args:
            requests: conversations, each with its seed; the iterable is read as needed.
            batch_size: how many answers are generated at once.

        Yields:
            A conversation's number (from 0) with its answer or its error, in the order in which the answers end.

        Raises:
            LVLMError: unusable settings, or a method whose rows cannot be replaced (`scheduler.obstacle`).
        """
        sampling = (temperature, top_k, top_p, repetition_penalty)
        decoding = Decoding(max_new_tokens, *sampling, stop=stop, stop_token_ids=stop_token_ids)
        options = (self._method(method), self._settled(decoding), batch_size, self.host)
        return scheduler.generate_many(self.params, self.config, self.prepare, requests, *options)

    def sweep(
        self,
        messages: Any,
        methods: Sequence[Method | str],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[Output]:
        """Answers a batch as `generate` does, for each of many strengths of one method, in one program."""
        decoding = self._settled(Decoding(max_new_tokens, temperature, seed=seed))
        methods = [self._method(method) for method in sweep.as_list(methods)]
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
        """Yields the answer to one conversation piece by piece. Arguments and errors are those of `generate`."""
        decoding = Decoding(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop, stop_token_ids)
        return streaming.stream(*self._call(messages, method), self._settled(decoding), self.host)

    def attention(
        self, messages: Any, tokens: Sequence[Sequence[int]], method: Method | str | None = None
    ) -> list[Float[np.ndarray, "L T H N"]]:
        """How much the main branch attended to each image token while it produced given answers.

        Args:
            messages, method: those of the `generate` call that gave the answers.
            tokens: the T answer tokens of each conversation, as in `Output.tokens`.

        Returns:
            For each conversation, the attention weights of its N image tokens, in the row that produced each token.
        """
        return replay.image_attention(*self._call(messages, method), tokens, self.host)
