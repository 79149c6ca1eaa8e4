"""Renders chat templates in a separate process, with limits on time, memory and output.

Jinja's sandbox keeps a template from running programs, but not from running for ever or using all memory. The process
is started on first use, renders all templates, and ends with this one; a process that exceeds a limit is replaced.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.errors import LVLMError

SECONDS = 2  # CPU time of one rendering; published templates take milliseconds
MEGABYTES = 256  # beyond the memory of the process when it starts
LETTERS = 2_000_000  # largest number of characters that a template may write; more than any model reads
PATIENCE = 60  # seconds of wall time after which a process that does not reply is killed

_PROGRAM = Path(__file__).with_name("render_worker.py")


class Renderer:
    """A process that renders one template at a time; threads wait for each other."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the process if there is none; does not wait until it is ready."""
        with self._lock:
            self._alive()

    def render(self, template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict:
        """Returns the reply of `render_worker.py`: a "text", or an exception with its "sort".

        Args:
            template: a Jinja template, as for transformers' `render_jinja_template`.
            messages: the messages of one conversation.
            options: those of `render_jinja_template`, and other variables for the template.

        Raises:
            LVLMError: the template takes too much time or memory, or writes too much; or the process cannot be started.
        """
        request = {"messages": list(messages), "options": {**options, "chat_template": template}}
        line = json.dumps(request, default=_plain).encode() + b"\n"
        with self._lock:
            answer = self._exchange(self._alive(), line)
        if limit := answer.get("limit"):
            raise LVLMError(f"the chat template {_LIMITS.get(limit, limit)}; {_ADVICE}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _alive(self) -> subprocess.Popen:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            words = (_PROGRAM, SECONDS, MEGABYTES, LETTERS)
            one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", *map(str, words)],  # the program's folder contains no modules for it
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **one},
                )
            except OSError as error:
                raise LVLMError(f"no process can be started to render chat templates: {error.strerror}") from error
        return self._process

    def _exchange(self, process: subprocess.Popen, line: bytes) -> dict:
        overdue = threading.Timer(PATIENCE, process.kill)
        overdue.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
            if answer.endswith(b"\n"):
                return json.loads(answer)
        except BrokenPipeError:
            pass
        except (
            BaseException
        ):  # an interrupt: the reply that is still to come would be taken for that of the next request
            self.close()
            raise
        finally:
            overdue.cancel()
        code = process.wait()
        self.close()
        in_time = code not in (-getattr(signal, "SIGPROF", 0), -getattr(signal, "SIGKILL", 0))
        return {"limit": f"ends the process that renders it (exit code {code})" if in_time else "time"}


def _plain(value: Any) -> Any:
    """Converts a value that JSON cannot represent, as transformers does."""
    return value.item() if isinstance(value, np.generic) else f"<{type(value).__name__}>"


_ADVICE = "copy chat_template.jinja from the checkpoint's repository, or shorten the conversation"
_LIMITS = {
    "time": f"does not end within {SECONDS} seconds",
    "memory": f"needs more than {MEGABYTES} MB",
    "letters": f"writes more than {LETTERS:,} characters",
}

RENDERER = Renderer()
atexit.register(lambda: RENDERER.close())


def _forget() -> None:
    """In a forked child: drops the pipes, which belong to the parent."""
    global RENDERER
    RENDERER = Renderer()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
