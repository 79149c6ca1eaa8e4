"""The tables of a report, for the page and for the Markdown file: the text of every cell, and its title.

If a figure was not scored under the conditions of most figures in its column, it has a mark, and a note names the
differences.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lvlm_jax.evaluation.report.cells import NOT_COMPARED, Cell, between, cell, number, shown
from lvlm_jax.evaluation.report.comparisons import differing
from lvlm_jax.evaluation.report.runs import Comparison, Cost, Run

FALLBACK = 4  # figures of a run that has none of the benchmark's headline figures
LONG = 8  # tokens; shorter answers have no time per token, because the prompt takes most of the time
SHORTER = "captions are {} words shorter ({}), and CHAIR falls with their length: see the length-matched control"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column's head, the protocol it belongs to, and whether high (1) or low (-1) values are good."""

    name: str
    protocol: str
    good: int = 0


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        group: name of the model or method whose rows stand together.
        settings: all settings of the method; the page folds them.
        cells: one for each column.
        which: the settings that differ from other rows of the same name.
    """

    group: str
    name: str
    settings: str
    cells: tuple[Cell, ...]
    which: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table and the remarks below it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """Tables under a heading."""

    heading: str
    intro: str
    tables: tuple[Table, ...]


@dataclasses.dataclass(frozen=True)
class Line:
    """A model with a method, and its run under each protocol: a row of most tables.

    Attributes:
        settings: all settings of the method.
        which: the settings that differ from other lines of the same method.
    """

    model: str
    name: str
    settings: str
    which: str
    runs: Mapping[str, Run]


def lines(runs: Sequence[Run]) -> list[Line]:
    """Runs by model and method; the model alone is first. Runs that differ only in seed or folder are separate."""
    places: dict[tuple, dict[str, list[Run]]] = {}
    for run in runs:
        method = json.dumps(run.record.get("method"), sort_keys=True)
        own = places.setdefault((run.model, run.method, method), collections.defaultdict(list))
        own[run.protocol.name].append(run)
    result = []
    for ((model, version), (name, settings), _), by_protocol in places.items():
        count = max(map(len, by_protocol.values()))
        for i in range(count):
            own = {protocol: members[i] for protocol, members in by_protocol.items() if i < len(members)}
            origin = _seed_or_folders(list(own.values())) if count > 1 else ""
            words = ", ".join(filter(None, (settings, origin)))
            result.append(Line(f"{model} ({version})" if version else model, name, words, "", own))
    result = [dataclasses.replace(line, which=_which(line, result)) for line in result]
    return sorted(result, key=lambda line: (line.model, not _is_baseline(line), line.name, line.settings))


def _which(line: Line, among: Sequence[Line]) -> str:
    alike = [set(one.settings.split(", ")) for one in among if (one.model, one.name) == (line.model, line.name)]
    shared = set.intersection(*alike)
    return ", ".join(word for word in line.settings.split(", ") if word not in shared)


def _is_baseline(line: Line) -> bool:
    return next(iter(line.runs.values())).is_baseline


def _seed_or_folders(runs: Sequence[Run]) -> str:
    seeds = {run.record.get("seed") for run in runs} - {None}
    folders = ", ".join(run.name for run in runs)
    return f"seed {seeds.pop()}, in {folders}" if len(seeds) == 1 else f"in {folders}"


def marks(runs: Sequence[Run]) -> tuple[dict[Run, str], list[tuple[str, str]]]:
    """Marks of runs whose conditions are not those of most runs of their protocol.

    Returns:
        run -> mark, and (protocol, note) of each mark.
    """
    by_protocol: dict[str, dict[tuple, list[Run]]] = {}
    for run in runs:
        alike = by_protocol.setdefault(run.protocol.name, {})
        alike.setdefault(tuple(run.conditions.items()), []).append(run)
    mark_of, notes = {}, []
    for protocol, alike in by_protocol.items():
        usual, *others = sorted(alike.values(), key=len, reverse=True)
        for members in others:
            mark = f"[{len(notes) + 1}]"
            mark_of |= dict.fromkeys(members, mark)
            notes.append((protocol, f"{mark} other conditions: {'; '.join(differing(members[0], usual[0]))}"))
    return mark_of, notes


def headline(run: Run, word: str) -> str | None:
    """The name of the run's figure for a headline word: the word itself, the mean of the splits, or that of
    the only split; None if the run has none of these."""
    ending = [name for name in run.figures if name.endswith(f": {word}")]
    names = [name for name in (word, f"mean: {word}") if name in run.figures]
    return (names or (ending if len(ending) == 1 else [None]))[0]


def headlines(runs: Sequence[Run]) -> list[str]:
    """The headline figures of the runs of one protocol; if each split has a figure, the mean of the splits."""
    words = [word for word in runs[0].benchmark.headlines if any(headline(run, word) for run in runs)]
    return words or list(runs[0].figures)[:FALLBACK]


def arranged(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Figures as tables: title -> column -> the figure's name.

    The first table has the figures of the whole benchmark. Each figure that groups have ("random: accuracy") gets a
    table with a column for each group; with a single group, all figures share one table.
    """
    names = list(dict.fromkeys(names))
    groups = {name.partition(": ")[0] for name in names if ": " in name}
    whole: dict[str, str] = {}
    tables: dict[str, dict[str, str]] = {}
    for name in names:
        group, colon, figure = name.partition(": ")
        if not colon:
            whole[name] = name
        elif len(groups) == 1:
            tables.setdefault(group, {})[figure] = name
        else:
            tables.setdefault(figure, {})[group] = name
    return ({"all questions together": whole} if whole else {}) | tables


class Report:
    """The tables of a report about some runs.

    Args:
        runs: from `runs.collect`.
        comparisons: from `comparisons.compare`.
    """

    def __init__(self, runs: Sequence[Run], comparisons: Mapping[Run, Comparison | str]):
        self.runs, self.comparisons = list(runs), comparisons
        self.lines = lines(runs)
        self.protocols = list(dict.fromkeys(run.protocol.name for run in runs))
        self.marks, self.mark_notes = marks(runs)

    def of(self, protocol: str) -> Iterator[tuple[Line, Run]]:
        """The lines that have a run under a protocol, each with that run."""
        return ((line, line.runs[protocol]) for line in self.lines if protocol in line.runs)

    def size(self, protocol: str) -> str:
        """The numbers of questions and images behind a protocol's figures, and the data set."""
        sized = (" · ".join(filter(None, (run.size, run.data_set))) for _, run in self.of(protocol))
        return "; or ".join(dict.fromkeys(sized))

    def column(self, figure: str, protocol: str, title: str = "") -> Column:
        """The column of a figure under a protocol; `title` replaces the figure's name as title."""
        benchmark = next(run.benchmark for run in self.runs if run.protocol.name == protocol)
        return Column(title or figure, protocol, benchmark.direction(figure))

    def figure(self, run: Run | None, name: str | None) -> Cell:
        """The cell of one figure of a run."""
        if run is None or name not in run.figures:
            return Cell()
        compared = self.comparisons.get(run)
        difference = compared.differences.get(name) if isinstance(compared, Comparison) else None
        figure_cell = cell(
            run.figures[name], run.benchmark.direction(name), difference, self.marks.get(run, ""), run.questions(name)
        )
        not_compared = compared is not None and difference is None
        return dataclasses.replace(figure_cell, verdict=NOT_COMPARED) if not_compared else figure_cell

    def sections(self) -> list[Section]:
        """The whole report."""
        return [section for section in (
            Section(
                "Methods and benchmarks",
                "Shares in per cent. Below each are its 95 % interval (images resampled) and the paired difference "
                "from the same model without a method on the same questions. Intervals are not widened for the number "
                "of comparisons.",
                (self.overview(),),
            ),
            Section(
                "Controls",
                "A method must be better than its controls. Each row has the figures of a control and, below them, the "
                "method minus the control, paired.",
                tuple(filter(None, map(self.controls, self.protocols))),
            ),
            Section("By category", "Every figure, by split, subtask or kind.",
                    tuple(table for protocol in self.protocols for table in self.categories(protocol))),
            Section(
                "Answers",
                "Answers that the parser does not understand count as wrong. Fixed: only the method got the question "
                "right. Broken: only the model without it did. A caption is right if it names no absent object.",
                tuple(map(self.answers, self.protocols)),
            ),
            Section(
                "Cost",
                "Time per answer, prompt and image included; below it, the ratio to the same model without a method. "
                f"The time per token is given if answers have at least {LONG} tokens: in shorter ones the prompt takes "
                "most of the time.",
                tuple(map(self.cost, self.protocols)),
            ),
            Section("Records", "Everything besides the method that determines the figures; hashes are short SHA-256.",
                    tuple(map(self.records, self.protocols))),
        ) if section.tables]  # fmt: skip

    def overview(self) -> Table:
        """A table of the headline figures of all protocols; methods are rows."""
        words = {protocol: headlines([run for _, run in self.of(protocol)]) for protocol in self.protocols}
        columns = tuple(self.column(word, protocol) for protocol in words for word in words[protocol])
        rows = []
        for line in self.lines:
            runs = [line.runs.get(column.protocol) for column in columns]
            cells = tuple(
                self.figure(run, run and headline(run, column.name)) for run, column in zip(runs, columns, strict=True)
            )
            rows.append(TableRow(line.model, line.name, line.settings, cells, line.which))
        return Table("", columns, tuple(rows), tuple(self.remarks()))

    def remarks(self) -> Iterator[str]:
        """Notes that explain marks, say why runs are not compared, and tell which captions became shorter."""
        for protocol, note in self.mark_notes:
            yield f"{protocol} {note}"
        for protocol in self.protocols:
            for line, run in self.of(protocol):
                who, compared = f"{protocol}, {line.model}, {line.name}", self.comparisons.get(run)
                if isinstance(compared, str):
                    yield f"{who}: not compared: {compared}"
                elif compared is not None:
                    if compared.baseline is None:
                        yield f"{who}: compared with {compared.to}"
                    words = compared.differences.get("words")
                    if words is not None and words.interval[1] < 0:
                        fewer = shown(-words.value, "words"), between(words.interval, "words", True)
                        yield f"{who}: {SHORTER.format(*fewer)}"

    def categories(self, protocol: str) -> Iterator[Table]:
        """Every figure that a run of a protocol has, arranged by split, subtask or kind."""
        members = list(self.of(protocol))
        for heading, columns_by_title in arranged(name for _, run in members for name in run.figures).items():
            columns = tuple(self.column(name, protocol, title) for title, name in columns_by_title.items())
            rows = tuple(
                TableRow(
                    line.model,
                    line.name,
                    "",
                    tuple(self.figure(run, name) for name in columns_by_title.values()),
                    line.which,
                )
                for line, run in members
            )
            yield Table(f"{protocol}: {heading}", columns, rows)

    def controls(self, protocol: str) -> Table | None:
        """The controls of each method, explained in notes; None if only models without a method ran."""
        members = [(line, run) for line, run in self.of(protocol) if not run.is_baseline]
        if not members:
            return None
        words = headlines([run for _, run in members])
        rows, about, remarks, without = [], {}, [], []
        for line, run in members:
            group = " · ".join(filter(None, (line.model, line.name, line.which)))
            if not run.controls:
                without.append(" · ".join(filter(None, (line.name, line.which))))
                continue
            names = [headline(run, word) for word in words]
            directions = [run.benchmark.direction(name) if name else 0 for name in names]
            own = tuple(
                cell(run.figures[name], direction) if name else Cell()
                for name, direction in zip(names, directions, strict=True)
            )
            rows.append(TableRow(group, "the method itself", "", own))
            for title, control in run.controls.items():
                cells = tuple(
                    cell(control.figures[name], direction, control.differences.get(name), questions=run.questions(name))
                    if name in control.figures
                    else Cell()
                    for name, direction in zip(names, directions, strict=True)
                )
                rows.append(TableRow(group, title, "", cells))
                about[title] = control.about
                if control.words and not control.differences:
                    remarks.append(f"{group}, {title}: {control.words}")
        notes = [f"{title}: {what}" for title, what in about.items() if what] + remarks
        if without:
            notes.append(f"No controls were run with {', '.join(without)}.")
        return Table(protocol, tuple(self.column(word, protocol) for word in words), tuple(rows), tuple(notes))

    def answers(self, protocol: str) -> Table:
        """Numbers of questions, of answers that the parser cannot read, and of answers that a method fixed or broke."""
        names = ("questions", "unparsed", "fixed", "broken", "McNemar p")
        rows = []
        for line, run in self.of(protocol):
            compared = self.comparisons.get(run)
            cells = [number(run.record["questions"]), number(run.notes.get("unparsed"))]
            if isinstance(compared, Comparison):
                cells += [number(compared.only_here), number(compared.only_there)]
                cells += [number(compared.p, f"{compared.p:.3g}")]
            cells += [number(None)] * (len(names) - len(cells))
            rows.append(TableRow(line.model, line.name, "", tuple(cells), line.which))
        return Table(protocol, tuple(Column(name, protocol) for name in names), tuple(rows))

    def cost(self, protocol: str) -> Table:
        """Tokens and time per answer, and time per token; times are compared with the model without a method."""
        names = {"tokens per answer": 0, "prompts at once": 0, "ms per answer": -1, "ms per token": -1}
        rows = []
        for line, run in self.of(protocol):
            own, compared = run.cost, self.comparisons.get(run)
            baseline = compared.baseline if isinstance(compared, Comparison) else None
            plain = baseline.cost if baseline else Cost()
            long = min(own.tokens or 0, plain.tokens or LONG) >= LONG
            length = number(own.tokens, None if own.tokens is None else f"{own.tokens:.1f}")
            cells = (
                length,
                number(own.batch),
                _timed(own.answer, plain.answer, own, plain),
                _timed(own.milliseconds, plain.milliseconds, own, plain) if long else number(None),
            )
            rows.append(TableRow(line.model, line.name, "", cells, line.which))
        return Table(protocol, tuple(Column(name, protocol, good) for name, good in names.items()), tuple(rows))

    def records(self, protocol: str) -> Table:
        """Folder, files, decoding and version of every run."""
        names = ("folder", "questions", "files", "image list", "parser", "prompt", "tokens at most", "seed",
                 "lvlm_jax")  # fmt: skip
        rows = []
        for line, run in self.of(protocol):
            listed = run.record["files"].items()
            values = (
                run.name,
                run.record["questions"],
                ", ".join(f"{role} {entry['sha256'][:8]}" for role, entry in listed),
                run.record["images"]["list_sha256"][:8],
                run.protocol.parser,
                json.dumps(run.protocol.template + run.protocol.suffix, ensure_ascii=False),
                run.protocol.max_new_tokens,
                run.record.get("seed"),
                run.record["version"],
            )
            cells = (Cell(str(value), mark=self.marks.get(run, "") * (not i)) for i, value in enumerate(values))
            rows.append(TableRow(line.model, line.name, line.settings, tuple(cells), line.which))
        return Table(protocol, tuple(Column(name, protocol) for name in names), tuple(rows))


def _timed(own: float | None, plain: float | None, cost: Cost, other: Cost) -> Cell:
    """Milliseconds, and their ratio to those of a run without a method if both runs were timed in the same way."""
    if own is None:
        return Cell("not recorded")
    if plain is None:
        ratio = ""
    elif cost.device != other.device:
        ratio = "the model alone ran on another device"
    elif cost.batch != other.batch:
        ratio = "the model alone ran in other batches"
    else:
        ratio = f"{own / plain:.2f} times"
    return Cell(f"{own:.1f}", ratio, order=own)
