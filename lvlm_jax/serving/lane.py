"""A batch of rows on the device for jobs whose methods have one structure, controlled by the host."""

from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import rows
from lvlm_jax.generation.beam import Finished
from lvlm_jax.generation.continuous import PromptSize
from lvlm_jax.generation.sampling import RowSampling, sample_keys
from lvlm_jax.lvlm import LVLM
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.prefill import Prefill
from lvlm_jax.serving.work import FAULT, Job, Update

Tell = Callable[[Job, Update | LVLMError], None]
STEPS = 8  # tokens per row between two checks, if no job streams
STREAMED_STEPS = 2  # if some job streams


class Lane:
    """Rows on the device, and the jobs in them.

    Attributes:
        waiting: jobs without a row, in order.
        under_way: jobs by row.
    """

    def __init__(self, model: LVLM, limits: Limits, prefill: Prefill, largest: PromptSize, tell: Tell):
        """Nothing is on the device yet.

        Args:
            tell: called with a job and its update.
            largest: size of expected prompts; a larger prompt widens the rows, which compiles programs.
        """
        self._model, self._limits, self._prefill, self._largest = model, limits, prefill, largest
        self._tell = tell
        self._rows: rows.Rows | None = None
        self._full = False
        self.waiting: deque[Job] = deque()
        self.under_way: dict[int, Job] = {}

    @property
    def busy(self) -> bool:
        """Whether a job waits or has a row."""
        return bool(self.waiting or self.under_way)

    def enqueue(self, job: Job) -> None:
        """Queues a job; interactive jobs come before those of batches."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > job.priority:
            place -= 1
        self.waiting.insert(place, job)

    def admit(self) -> None:
        """Gives free rows to waiting jobs; errors in a prompt go to its job.

        Runs one chunk of one long prompt; shorter prompts behind it do not wait for it.
        """
        chunked = False
        for job in list(self.waiting):
            if len(self.under_way) >= self._limits.rows:
                return
            if not job.cancelled and chunked and (job.prompt.work or self._prefill.long(job.prompt, job.method)):
                continue
            try:
                if not job.cancelled and not self._prefill.ready(job.prompt, job.method):
                    chunked = True
                    continue
                self.waiting.remove(job)
                if not job.cancelled:
                    self._place(job)
            except LVLMError as error:
                self._forgo(job)
                self._tell(job, error)
            except Exception:
                self._forgo(job)
                self._tell(job, LVLMError(FAULT))
                raise

    def _forgo(self, job: Job) -> None:
        if job in self.waiting:
            self.waiting.remove(job)

    def _place(self, job: Job) -> None:
        model, prompt, decoding = self._model, job.prompt, job.decoding
        state, step = prompt.prefilled
        size = PromptSize.of(state)
        if self._rows is None:
            # A contrast branch's own prompt may be as long as the main one's.
            columns = (self._largest.prompt[0],) * len(size.prompt)
            tail_rows = self._largest.tail_rows if self._prefill.shares(job.method) else columns[0]
            expected = PromptSize(columns, tail_rows, self._largest.image_count)
            sizes = {"batch": self._limits.rows, "limit": self._limits.max_tokens}
            logits = step.combined.shape[1]
            empty = rows.empty(state, **sizes, vocabulary=logits, size=size.union(expected))
            self._rows = rows.compact(empty)  # moves nothing, but compiles the program
        size_now = PromptSize.of(self._rows.slots.state, self._rows.slots.prompt)
        if (size_needed := size_now.union(size)) != size_now:
            self._rows = rows.widen(self._rows, size_needed)
        place = next(row for row in range(self._limits.rows) if row not in self.under_way)
        stop = model.host.stops(model.config, decoding)
        if len(stop) > rows.STOPS:
            raise LVLMError(f"{len(stop)} tokens end an answer, those of the model among them; expected {rows.STOPS}")
        context = model.config.text.max_position_embeddings
        row = rows.NewRow(
            tokens=prompt.laid_out.tokens,
            key=sample_keys([decoding.seed], 1),
            limit=np.asarray([min(decoding.max_new_tokens, context - prompt.length)], np.int32),
            place=np.asarray([place], np.int32),
            stop=np.pad(stop, (0, rows.STOPS - len(stop)), constant_values=-1).astype(np.int32),
            sampling=RowSampling.of_rows(
                [(decoding.temperature, decoding.top_k, decoding.top_p, decoding.repetition_penalty)]
            ),
            wants_top=np.asarray([job.wants_top]),
        )
        self._rows = rows.place(self._rows, state, step.combined, row)
        self.under_way[place] = job

    def advance(self) -> None:
        """Lets the device decode a few tokens of every row; does not wait for it."""
        jobs = self.under_way.values()
        steps = STREAMED_STEPS if any(job.pieces for job in jobs) else STEPS
        if any(job.began is None for job in jobs):
            steps = 0  # first tokens are reported at once
        if self._full:
            self._rows = rows.compact(self._rows)
        keep = np.asarray([row in self.under_way for row in range(self._limits.rows)])
        self._rows = rows.run(self._model.params, self._model.config, self._rows, keep, jnp.int32(steps))

    def collect(self, now: float) -> list[tuple[Job, Update | LVLMError]]:
        """Waits for the device; returns finished answers, and partial ones for jobs that stream.

        Rows of cancelled jobs and of finished answers become free.
        """
        slots = self._rows.slots
        fields = (slots.running, slots.count, slots.stopped, slots.state.index, slots.tokens, slots.logprobs)
        running, count, stopped, index, tokens, logprobs = jax.device_get(fields)
        self._full = bool(index >= slots.state.capacity)
        top = None
        if any(job.wants_top for job in self.under_way.values()):
            top = jax.device_get((self._rows.top, self._rows.top_logprobs))
        updates = []
        for row, job in list(self.under_way.items()):
            job.began = job.began or now
            if job.cancelled:
                del self.under_way[row]
            elif not running[row] or job.pieces or job.decoding.stop:
                one = slice(row, row + 1)
                answer = Finished(tokens[one], logprobs[one], count[one], stopped[one])
                update = self._read(job, answer, bool(running[row]), top and [field[row] for field in top])
                if isinstance(update, LVLMError) or update.reason is not None:
                    del self.under_way[row]
                if job.pieces or row not in self.under_way:
                    updates.append((job, update))
        return updates

    def _read(self, job: Job, answer: Finished, running: bool, top: list[np.ndarray] | None) -> Update | LVLMError:
        try:
            output = self._model.host.read(answer, job.decoding.stop)
        except LVLMError as error:
            return error
        reason = output.finish_reason[0]
        top_tokens = [None, None]
        if top is not None and job.wants_top:
            top_tokens = [field[: len(output.tokens[0])] for field in top]
        # A stop string ends an answer that still runs on the device.
        reason = None if running and reason == "length" else reason
        return Update(output.text[0], output.tokens[0], output.logprobs[0], *top_tokens, reason)

    def forget(self) -> None:
        """Frees the rows' memory; call it only if no job has a row."""
        self._rows, self._full = None, False
