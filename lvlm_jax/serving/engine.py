"""The one thread that uses the device: it puts jobs into rows, decodes, and reports updates."""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import answer, rows, searches
from lvlm_jax.generation.continuous import PromptSize
from lvlm_jax.lvlm import LVLM
from lvlm_jax.serving.errors import ApiError
from lvlm_jax.serving.lane import Lane
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.prefill import Prefill
from lvlm_jax.serving.work import FAULT, Job, Late, Priority, Update


class Engine:
    """Answers jobs with any methods on one device.

    Attributes:
        prefill: runs prompts, and caches what can be reused.
        on_update: called with every job and its update, for metrics.
    """

    def __init__(self, model: LVLM, limits: Limits, largest: PromptSize):
        """The thread does not run yet (`start`).

        Args:
            largest: size of the prompts for which rows have room from the start.
        """
        self._model, self._limits, self._largest = model, limits, largest
        self.prefill = Prefill(model, limits)
        self.on_update: Callable[[Job, Update | LVLMError], None] = lambda job, update: None
        self._lanes: dict[Any, Lane] = {}  # by structure; the least recently used first
        self._inbox: deque[Job] = deque()
        self._searches: deque[Job] = deque()  # jobs that cannot run in rows
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._loop, name="lvlm-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; unfinished answers are lost, so wait for them first."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the engine accepts jobs."""
        return self._thread.is_alive() and not self._ending

    @property
    def waiting(self) -> int:
        """Number of jobs without a row."""
        with self._changed:
            lanes = sum(len(lane.waiting) for lane in self._lanes.values())
            return len(self._inbox) + len(self._searches) + lanes

    @property
    def under_way(self) -> int:
        """Number of jobs with a row."""
        with self._changed:
            return sum(len(lane.under_way) for lane in self._lanes.values())

    def submit(self, jobs: list[Job]) -> None:
        """Accepts the jobs of one request.

        Raises:
            ApiError: the queue is full, or the engine has stopped.
        """
        waiting = self.waiting
        with self._changed:
            if not self.alive:
                raise ApiError(503, "the server is shutting down; try again in a moment", retry_after=5)
            if jobs[0].priority == Priority.PERSON and waiting + len(jobs) > self._limits.queue + self._limits.rows:
                seconds = 1 + waiting // self._limits.rows
                message = f"{waiting} requests are already waiting; try again in {seconds} s"
                raise ApiError(429, message, "queue_full", retry_after=seconds)
            self._inbox.extend(jobs)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Lets the thread call a function that needs the device, between two decode steps.

        Raises:
            ApiError: the queue is full, or the engine has stopped.
        """
        future: Future = Future()
        with self._changed:
            if not self.alive:
                raise ApiError(503, "the server is shutting down; try again in a moment", retry_after=5)
            if len(self._calls) >= self._limits.queue:
                raise ApiError(429, "too many attention pages are requested", "queue_full", retry_after=5)
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def wake(self) -> None:
        """Lets the thread look for cancelled jobs."""
        with self._changed:
            self._changed.notify()

    def _loop(self) -> None:
        while True:
            with self._changed:
                waiting = self._inbox or self._searches or self._calls or self._ending
                if not (waiting or any(lane.busy for lane in self._lanes.values())):
                    self._changed.wait(1.0)
                if self._ending:
                    self._give_up()
                    return
            try:
                self._round()
            except Exception as error:  # an error of ours, or of the device: running jobs get it, others continue
                traceback.print_exc()
                self._fail(error)

    def _round(self) -> None:
        """One round of the loop."""
        self._sort_in()
        if self._searches:
            first = min(self._searches, key=lambda job: job.priority)
            self._searches.remove(first)
            self._alone(first)
        if self._calls:
            self._one_call()
        lanes = [lane for lane in self._lanes.values() if lane.busy]
        for lane in lanes:
            lane.admit()
        lanes = [lane for lane in lanes if lane.under_way]
        for lane in lanes:
            lane.advance()
        for lane in lanes:
            time_now = time.monotonic()
            for job, update in lane.collect(time_now):
                self._tell(job, update)

    def _sort_in(self) -> None:
        """Moves jobs from the inbox to their lanes, interactive jobs before batch jobs; late jobs get an error."""
        time_now = time.monotonic()
        with self._changed:
            jobs, later = list(self._inbox), []
            self._inbox.clear()
            for lane in self._lanes.values():
                for job in [*lane.waiting, *lane.under_way.values()]:
                    self._late(job, time_now)
            for job in self._searches:
                self._late(job, time_now)
            for job in sorted(jobs, key=lambda job: job.priority):
                if job.cancelled or self._late(job, time_now):
                    continue
                if searches.obstacle(job.method, job.decoding) or rows.obstacle(job.method):
                    self._searches.append(job)
                elif (lane := self._lane(job.structure)) is None:
                    later.append(job)
                else:
                    lane.enqueue(job)
            self._inbox.extendleft(reversed(later))

    def _late(self, job: Job, now: float) -> bool:
        """Whether a job's deadline has passed; if so, it gets an error and its row is freed."""
        if job.deadline < now and not job.cancelled:
            job.cancelled = True
            self._tell(job, Late(f"no answer within {self._limits.timeout:g} s; try again, or ask for less"))
        return job.deadline < now

    def _lane(self, structure: Any) -> Lane | None:
        """The lane for methods of a structure; None while all lanes are busy with other structures."""
        if structure in self._lanes:
            self._lanes[structure] = lane = self._lanes.pop(structure)
            return lane
        if len(self._lanes) >= self._limits.lanes:
            idle = next((key for key, lane in self._lanes.items() if not lane.busy), None)
            if idle is None:
                return None
            del self._lanes[idle]
        lane = self._lanes[structure] = Lane(self._model, self._limits, self.prefill, self._largest, self._tell)
        return lane

    def _alone(self, job: Job) -> None:
        """Answers a job that cannot run in rows: a search."""
        if job.cancelled:
            return
        model = self._model
        try:
            output = answer.generate(
                model.params, model.config, job.prompt.inputs, job.method, job.decoding, model.host
            )
            fields = (output.text[0], output.tokens[0], output.logprobs[0])
            update: Update | LVLMError = Update(*fields, None, None, output.finish_reason[0])
        except LVLMError as error:
            update = error
        except Exception:  # the rows of other jobs are not affected
            traceback.print_exc()
            update = LVLMError(FAULT)
        job.began = time.monotonic()
        self._tell(job, update)

    def _one_call(self) -> None:
        function, future = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except Exception as error:  # goes to the caller
            future.set_exception(error)

    def _tell(self, job: Job, update: Update | LVLMError) -> None:
        self.on_update(job, update)
        job.tell(update)

    def _fail(self, error: Exception) -> None:
        """Reports an error to every job with a row, because its arrays may be lost with the failed program."""
        for lane in self._lanes.values():
            for job in lane.under_way.values():
                self._tell(job, LVLMError(FAULT))
            lane.under_way.clear()
            lane.forget()

    def _give_up(self) -> None:
        with_lanes = [job for lane in self._lanes.values() for job in (*lane.waiting, *lane.under_way.values())]
        for job in [*self._inbox, *self._searches, *with_lanes]:
            self._tell(job, Late("the server is shutting down; try again in a moment"))
        for _, future in self._calls:
            future.cancel()
