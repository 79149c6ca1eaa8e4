"""Many cases in child processes, which are killed and replaced when one hangs, and a table of the outcomes.

python -m tests.fuzz.pool                      30,000 cases
python -m tests.fuzz.pool 2000 picture pairs   2,000 cases of two readers
python -m tests.fuzz.pool 2000 --seed 7        other cases
"""

import argparse
import collections
import contextlib
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CASES = 30_000
CHUNK = 250  # cases between two looks for another job
SECONDS = 10.0  # of the processor, for one case, as a child measures it
PATIENCE = 300.0  # of waiting for a child before it is killed; others may be computing on this machine
MEMORY = 12 << 30  # bytes of a child
OUTCOMES = ("accepted", "refused", "traceback", "hang", "wrong", "message", "storm", "crash")
FAULTS = OUTCOMES[2:]


def _child(pipe) -> None:
    """Takes (reader, count, seed) from a pipe, and puts (outcome, text) of every case into it, then None."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    from tests.fuzz import readers
    from tests.fuzz.engine import Fault, attempt, text_of

    pipe.send(None)
    with tempfile.TemporaryDirectory() as folder:
        while job := pipe.recv():
            name, count, number = job

            def take(case, reader=readers.READERS[name]):
                try:
                    pipe.send((attempt(reader, case, Path(folder) / "case", SECONDS), ""))
                except Fault as fault:
                    pipe.send((fault.kind, f"{fault}\n    {text_of(case)}"))

            readers.feed(readers.READERS[name], count, number, take)
            pipe.send(None)


class Child:
    """A process that reads cases; it is replaced when it hangs or dies."""

    def __init__(self):
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_child, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._pipe.recv()  # imports take their time

    def work(self, name: str, count: int, number: int) -> Iterator[tuple[str, str]]:
        """The outcome of each case, with what went wrong."""
        while count > 0:
            self._pipe.send((name, count, number))
            try:
                while True:
                    if not self._pipe.poll(PATIENCE):
                        found = ("hang", f"{PATIENCE:g} s, seed {number}")
                        break
                    found = self._pipe.recv()
                    if found is None:
                        return
                    count -= 1
                    yield found
            except EOFError:
                found = ("crash", f"seed {number}")
            self.close()
            self._start()
            count, number = count - 1, number + 1_000_003  # other cases: these lead to the same place
            yield found

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()


def run(shares: dict[str, int], number: int = 0, children: int = 2) -> tuple[dict[str, collections.Counter], list[str]]:
    """Counts of outcomes by reader, and what went wrong.

    Args:
        shares: how many cases each reader gets.
        number: seed of the cases.
        children: processes.
    """
    jobs = [
        (name, min(CHUNK, count - start), number * 1_000_000 + start)
        for name, count in shares.items()
        for start in range(0, count, CHUNK)
    ]
    counts = {name: collections.Counter() for name in shares}
    faults: list[str] = []

    def work(_: int) -> None:
        child = Child()
        with contextlib.closing(child):
            while jobs:
                with contextlib.suppress(IndexError):
                    name, *rest = jobs.pop()
                    for outcome, text in child.work(name, *rest):
                        counts[name][outcome] += 1
                        if outcome in FAULTS:
                            faults.append(f"{name}: {text}")
                            print(faults[-1], file=sys.stderr, flush=True)
                    print(f"{len(jobs)} more", end="\r", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(children) as pool:
        list(pool.map(work, range(children)))
    return counts, faults


def table(counts: dict[str, collections.Counter]) -> str:
    """A line for each reader."""
    width = max(map(len, counts))
    rows = [("", "cases", *OUTCOMES)]
    everything = sum(counts.values(), collections.Counter())
    for name, found in {**counts, "all": everything}.items():
        rows.append((name, sum(found.values()), *(found[outcome] for outcome in OUTCOMES)))
    return "\n".join(f"{row[0]:{width}}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the cases that a command line asks for, and prints every fault, then the table."""
    from tests.fuzz import readers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=int, nargs="?", default=CASES)
    parser.add_argument("readers", nargs="*", help="readers whose names contain one of these words; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--children", type=int, default=2)
    given = parser.parse_args(words)
    chosen = [name for name in readers.READERS if not given.readers or any(word in name for word in given.readers)]
    shares = readers.shared(given.cases, chosen)
    counts, faults = run(shares, given.seed, given.children)
    print(table(counts))
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
