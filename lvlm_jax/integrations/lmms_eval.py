"""Our models in lmms-eval (EvolvingLMMs-Lab/lmms-eval 0.7), under the name `lvlm_jax`.

A request has a text and names a document, from which `doc_to_visual` gets the images. A `<image>` in the text is the
place of the next image; without any, images come first. Requests are answered in batches: equal settings together,
short texts before long ones; images are read when their batch is due. Answers are returned in the order of the
requests.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import searches
from lvlm_jax.generation.output import NOT_FINITE
from lvlm_jax.generation.questions import PLACEHOLDER, conversation
from lvlm_jax.generation.settings import LARGEST_SEED, Decoding
from lvlm_jax.integrations import GENERATION, build_method, decoding, load, whole
from lvlm_jax.journal.log import seed_of
from lvlm_jax.journal.progress import Progress

LONGEST_ANSWER = 1024  # tokens; the limit of lmms-eval's own models if a task has none
OWN = ("pretrained", "dtype", "method", "batch_size", "seed", "likelihood")
LIKELIHOODS = ("logprob", "loss")


@dataclasses.dataclass(frozen=True)
class LazyQuestion:
    """A question whose images are not read yet.

    Attributes:
        text: the task's text.
        visuals: returns the images.
        decoding: how the answer is decoded.
        seed: seed of sampling.
    """

    text: str
    visuals: Callable[[], Sequence]
    decoding: Decoding
    seed: int

    @property
    def messages(self) -> list[dict]:
        return _messages(self.visuals(), self.text)

    @property
    def size(self) -> tuple[int, int]:
        return _size(self.text)


class LVLMJax(lmms):
    """A model of this package, with or without a method, with the interface of lmms-eval.

    Args:
        pretrained: "pocket", a checkpoint folder, or a hub id.
        dtype: "auto" (float32 on a CPU, else bfloat16), "float32", "bfloat16" or "float16".
        method: "none", a method's name, or several joined by +.
        batch_size: number of requests that are answered at once.
        seed: seed of sampling; every document has its own random stream.
        likelihood: the values of `loglikelihood`. "logprob": the log-probability of the continuation, a sum over its
            tokens, as lmms-eval documents. "loss": minus the mean over the tokens, as lmms-eval's own models return
            and its multiple-choice tasks expect.
        fields: settings of the method (`alpha=3`, `preset=llava-1.5/pope`).

    Raises:
        LVLMError: a model, method or setting cannot be used.
    """

    is_simple = True
    # lmms-eval reads this if it runs as several processes; JAX chooses the model's devices.
    device = "cpu"

    def __init__(
        self,
        pretrained: str | None = None,
        dtype: str = "auto",
        method: str = "none",
        batch_size: int | str = 1,
        seed: int = 0,
        likelihood: str = "logprob",
        **fields: Any,
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise LVLMError(f"likelihood is {likelihood!r}; expected one of {', '.join(LIKELIHOODS)}")
        self.method = build_method(str(method), fields, OWN)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.seed = whole("seed", seed, 0, LARGEST_SEED)
        self.likelihood = likelihood
        self.model = load(pretrained, dtype)
        self._ignored: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "LVLMJax":
        """Makes the model from `--model_args`, which take precedence over flags (`--batch_size` is always given).

        Raises:
            LVLMError: the string is not `key=value` pairs, or the constructor refuses them.
        """
        try:
            parsed = simple_parse_args_string(arg_string)
        except ValueError as error:
            raise LVLMError(f"model arguments are {arg_string!r}; expected key=value,key=value") from error
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**flags | parsed)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests `(text, settings, doc_to_visual, doc_id, task, split)`.

        Raises:
            LVLMError: settings, images or placeholders cannot be used.
        """
        streams = self._streams([request.args[3:6] for request in requests])
        questions = []
        for request, seed in zip(requests, streams, strict=True):
            text, settings, doc_to_visual, *place = request.args
            questions.append(LazyQuestion(text, self._visuals(doc_to_visual, *place), self._decoding(settings), seed))
        answers = [""] * len(requests)
        for number, answer in self._answers(questions):
            answers[number] = answer
            self.cache_hook.add_partial("generate_until", requests[number].args[:2], answer)
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """For each request, the answers of its rounds.

        A request is `(text, settings, doc_to_visual, doc_to_text, doc_id, task, split)`. After each round,
        `doc_to_text` returns the next images and text, whether this was the last round, the answers so far, and a value
        that it gets back in the next round.

        Raises:
            LVLMError: settings, images or placeholders cannot be used.
        """
        streams = self._streams([request.args[4:7] for request in requests])
        questions = {}
        for number, request in enumerate(requests):
            text, settings, doc_to_visual, _, *place = request.args
            visuals = self._visuals(doc_to_visual, *place)
            questions[number] = LazyQuestion(text, visuals, self._decoding(settings), streams[number])
        answers: list[list[str]] = [[] for _ in requests]
        values_for_next_round: list[Any] = [None] * len(requests)
        index = 0
        while questions:
            numbers = list(questions)
            for place, answer in self._answers(list(questions.values())):
                answers[numbers[place]].append(answer)
            index += 1
            for number in numbers:
                doc_to_text, *place = requests[number].args[3:]
                visuals, text, last, answers_so_far, values_for_next_round[number] = doc_to_text(
                    self._document(*place),
                    previous_output=answers[number],
                    round_idx=index,
                    previous_round_info=values_for_next_round[number],
                )
                answers[number] = list(answers_so_far)
                if last:
                    del questions[number]
                    self.cache_hook.add_partial(
                        "generate_until_multi_round", requests[number].args[:2], answers[number]
                    )
                else:
                    questions[number] = dataclasses.replace(
                        questions[number], text=text, visuals=lambda visuals=visuals: visuals or ()
                    )
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How likely each continuation is after its images and text, and whether greedy decoding would write it.

        A request is `(text, continuation or function of the document, doc_to_visual, doc_id, task, split)`, or `(text,
        continuation)` without a document. The chat template puts the continuation in the place of an answer; only the
        continuation's tokens count, without the stop token. With a method, every token is scored by the logits from
        which the method would choose it.

        Raises:
            LVLMError: an empty continuation, images or placeholders that cannot be used, or a method that is a search,
                which has no next-token probabilities.
        """
        if reason := searches.obstacle(self.method):
            raise LVLMError(f"{reason}, so it gives no log-likelihoods; use another method, or none")
        if self.likelihood == "logprob" and any(isinstance(request.args[1], str) for request in requests):
            warnings.warn(
                "lmms-eval 0.7 takes the choice with the lowest value as the answer to a multiple-choice question; "
                "give likelihood=loss for such tasks",
                stacklevel=2,
            )
        pairs = [self._pair(*request.args) for request in requests]
        order = sorted(range(len(pairs)), key=lambda number: _size("".join(pairs[number][:2])))
        results: list[Any] = [None] * len(pairs)
        with Progress(len(pairs), title="lvlm_jax", quiet=self.rank != 0) as progress:
            for numbers in self._batches(order):
                batch = [pairs[number] for number in numbers]
                spare = min(self.batch_size, len(pairs)) - len(batch)
                scored = self._likelihoods(batch + batch[-1:] * spare)
                for number, one in zip(numbers, scored[: len(batch)], strict=True):
                    results[number] = one
                    self.cache_hook.add_partial("loglikelihood", pairs[number][:2], one)
                progress.update(len(numbers))
        return results

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _visuals(self, doc_to_visual: Callable | None, *place: Any) -> Callable[[], Sequence]:
        """A function that reads a document's images; tasks without images have no `doc_to_visual`, or one that returns
        None."""
        return lambda: (doc_to_visual(self._document(*place)) or ()) if doc_to_visual else ()

    def _streams(self, places: Sequence[tuple]) -> list[int]:
        """A seed for each request; a document that occurs again (`--repeats`) gets another seed."""
        times: Counter = Counter()
        seeds = []
        for doc_id, task, split in places:
            name = f"{task}/{split}/{doc_id}"
            seeds.append(seed_of(self.seed, f"{name}/{times[name]}"))
            times[name] += 1
        return seeds

    def _decoding(self, settings: Mapping[str, Any]) -> Decoding:
        """Makes a `Decoding` of a task's `generation_kwargs`; settings of other models are named and ignored."""
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        ignored = set(settings) - {*GENERATION, "until"} - self._ignored
        if ignored:
            warnings.warn(f"lvlm_jax does not use the generation settings {', '.join(sorted(ignored))}", stacklevel=3)
            self._ignored |= ignored
        known = {name: settings[name] for name in GENERATION if name in settings}
        return decoding(known, LONGEST_ANSWER, stop)

    def _answers(self, questions: Sequence[LazyQuestion]) -> Iterator[tuple[int, str]]:
        """Yields (index in `questions`, answer) for all questions, batch by batch."""
        alike: dict[Decoding, list[int]] = {}
        for number, one in enumerate(questions):
            alike.setdefault(one.decoding, []).append(number)
        with Progress(len(questions), title="lvlm_jax", quiet=self.rank != 0) as progress:
            for shared, numbers in alike.items():
                for batch in self._batches(sorted(numbers, key=lambda number: questions[number].size)):
                    conversations = [questions[number].messages for number in batch]
                    seeds = [questions[number].seed for number in batch]
                    # The last batch is padded to the shape of the others, so that no program is compiled for it.
                    spare = min(self.batch_size, len(numbers)) - len(batch)
                    own = dataclasses.replace(shared, seed=tuple(seeds + seeds[-1:] * spare))
                    padded = conversations + conversations[-1:] * spare
                    output = self.model.generate(padded, method=self.method, **vars(own))
                    yield from zip(batch, output.text[: len(batch)], strict=True)
                    progress.update(len(batch))

    def _batches(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        for start in range(0, len(numbers), self.batch_size):
            yield numbers[start : start + self.batch_size]

    def _pair(self, text: str, continuation: Any, *rest: Any) -> tuple[str, str, Callable[[], Sequence]]:
        """Text, continuation, and the function that reads the images, of a request for a log-likelihood."""
        doc_to_visual, *place = rest or (None,)
        if callable(continuation):
            continuation = continuation(self._document(*place))
        if not str(continuation).strip():
            raise LVLMError("a continuation is empty, so it has no likelihood; check the task's doc_to_target")
        return text, str(continuation).strip(), self._visuals(doc_to_visual, *place)

    def _likelihoods(self, pairs: Sequence[tuple[str, str, Callable[[], Sequence]]]) -> list[tuple[float, bool]]:
        questions = [_messages(visuals(), text) for text, _, visuals in pairs]
        answers = [_answer(continuation) for _, continuation, _ in pairs]
        whole_prompt = self.model.prepare([[*q, a] for q, a in zip(questions, answers, strict=True)])
        counts = np.array([self._answer_length(answer) for answer in answers])[:, None]
        longest = int(counts.max())
        # Prompts are left-padded: a continuation of n tokens is the last n columns of its row.
        tokens = whole_prompt.tokens[:, -longest:]
        inside = np.arange(longest) >= longest - counts
        if self.method is None:
            logits = self.model.logits(whole_prompt)[:, -longest - 1 : -1]
        else:
            logits = self._logits_of_method(questions, tokens, counts)
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        token_logprobs = np.asarray(jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0])
        greedy = np.asarray(logits.argmax(axis=-1)) == tokens
        sums = np.where(inside, token_logprobs, 0.0).sum(axis=1, dtype=np.float64)
        if np.isnan(sums).any():
            raise LVLMError(f"the logits of a continuation {NOT_FINITE}")
        values = sums if self.likelihood == "logprob" else -sums / counts[:, 0]
        return list(zip(values.tolist(), (greedy | ~inside).all(axis=1).tolist(), strict=True))

    def _logits_of_method(
        self, questions: Sequence[list[dict]], tokens: np.ndarray, counts: np.ndarray
    ) -> Float[Array, "B T V"]:
        """The logits from which a method chooses each continuation's tokens, which run one by one, as in decoding.

        Methods treat prompt and answer differently, and contrastive ones combine branches, so a single pass over both
        is not possible.
        """
        longest = tokens.shape[1]
        prompt = self.model.prepare(list(questions))
        state, step = self.model.prefill(prompt, self.method, int(prompt.lengths.max()) + longest)
        # Answers begin together and end at different steps; finished ones still run, and their logits are ignored.
        begin = longest - counts
        rows = []
        for index in range(longest):
            rows.append(step.combined)
            if index + 1 < longest:
                next_tokens = np.take_along_axis(tokens, np.minimum(begin + index, longest - 1), axis=1)[:, 0]
                state, step = self.model.decode(state, next_tokens)
        stacked = jnp.stack(rows, axis=1)
        return jnp.take_along_axis(stacked, jnp.maximum(np.arange(longest) - begin, 0)[..., None], axis=1)

    def _answer_length(self, answer: dict) -> int:
        """How many tokens an answer adds to a prompt: those after the common prefix."""
        question = {"role": "user", "content": "?"}
        with_answer, prompt_only = (
            prompt.tokens[0][prompt.image_id[0] >= 0]
            for prompt in (self.model.prepare([question, answer]), self.model.prepare([question]))
        )
        shared = min(len(with_answer), len(prompt_only))
        apart = np.flatnonzero(with_answer[:shared] != prompt_only[:shared])
        return len(with_answer) - int(apart[0] if len(apart) else shared)


def _messages(visuals: Sequence, text: str) -> list[dict]:
    """One user turn. The text may be empty: lmms-eval scores choices without any context."""
    if text.strip():
        return conversation(list(visuals), text)
    content = [{"type": "image", "image": visual} for visual in visuals]
    return [{"role": "user", "content": [*content, {"type": "text", "text": ""}]}]


def _answer(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _size(text: str) -> tuple[int, int]:
    return text.count(PLACEHOLDER), len(text)
