"""A leaderboard: every scored run as a row of one Markdown file, with its commit, its machine and its seconds."""

from collections.abc import Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.evaluation.report import comparisons, page
from lvlm_jax.evaluation.report import runs as report_runs
from lvlm_jax.evaluation.report.cells import LEGEND, Cell, number
from lvlm_jax.evaluation.report.tables import Column, Report, Table, TableRow, headline, headlines
from lvlm_jax.journal import place

STRANGE = " †"  # beside a commit
ABOUT_STRANGE = """\
† This commit is not in the history of the checkout that wrote this file; its branch may have been rewritten before it
was merged."""

HEAD = """\
# Leaderboard

Every row is one recorded run, the best on top. `lvlm report {folder} --leaderboard {file}` wrote this file from the
`scores.json` of the runs; nothing is written by hand. Shares are in per cent with 95 % intervals (images resampled).
If the same model also answered the same questions without a method, the paired difference to that run follows:
{legend}. The commit is that of the code that answered; "–" means that the run did not record it. Seconds are the time
of answering, compilation included, without the controls."""


def write(folder: Path, out: Path) -> Path:
    """Writes the leaderboard of all runs below a folder.

    Raises:
        LVLMError: no run can be read, or the file cannot be written.
    """
    runs = report_runs.collect(folder)
    files.write_whole(out, markdown(Report(runs, comparisons.compare(runs)), folder, out))
    return out


def markdown(report: Report, folder: Path, out: Path) -> str:
    """The leaderboard of a report's runs; `folder` and `out` are the paths on the command line."""
    legend = "; ".join(f"{mark} {words}" for _, mark, words in LEGEND)
    parts = [HEAD.format(folder=folder, file=out, legend=page.escaped(legend))]
    for protocol in sorted(report.protocols):
        parts += [
            f"## {page.escaped(protocol)}",
            page.escaped(report.size(protocol)),
            page.pipes(table(report, protocol)),
        ]
        parts += [f"- {page.escaped(note)}" for marked, note in report.mark_notes if marked == protocol]
    if any(_strange(run.cost.commit) for protocol in report.protocols for _, run in report.of(protocol)):
        parts.append(ABOUT_STRANGE)
    return "\n\n".join(parts) + "\n"


def table(report: Report, protocol: str) -> Table:
    """The runs under a protocol, sorted by its first headline figure, the best first; runs without it are last."""
    members = list(report.of(protocol))
    words = headlines([run for _, run in members])
    columns = tuple(report.column(word, protocol) for word in words)
    rows = []
    for line, run in members:
        figures = [report.figure(run, headline(run, word)) for word in words]
        cost = run.cost
        seconds = number(cost.seconds, f"{cost.seconds:.0f}" if cost.seconds is not None else None)
        commit = (cost.commit or "–") + STRANGE * _strange(cost.commit)
        where = (Cell(commit), Cell(cost.machine or "–"), seconds)
        rows.append(TableRow("", line.name, line.settings, (Cell(line.model), *figures, *where)))
    return Table(
        protocol,
        (Column("model", protocol), *columns, *(Column(name, protocol) for name in ("commit", "machine", "seconds"))),
        tuple(sorted(rows, key=lambda row: _place(row.cells[1:], columns))),
    )


def _strange(commit: str | None) -> bool:
    return bool(commit) and any(place.in_history(name) is False for name in commit.split(" and "))


def _place(cells: Sequence[Cell], columns: Sequence[Column]) -> tuple[bool, float]:
    value, good = cells[0].order, columns[0].good or 1
    return value is None, -good * (value or 0.0)
