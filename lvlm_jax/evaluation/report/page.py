"""Reports: a folder of scored runs as one HTML page without any reference to the outside, and as one Markdown file.

`report.runs` reads the runs and `report.comparisons` compares them, `report.tables` makes the tables, `report.examples`
draws the examples; this module combines them and writes the files.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from lvlm_jax import files, pages
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.report import comparisons, examples
from lvlm_jax.evaluation.report import runs as report_runs
from lvlm_jax.evaluation.report.cells import LEGEND, MARKS, Cell
from lvlm_jax.evaluation.report.examples import Example
from lvlm_jax.evaluation.report.tables import Column, Report, Section, Table, TableRow
from lvlm_jax.version import __version__

TEMPLATE = Path(__file__).with_name("report.html")
TITLE = "Methods against hallucination"


def write(
    folder: Path, out: Path, *, title: str = TITLE, images: Sequence[Path] = (), each: int = 2, seed: int = 0
) -> list[Path]:
    """Writes the report of all runs below a folder: `index.html` and `report.md`.

    Args:
        out: the folder of the two files.
        images: folders with the images of the examples.
        each: largest number of fixed examples, and of broken ones, of a method under a protocol.
        seed: seed of the choice of examples.

    Returns:
        The two files.

    Raises:
        LVLMError: no run can be read, an image folder does not exist, or a file cannot be written.
    """
    for place in images:
        if not files.expand(place).is_dir():
            raise LVLMError(f"image folder {str(place)!r} is not a folder; check the path")
    runs = report_runs.collect(folder)
    compared = comparisons.compare(runs)
    report = Report(runs, compared)
    sections = report.sections()
    chosen = examples.choose(compared, images, each, seed)
    targets = [out / "index.html", out / "report.md"]
    files.write_whole(targets[0], page(title, report, sections, chosen))
    files.write_whole(targets[1], markdown(title, report, sections))
    return targets


def _about(report: Report) -> str:
    models = len({line.model for line in report.lines})
    counted = ((len(report.runs), "run"), (models, "model"), (len(report.protocols), "protocol"))
    words = ", ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counted)
    return f"{words}; lvlm_jax {__version__}"


def page(title: str, report: Report, sections: Sequence[Section], chosen: Sequence[Example]) -> str:
    """The HTML page. Texts of runs and users are data in it and never become markup."""
    pictures = examples.thumbnails([path for example in chosen for path in example.pictures])
    number = {path: i for i, path in enumerate(pictures)}
    line_of = {run: line for line in report.lines for run in line.runs.values()}
    data = {
        "title": title,
        "about": _about(report),
        "protocols": report.protocols,
        "sizes": {protocol: report.size(protocol) for protocol in report.protocols},
        "marks": MARKS,
        "legend": LEGEND,
        "sections": [_plain(section) for section in sections],
        "examples": [
            {
                "protocol": example.baseline.protocol.name,
                "model": line_of[example.baseline].model,
                "baseline": line_of[example.baseline].name,
                "group": example.group,
                "question": example.question,
                "without": example.without,
                "answers": [
                    {"method": line_of[run].name, "which": line_of[run].which, "text": text}
                    for run, text in example.answers
                ],
                "fixed": example.fixed,
                "right": example.right,
                "pictures": [number[path] for path in example.pictures if path in number],
            }
            for example in chosen
        ],
        "pictures": list(pictures.values()),
    }
    return pages.render(TEMPLATE, title, data)


def _plain(section: Section) -> dict:
    """A section as JSON values; a cell is a list of its fields without names, because there are thousands of cells."""
    tables = [
        dataclasses.asdict(dataclasses.replace(table, rows=()))
        | {"rows": [vars(row) | {"cells": [list(vars(cell).values()) for cell in row.cells]} for row in table.rows]}
        for table in section.tables
    ]
    return {"heading": section.heading, "intro": section.intro, "tables": tables}


def markdown(title: str, report: Report, sections: Sequence[Section]) -> str:
    """The tables in Markdown. The overview is split into one table for each protocol, which fits a printed page."""
    parts = [f"# {escaped(title)}", escaped(_about(report))]
    parts.append("\n".join(f"- {escaped(protocol)}: {escaped(report.size(protocol))}" for protocol in report.protocols))
    parts.append(f"Marks of differences: {escaped('; '.join(f'{mark} {words}' for _, mark, words in LEGEND))}.")
    for section in sections:
        parts += [f"## {section.heading}", escaped(section.intro)]
        for table in section.tables:
            for protocol in dict.fromkeys(column.protocol for column in table.columns):
                parts.append(f"### {escaped(table.title or protocol)}")
                parts += [pipes(_only(table, protocol))] if table.rows else []
            if table.notes:
                parts.append("\n".join(f"- {escaped(note)}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _only(table: Table, protocol: str) -> Table:
    """The columns of one protocol, and the rows with values in them."""
    places = [i for i, column in enumerate(table.columns) if column.protocol == protocol]
    rows = (dataclasses.replace(row, cells=tuple(row.cells[i] for i in places)) for row in table.rows)
    filled = tuple(row for row in rows if any(cell != Cell() for cell in row.cells))
    return dataclasses.replace(table, columns=tuple(table.columns[i] for i in places), rows=filled)


def pipes(table: Table) -> str:
    """A Markdown table; a group of rows with a name begins with a row that contains the name."""
    lines = [["", *(_head(column) for column in table.columns)], ["---"] * (len(table.columns) + 1)]
    group = ""
    for row in table.rows:
        if row.group != group:
            group = row.group
            lines.append([f"**{escaped(group)}**"] + [""] * len(row.cells))
        lines.append([_name(row), *map(_words, row.cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(column: Column) -> str:
    return escaped(column.name) + {1: " ↑", -1: " ↓", 0: ""}[column.good]


def _name(row: TableRow) -> str:
    settings = row.settings or row.which
    return escaped(row.name) + (f" ({escaped(settings)})" if settings else "")


def _words(cell: Cell) -> str:
    """A cell in one line: "86.0 (84.1 to 87.9); +1.2 (0.3 to 2.1) ▲"."""
    value = escaped(cell.text + cell.mark) + (f" ({cell.interval})" if cell.interval else "")
    says = escaped(MARKS.get(cell.verdict, cell.verdict))
    return "; ".join(filter(None, (value, " ".join(filter(None, (cell.difference, says))))))


def escaped(text: str) -> str:
    """Escapes text for Markdown, so that no part of it is markup, and keeps it on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))
