"""Explains in one line why JAX ended a process: the process's standard error passes through this program.

If a process of a run dies, JAX ends all others from one of its own threads, by SIGABRT and with a report of twenty
lines. Python code does not run then (XLA's callback for this cannot be set from Python, jax 0.10), so the dying process
cannot explain itself. Therefore each of several processes has this program beside it. It passes on what it reads, and
replaces such a report by one line: what died, and what to do.

`parallel.processes` runs this file as a program: it imports only Python's own modules, and starts within hundredths of
a second.
"""

import os
import re
import select
import signal
import sys
import time

PATIENCE = 1.0  # seconds between the first sign of a report and its end

# The beginning of a line of XLA's process monitoring: the time, a thread, and the source file. It may follow a progress
# bar on the same line.
SIGN = re.compile(rb"[WEF]\d{4} \d\d:[\d:.]+ +\d+ (coordination_service\w*|preemption_sync_manager|client)\.\w+:\d+\]")
REPORT = b"Terminating process because the JAX distributed service detected fatal errors"
END = b"*** Check failure stack trace"  # follows the report at once; the trace itself takes a tenth of a second


def explanation(report: str, host: str, timeout: str, patience: str) -> str:
    """One line that explains JAX's report.

    Args:
        host: host of the process that JAX ends.
        timeout: seconds after which a silent process counts as dead.
        patience: seconds that the processes had to join.
    """
    if "RegisterTask" in report:
        return (
            f"not all processes of this run joined within {patience} s, so this one on {host} ends too (exit code "
            "134); check that every one has started and can reach the host and port of the first, or set "
            "LVLM_JAX_JOIN_TIMEOUT higher"
        )
    silent = re.findall(r"Task \S*?(\d+) heartbeat timeout", report)
    for names in re.findall(r"stopped sending heartbeats\):\n((?:\S*\d+\n)+)", report):
        silent += re.findall(r"(\d+)\n", names)
    if silent:
        dead = " and ".join(sorted(set(silent), key=int))
        cause = f"process {dead} of this run died or cannot be reached (no sign of life for {timeout} s)"
    elif "leader task" in report:
        cause = (
            "process 0 of this run, to which all others are connected, died or cannot be reached (if its own last line "
            "names another process, that one died first)"
        )
    else:
        cause = "another process of this run died or cannot be reached"
    return (
        f"{cause}, so this one on {host} ends too (exit code 134); the output of the dead one and the scheduler say "
        "why; start all processes again with the same command: training resumes from the newest checkpoint in --workdir"
    )


def main(program: str, *facts: str) -> None:
    """Copies standard input to standard error, until its end or until a report."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # these signals reach the whole process group; this program waits for the end of input
        signal.signal(number, signal.SIG_IGN)
    pending, deadline, column = b"", None, 0
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable = select.select([0], [], [], wait)[0]
        chunk = os.read(0, 1 << 16) if readable else b""
        over = bool(readable) and not chunk
        pending += chunk
        if deadline is None and (sign := SIGN.search(pending)):
            deadline = time.monotonic() + PATIENCE
            column = _write(pending[: sign.start()], column)
            pending = pending[sign.start() :]
        late = over or (deadline is not None and time.monotonic() > deadline)
        if REPORT in pending and (END in pending or late):
            line = f"{program}: {explanation(pending.decode(errors='replace'), *facts)}\n".encode()
            _write(b"\n" + line if column else line)  # a progress bar leaves its line open
            while os.read(0, 1 << 16):  # discard what other threads still report
                pass
            return
        if deadline is None or late:
            column = _write(pending, column)
            pending, deadline = b"", None
        if over:
            return


def _write(data: bytes, column: int = 0) -> int:
    """Writes to standard error from a column on; returns the column at the end."""
    remaining = data
    while remaining:
        remaining = remaining[os.write(2, remaining) :]
    return len(data) - 1 - data.rfind(b"\n") if b"\n" in data else column + len(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
