"""What a process says last when JAX ends it: its standard error passes through this program on the way out.

When a process of a run is gone, JAX ends every other one from a thread of its own, by SIGABRT and with a report of
twenty lines. Python is not asked (XLA's callback for this cannot be given from Python, jax 0.10), and what dies cannot
explain itself. So each of several processes has this program beside it, which passes on what it reads, and in place of
such a report writes one line: what is gone, and what to do.

`parallel.processes` runs it as a file: it imports nothing but Python's own modules, and is there in hundredths of a
second.
"""

import os
import re
import select
import signal
import sys
import time

PATIENCE = 1.0  # seconds between the first sign of a report and its end

# How those parts of XLA that watch over the processes begin a line, or go on in one that a progress bar has begun: with
# the time, a thread, and the source file.
SIGN = re.compile(rb"[WEF]\d{4} \d\d:[\d:.]+ +\d+ (coordination_service\w*|preemption_sync_manager|client)\.\w+:\d+\]")
REPORT = b"Terminating process because the JAX distributed service detected fatal errors"
END = b"*** Check failure stack trace"  # comes at once, and takes a tenth of a second to be written


def explanation(report: str, host: str, timeout: str, patience: str) -> str:
    """One line for JAX's report.

    Args:
        host: of the process that JAX ends.
        timeout: seconds after which a silent process counts as gone.
        patience: seconds that all processes had to come together.
    """
    if "RegisterTask" in report:
        return (
            f"not all processes of this run came together within {patience} s, so the one on {host} ends too (exit "
            "code 134); see that every one is started, and reaches the first by its host and port; "
            "LVLM_JAX_JOIN_TIMEOUT waits longer"
        )
    silent = re.findall(r"Task \S*?(\d+) heartbeat timeout", report)
    for names in re.findall(r"stopped sending heartbeats\):\n((?:\S*\d+\n)+)", report):
        silent += re.findall(r"(\d+)\n", names)
    if silent:
        gone = " and ".join(sorted(set(silent), key=int))
        what = f"process {gone} of this run died or cannot be reached (no sign of life for {timeout} s)"
    elif "leader task" in report:
        what = (
            "process 0 of this run, to which all others report, died or cannot be reached (if it names another one, "
            "that died first)"
        )
    else:
        what = "another process of this run died or cannot be reached"
    return (
        f"{what}, so the one on {host} ends too (exit code 134); the dead one's output and the scheduler say why; "
        "start all of them again as before: training goes on from the newest checkpoint in --workdir"
    )


def main(program: str, *facts: str) -> None:
    """Passes standard input on to standard error, until its end or until a report."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a whole group gets them; this one waits for the end
        signal.signal(number, signal.SIG_IGN)
    held, deadline, column = b"", None, 0
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select([0], [], [], wait)[0]
        chunk = os.read(0, 1 << 16) if ready else b""
        over = bool(ready) and not chunk
        held += chunk
        if deadline is None and (sign := SIGN.search(held)):
            deadline = time.monotonic() + PATIENCE
            column = _write(held[: sign.start()], column)
            held = held[sign.start() :]
        late = over or (deadline is not None and time.monotonic() > deadline)
        if REPORT in held and (END in held or late):
            line = f"{program}: {explanation(held.decode(errors='replace'), *facts)}\n".encode()
            _write(b"\n" + line if column else line)  # a progress bar leaves its line open
            while os.read(0, 1 << 16):  # what its other threads still say about it
                pass
            return
        if deadline is None or late:
            column = _write(held, column)
            held, deadline = b"", None
        if over:
            return


def _write(data: bytes, column: int = 0) -> int:
    """Writes to standard error from a column on; in which column that ends."""
    left = data
    while left:
        left = left[os.write(2, left) :]
    return len(data) - 1 - data.rfind(b"\n") if b"\n" in data else column + len(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
