"""The public face: load a checkpoint, prepare prompts, generate with or without a method, save.

Every call is a thin wrapper over a pure function of `generation/`, which users may jit, shard, vmap and
differentiate themselves.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax import models, parallel, weights
from lvlm_jax.attention import Tap, Tapped
from lvlm_jax.compilation import enable_cache
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import beam, branches, drivers, opera, scheduler, sweep
from lvlm_jax.generation.output import Output, read_output, stop_strings
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.generation.state import Prompt, State, Step
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import OTHER_PICTURES
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import inputs
from lvlm_jax.processors.layout import Inputs, bucket
from lvlm_jax.processors.load import has_processor, load_processor
from lvlm_jax.processors.text import StreamWriter
from lvlm_jax.weights import lora, quantize
from lvlm_jax.weights.checkpoint import read_optional
from lvlm_jax.weights.peft import load_adapter

DTYPES = ("float32", "bfloat16", "float16")
STOP_STRING_INTERVAL = 16  # tokens between two looks for stop strings


class LVLM:
    """A vision-language model: parameters, configuration, processor.

    Attributes:
        params: the parameters, a plain nested dict of arrays.
        config: the configuration.
        folder: where the checkpoint was read from; None for parameters made elsewhere.
        mesh: the devices, or None for the default device.
    """

    def __init__(
        self, params: dict, config: FamilyConfig, folder: str | os.PathLike | None = None, mesh=None
    ):
        self.params = params
        self.config = config
        self.folder = None if folder is None else Path(folder)
        self.mesh = mesh

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike,
        dtype: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        vision_tower: str | os.PathLike | None = None,
        adapter: str | os.PathLike | None = None,
        quant: str | None = None,
    ) -> "LVLM":
        """Loads a Hugging Face checkpoint.

        Args:
            path_or_hub_id: a folder, or the id of a repository on the hub.
            dtype: "float32", "bfloat16" or "float16", of weights, caches and products.
            mesh: devices to spread the parameters over (`parallel.make_mesh`).
            vision_tower: CLIP folder of an original LLaVA checkpoint that comes without its tower.
            adapter: folder or hub id of a PEFT LoRA adapter, which stays beside the weights until they are saved.
            quant: "int8" keeps the decoder's weights as 8-bit integers and computes in `dtype` (`weights.quantize`).

        Raises:
            LVLMError: anything about the checkpoint or the adapter that cannot be used, named.
        """
        if str(np.dtype(dtype) if dtype == np.float32 else dtype) not in DTYPES:
            raise LVLMError(f"dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")
        enable_cache()
        folder = weights.resolve_checkpoint(path_or_hub_id)
        config = models.config_from_hf(weights.read_config(folder, vision_tower))
        config = _with_stop_tokens(config, folder)
        place = parallel.parameter_sharding(mesh) if mesh is not None else None
        params = weights.load_parameters(folder, config, jnp.dtype(dtype), place, vision_tower, quant)
        if adapter is not None:
            params = load_adapter(adapter, params, config)
        return cls(params, config, folder, mesh)

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's transformers processor; read when first needed.

        Raises:
            LVLMError: the checkpoint came without a folder or without processor files.
        """
        if self.folder is None:
            raise LVLMError(
                "this model was not read from a folder, so it has no processor; give arrays to prepare()"
            )
        return load_processor(self.folder, self.config)

    def prepare(
        self, messages: inputs.Conversation | Sequence[inputs.Conversation] | Mapping | Inputs
    ) -> Inputs:
        """Lays out HF chat messages (one conversation or a list), or the arrays of a HF processor.

        Raises:
            LVLMError: malformed messages, unreadable images, placeholders without images, a prompt beyond the context.
        """
        if isinstance(messages, Inputs):
            return messages
        if isinstance(messages, Mapping):
            return inputs.from_arrays(messages, self.config)
        return inputs.from_messages(self.processor, self.config, messages)

    def encode_images(self, images: Sequence[Any]) -> list[inputs.EncodedImage]:
        """Runs the tower over pictures, once for all the messages that are to hold them in place of the pictures.

        Args:
            images: paths, PIL images or arrays.

        Raises:
            LVLMError: an unreadable picture, a model without a processor, or one whose image tokens depend on more than
                the picture (`FamilyConfig.tokens_per_image` is None).
        """
        if self.config.tokens_per_image is None:
            raise LVLMError(
                f"pictures of {self.config.model_type} cannot be encoded ahead: their tokens depend on the prompt or "
                "on the picture's size; give the pictures themselves"
            )
        pixels = inputs.pixels_of(self.processor, images)
        tokens = drivers.encode_images(self.params, self.config, parallel.spread(pixels, self.mesh))
        return [
            inputs.EncodedImage(*both)
            for both in zip(pixels, np.asarray(parallel.local(tokens)), strict=True)
        ]

    def logits(self, prompt: Any, method: Method | None = None) -> Float[Array, "B U V"]:
        """Logits at every prompt token, in one pass without a cache, of the main branch of `method`.

        `prompt` is anything `prepare` takes. Columns are those of the arrays that were given (of the longest
        prompt, left-padded, for messages); logits at padding are meaningless.
        """
        prompt = self.prepare(prompt)
        logits, _ = branches.full_forward(self.params, self.config, prompt, method, Tap(), self.mesh)
        return jnp.take_along_axis(logits, prompt.source_columns[..., None], axis=1)

    def read(self, prompt: Any, tap: Tap, method: Method | None = None) -> Tapped:
        """What `tap` asks for, from one forward pass over a prompt, without a cache.

        `prompt` is anything `prepare` takes; rows and columns are those of the prepared layout (left-padded).
        """
        prompt = self.prepare(prompt)
        _, tapped = branches.full_forward(self.params, self.config, prompt, method, tap, self.mesh)
        return tapped

    def prefill(
        self,
        prompt: Any,
        method: Method | None = None,
        max_length: int | None = None,
        share_prefix: bool = True,
        tap: Tap | bool = False,
    ) -> tuple[State, Step]:
        """Runs the prompt and returns the logits of the first answer token.

        Args:
            prompt: anything `prepare` takes.
            method: the method; None for plain decoding.
            max_length: tokens, prompt included, that the state must hold; default 128 more than the prompt.
            share_prefix: False runs the whole prompt once per branch, for comparison.
            tap: what steps return besides logits; True is the attention of the last row in all layers and heads.

        Raises:
            LVLMError: `max_length` leaves no room, or exceeds the context.
        """
        arguments, options = self.prefill_arguments(prompt, method, max_length)
        return drivers.prefill(*arguments, **options, share_prefix=share_prefix, tap=_as_tap(tap))

    def prefill_arguments(
        self, prompt: Any, method: Method | None = None, max_length: int | None = None
    ) -> tuple[tuple, dict[str, Any]]:
        """What `prefill` passes to `generation.forward.prefill`: positional arguments and options.

        For those who lower, vmap or time the pure function themselves. Vision towers have run.
        """
        prompt = self.prepare(prompt)
        longest = int(prompt.lengths.max())
        room = 128 if max_length is None else max_length - longest
        if room < 0:
            raise LVLMError(
                f"max_length is {max_length} and the prompt has {longest} tokens; give at least that many"
            )
        method = branches.primed(self.params, self.config, prompt, method, self.mesh)
        main = branches.embedded(self.params, self.config, prompt, self.mesh)
        contrast, contrast_capacity = self._contrast(prompt, main, method, room)
        return (self.params, self.config, main, method), {
            "window": prompt.window,
            "capacity": bucket(prompt.tokens.shape[1] + room),
            "contrast": contrast,
            "contrast_capacity": contrast_capacity,
            "image_count": prompt.image_count,
        }

    def decode(
        self, state: State, tokens: Int[Array, "B"] | np.ndarray | Sequence[int]
    ) -> tuple[State, Step]:
        """Appends one token per sample and returns the logits of the next. `state` is donated: use the new one.

        Raises:
            LVLMError: the state is full, or not one token per sample.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.shape != state.position.shape:
            raise LVLMError(
                f"tokens have shape {tokens.shape}; expected {state.position.shape}, one per sample"
            )
        if int(state.index) >= state.capacity:
            raise LVLMError(
                f"the state holds {state.capacity} columns and is full; give prefill a larger max_length"
            )
        return drivers.decode_step(self.params, self.config, state, tokens)

    def generate(
        self,
        messages: Any,
        method: Method | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | list[int] = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Output:
        """Answers a batch of conversations.

        Args:
            messages: anything `prepare` takes.
            method: a method of `lvlm_jax.methods`; None for plain decoding.
            max_new_tokens: longest answer; fewer if the context ends first.
            temperature: 0 takes the most likely token.
            top_k, top_p, repetition_penalty: see `Sampling`.
            seed: one number, or one per conversation.
            stop: strings that end an answer; they are not part of it.
            stop_token_ids: tokens that end an answer; default those of the checkpoint.
            num_beams: more than one is a beam search, as transformers does it; OPERA has its own.
            length_penalty: a beam search divides log-probabilities by length to this power.

        Raises:
            LVLMError: unusable messages or settings.
        """
        strings = stop_strings(stop)
        sampling = Sampling.of(temperature, top_k, top_p, repetition_penalty)
        if num_beams != 1 or opera.wanted(method):
            rule = beam.Rule.of(self._stops(stop_token_ids), max_new_tokens, length_penalty)
            return self._output(self._search(messages, method, sampling, num_beams, rule), strings)
        prompt, answers, limit = self._begin(messages, method, max_new_tokens, sampling, seed, stop_token_ids)
        if not strings:
            answers = drivers.run(self.params, self.config, answers, jnp.int32(limit))
            return self._output(answers, strings)
        pause = 1
        while True:
            pause = min(pause + STOP_STRING_INTERVAL, limit)
            answers = drivers.run(self.params, self.config, answers, jnp.int32(pause))
            output = self._output(answers, strings)
            if pause == limit or all(reason == "stop" for reason in output.finish_reason):
                return output

    def generate_many(
        self,
        requests: Iterable[scheduler.Request],
        method: Method | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop_token_ids: Sequence[int] | None = None,
        batch_size: int = 8,
    ) -> Iterator[tuple[int, Output | LVLMError]]:
        """Answers any number of conversations by continuous batching: an answer that ends makes room for another.

        Args:
            requests: conversations, each with its seed; drawn as they are needed.
            method, max_new_tokens, ..., stop_token_ids: as for `generate`.
            batch_size: answers under way at once.

        Yields:
            The number of a conversation, from 0, and its answer, as it would be alone, or what is wrong with it; in
            the order in which answers end.

        Raises:
            LVLMError: unusable settings, or a method whose rows cannot be replaced (`scheduler.obstacle`).
        """
        why = scheduler.obstacle(method, self.mesh)
        if why:
            raise LVLMError(f"continuous batching is not possible: {why}; use generate")
        work = scheduler.Scheduler(
            self.params,
            self.config,
            self.prepare,
            lambda prompt: self.prefill(prompt, method, int(prompt.lengths.max())),
            Sampling.of(temperature, top_k, top_p, repetition_penalty),
            self._stops(stop_token_ids),
            max_new_tokens,
            batch_size,
        )
        for number, found in work.answers(requests):
            yield number, found if isinstance(found, LVLMError) else self._output(found, ())

    def sweep(
        self,
        messages: Any,
        methods: Sequence[Method],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int | list[int] = 0,
    ) -> list[Output]:
        """Answers a batch once for every setting of a method, in one program and one pass over the weights.

        Args:
            messages, max_new_tokens, temperature, seed: as for `generate`.
            methods: one method with different strengths; its switches, layers and variants must be the same.

        Returns:
            One output per setting, equal to that of `generate`.

        Raises:
            LVLMError: unusable messages or settings, or methods that differ in more than strengths.
        """
        if any(opera.wanted(method) for method in methods):
            raise LVLMError(
                "OPERA is a search of its own and cannot be swept; call generate for every setting"
            )
        prompt, limit, room = self._room(messages, max_new_tokens)
        stacked = sweep.stack(
            [branches.primed(self.params, self.config, prompt, method, self.mesh) for method in methods]
        )
        main = branches.embedded(self.params, self.config, prompt, self.mesh)
        contrast, capacity = self._contrast(prompt, main, methods[0], room)
        # Only pictures can depend on a strength; words and left-out images are the same for all.
        varies = contrast is not None and methods[0].contrast_prompt() in OTHER_PICTURES
        if varies:
            others = [self._contrast(prompt, main, method, room)[0] for method in methods[1:]]
            grid = jnp.stack([one.embeddings for one in (contrast, *others)])
            contrast = dataclasses.replace(contrast, embeddings=grid)
        options = {
            "window": prompt.window,
            "capacity": bucket(prompt.tokens.shape[1] + room),
            "contrast_capacity": capacity,
            "image_count": prompt.image_count,
        }
        stop = np.asarray(self.config.eos_token_ids or (-1,), np.int32)
        answers = sweep.run(
            self.params, self.config, main, stacked, contrast, prompt.tokens, Sampling.of(temperature),
            sample_keys(seed, prompt.batch), stop, jnp.int32(limit),
            room=room, contrast_axis=0 if varies else None, options=tuple(options.items()),
        )  # fmt: skip
        points = [
            dataclasses.replace(
                answers,
                **{name: getattr(answers, name)[i] for name in ("tokens", "logprobs", "length", "finished")},
            )
            for i in range(len(methods))
        ]
        return [self._output(point, ()) for point in points]

    def stream(
        self,
        messages: Any,
        method: Method | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """Yields the answer to one conversation piece by piece; arguments as in `generate`.

        Raises:
            LVLMError: unusable messages or settings, or more than one conversation.
        """
        if opera.wanted(method):
            raise LVLMError("OPERA may take words back, so its answer cannot be streamed; use generate")
        strings = stop_strings(stop)
        prompt, answers, limit = self._begin(
            messages, method, max_new_tokens, Sampling.of(temperature, top_k, top_p, repetition_penalty), seed,
            stop_token_ids,
        )  # fmt: skip
        if prompt.batch != 1:
            raise LVLMError(f"stream takes one conversation and got {prompt.batch}; use generate")
        writer = StreamWriter(strings)
        for under_way in drivers.stream(self.params, self.config, answers, limit):
            output = self._output(under_way, strings)
            piece = writer.push(output.text[0], final=output.finish_reason[0] == "stop")
            if piece:
                yield piece
            if output.finish_reason[0] == "stop":
                return
        if rest := writer.push(output.text[0], final=True):
            yield rest

    def attention(
        self, messages: Any, tokens: Sequence[Sequence[int]], method: Method | None = None
    ) -> list[Float[np.ndarray, "L T H N"]]:
        """Where the main branch looked while it produced given answers.

        Args:
            messages: anything `prepare` takes.
            tokens: the answer tokens of each conversation, as `Output.tokens` has them.
            method: the method they were generated with.

        Returns:
            Per conversation the attention weights of every layer and head over its N image tokens (of all its images,
            in order), for the row that produced each of its T tokens.
        """
        prompt = self.prepare(messages)
        longest = max((len(row) for row in tokens), default=0)
        state, step = self.prefill(prompt, method, int(prompt.lengths.max()) + longest, tap=True)
        image = (
            np.pad(
                prompt.image_id, ((0, 0), (0, state.capacity - prompt.tokens.shape[1])), constant_values=-1
            )
            > 0
        )
        rows: list[list[np.ndarray]] = [[] for _ in tokens]
        for index in range(longest):
            seen = np.asarray(parallel.local(step.tapped.attention[:, 0, :, :, 0]))
            for sample, row in enumerate(tokens):
                if index < len(row):
                    rows[sample].append(seen[:, sample][:, :, image[sample, : seen.shape[-1]]])
            fed = [row[index] if index < len(row) else self.config.pad_token_id for row in tokens]
            if index + 1 < longest:
                state, step = self.decode(state, fed)
        return [np.stack(taken, axis=1) if taken else np.zeros((0, 0, 0, 0)) for taken in rows]

    def save_pretrained(self, folder: str | os.PathLike, overwrite: bool = False) -> Path:
        """Writes a Hugging Face checkpoint folder that transformers loads, adapters merged into the weights.

        Raises:
            LVLMError: the folder is in the way or cannot be written, or the model is quantized.
        """
        quantize.refuse(self.params)
        params = lora.merge(self.params)
        return weights.save_checkpoint(folder, params, self.config, self.folder, overwrite=overwrite)

    def _contrast(
        self, prompt: Inputs, main: Prompt, method: Method | None, room: int
    ) -> tuple[Prompt | None, int]:
        def tokenizer() -> Any:
            # Where a tokenizer of its own reads the images' instruction, that is where the words go.
            return getattr(self.processor, "qformer_tokenizer", self.processor.tokenizer)

        return branches.contrast(self.params, self.config, tokenizer, prompt, main, method, room, self.mesh)

    def _begin(
        self,
        messages: Any,
        method: Method | None,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | list[int],
        stop_token_ids: Sequence[int] | None,
    ) -> tuple[Inputs, drivers.Answers, int]:
        """Prefill and first token; also how many tokens may be written."""
        prompt, limit, room = self._room(messages, max_new_tokens)
        state, step = self.prefill(prompt, method, int(prompt.lengths.max()) + room)
        stops = self._stops(stop_token_ids)
        keys = sample_keys(seed, prompt.batch)
        answers = drivers.begin(
            state,
            step.combined,
            prompt.tokens,
            sampling,
            keys,
            np.asarray(stops or (-1,), np.int32),
            room=room,
        )
        return prompt, answers, limit

    def _stops(self, stop_token_ids: Sequence[int] | None) -> tuple[int, ...]:
        return tuple(self.config.eos_token_ids if stop_token_ids is None else stop_token_ids)

    def _search(
        self, messages: Any, method: Method | None, sampling: Sampling, num_beams: int, rule: beam.Rule
    ) -> beam.Found:
        """The best answers of a beam search."""
        if sampling.rules:
            raise LVLMError(
                "a beam search does not sample and knows no repetition penalty; leave temperature and "
                "repetition_penalty out, or use num_beams=1"
            )
        beam.check(method, num_beams)
        prompt, limit, room = self._room(messages, int(rule.limit))
        rule = dataclasses.replace(rule, limit=np.int32(limit))
        length = int(prompt.lengths.max()) + room
        if opera.wanted(method):
            if num_beams not in (1, method.beams):
                raise LVLMError(
                    f"num_beams is {num_beams} and OPERA's beams {method.beams}; give one of them"
                )
            state, step = self.prefill(prompt, None, length, tap=opera.tap(self.config))
            return opera.run(self.params, self.config, state, step.combined, method, rule, room)
        state, step = self.prefill(prompt, method, length)
        search = beam.begin(state, step.combined, beams=num_beams, room=room)
        return beam.run(self.params, self.config, search, rule).hypotheses.found(rule.stop)

    def _room(self, messages: Any, max_new_tokens: int) -> tuple[Inputs, int, int]:
        """The prompt, how many tokens may be written behind it, and for how many there is room."""
        if max_new_tokens < 1:
            raise LVLMError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        prompt = self.prepare(messages)
        longest = int(prompt.lengths.max())
        limit = min(max_new_tokens, self.config.text.max_position_embeddings - longest)
        return prompt, limit, bucket(limit)

    def _output(self, answers: drivers.Answers | beam.Found, strings: tuple[str, ...]) -> Output:
        """Reads the answers so far from the device and cuts them at stop strings."""
        known = self.folder is not None and has_processor(self.folder, self.config)
        return read_output(answers, strings, self.processor.tokenizer if known else None)


def _as_tap(tap: Tap | bool) -> Tap:
    return tap if isinstance(tap, Tap) else Tap(layers=None if tap else ())


def _with_stop_tokens(config: FamilyConfig, folder: Path) -> FamilyConfig:
    """The configuration with the stop tokens of `generation_config.json`, which overrule those of `config.json`."""
    stops = config.stop_tokens(read_optional(folder, "generation_config.json"))
    return dataclasses.replace(config, eos_token_ids=stops)
