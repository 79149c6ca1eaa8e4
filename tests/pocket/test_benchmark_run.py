"""The pocket benchmark: one command from an empty folder to the tables, which resumes after a stop."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.cli import pocket_benchmark
from lvlm_jax.configs import pocket_benchmark as settings
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import get
from lvlm_jax.pocket import benchmark as pocket
from lvlm_jax.pocket import benchmark_run, claims, splits
from tests.evaluation.fakes import Oracle


def run(out, *words):
    return pocket_benchmark.main(["--out", str(out), "--images", "10", "--captions", "8", "--resamples", "20", *words])


def tables(path: Path) -> list[list[list[str]]]:
    """The cells of every table of a Markdown file."""
    blocks = re.findall(r"(?:^\|.*\n)+", path.read_text(), flags=re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()] for block in blocks]


def test_from_nothing_to_the_tables(tmp_path, monkeypatch, capsys):
    oracle, out, target = Oracle(), tmp_path / "runs", tmp_path / "docs" / "table.md"
    monkeypatch.setattr(benchmark_run.LVLM, "from_pretrained", lambda *_, **__: oracle)
    assert run(out, "--methods", "vcd", "CAPL", "--markdown", str(target)) == 0
    assert "# Pocket benchmark" in capsys.readouterr().out
    assert target.read_text() == (out / "table.md").read_text()
    assert "--images 10 --captions 8 --methods vcd CAPL" in target.read_text()
    found = tables(target)
    assert len(found) == 2 * len(pocket.PARTS) == 8
    for part, figures, controls in zip(pocket.PARTS, found[::2], found[1::2], strict=True):
        assert figures[0] == ["method", *part.columns, "seconds"]
        assert [row[0] for row in figures[2:]] == ["greedy", "vcd", "capl"]
        assert not any("<br>" in cell for cell in figures[2])
        scores, protocol = json.loads((out / part.name / "vcd" / "scores.json").read_text()), get(part.protocol)
        assert scores["record"]["protocol"] == dataclasses.asdict(protocol) | {"groups": list(protocol.groups)}
        for name, cell in zip(part.columns.values(), figures[3][1:], strict=False):
            figure = scores["figures"][name]
            if figure["value"] is not None:
                scale = 100 if figure["unit"] == "share" else 1
                assert cell.startswith(f"{figure['value'] * scale:.1f} (") and "<br>" in cell
        last = ["length"] if part.name == "chair" else ["threshold", "olm", "olm-sampled", "pba", "pba-sampled"]
        assert controls[0] == ["method against", "greedy", "temperature", "plausibility", *last]
        assert [row[0] for row in controls[2:]] == ["vcd", "capl"]
        says = re.compile("significantly|no difference shown|no verdict below 30|not defined")
        assert all(says.match(cell) for row in controls[2:] for cell in row[1:])
    asked = oracle.asked
    assert run(out, "--methods", "vcd", "capl") == 0
    assert oracle.asked == asked  # all was there
    assert run(out, "--methods", "vcd", "capl", "icd") == 0
    assert asked < oracle.asked < 1.5 * asked  # greedy, sampling and the cut are shared
    with pytest.raises(LVLMError, match="no method 'magic'; it has all, cmac-pope, .* opera"):
        run(out, "--methods", "magic")


@pytest.mark.parametrize("published", [False, True])
def test_all_methods_that_need_no_file_are_compared(published):
    rows = pocket_benchmark.chosen(["all", "pai:alpha=0.2"], published)
    assert list(rows)[-1] == "pai-alpha=0.2" and rows["pai-alpha=0.2"] == methods.PAI(alpha=0.2)
    values = [one for row in rows.values() for one in (row.values() if isinstance(row, dict) else [row])]
    missing = {methods.get(name) for name in methods.names()} - set(map(type, values))
    assert missing == {methods.AdaIAT, methods.ADHH, methods.Nullu, methods.VTI}


def test_what_papers_claim_is_held_against_the_figures(tmp_path, monkeypatch):
    """Every row says what the table's interval says, and the worlds' differences are those of their images."""
    monkeypatch.setattr(benchmark_run.LVLM, "from_pretrained", lambda *_, **__: Oracle())
    monkeypatch.setattr(pocket_benchmark, "deep", lambda _: True)
    words = ["--methods", "vcd", "capl", "iat", "--seeds", "2", "--parts", "pope", "chair", "multi_image"]
    assert run(tmp_path, *words, "--images", "40", "--controls", "temperature") == 0
    assert {path.name for path in (tmp_path / "pope").iterdir()} == {"greedy", "vcd", "temperature"}
    claimed, mended, pope = tables(tmp_path / "table.md")[:3]
    assert [row[:2] for row in claimed[2:]] == [
        *(["vcd", word] for word in ("POPE accuracy", "POPE F1", "C_S", "C_I")),
        ["iat", "C_S"], ["iat", "C_I"], ["capl", "several images"],
    ]  # fmt: skip
    scores = json.loads((tmp_path / "pope" / "vcd" / "scores.json").read_text())
    difference = scores["controls"]["greedy"]["against"]["differences"]["mean: accuracy"]
    low, high = difference["interval"]
    assert claimed[2][5].strip("*") == ("shown" if low > 0 else "opposite" if high < 0 else "not shown")
    assert claimed[2][4].startswith(f"{100 * difference['value']:+.1f} (")
    right = [
        {(group, number): good for group, number, good in json.loads(path.read_text())["correct"]}
        for path in (tmp_path / "pope" / name / "scores.json" for name in ("vcd", "greedy"))
    ]
    files = [json.loads(line) for line in (tmp_path / "world-40-of-2/pope/pope_random.json").read_text().splitlines()]
    even = [("random", str(row["question_id"])) for row in files if splits.number(row["image"]) % 2 == 0]
    change = np.mean([right[0][key] for key in even]) - np.mean([right[1][key] for key in even])
    found = claims.by_world(
        dataclasses.replace(claims.FIGURES["POPE accuracy"], figure="random: accuracy"),
        tmp_path / "pope" / "vcd", tmp_path / "pope" / "greedy", 2,
    )  # fmt: skip
    assert found[0] == pytest.approx(change)
    assert [row[0] for row in mended[2:]] == ["vcd", "iat"]
    assert [row[0] for row in pope[2:]] == ["greedy", "vcd"]  # iat cannot act on one word, nor capl on one image


def test_verdicts_follow_interval_and_claim():
    intervals = [0.1, 0.2], [-0.1, 0.2], [-0.2, -0.1], [0, 0.1], [None, 1], [0, 0]
    said = [claims.verdict(interval, 1, 30) for interval in intervals]
    assert said == ["shown", "not shown", "opposite", "not shown", "not defined", "not shown (the same)"]
    assert [claims.verdict(interval, -1, 30) for interval in ([0.1, 0.2], [-0.2, -0.1])] == ["opposite", "shown"]
    assert claims.verdict([0.1, 0.2], 1, 29) == "no verdict below 30 questions"


def test_every_claim_is_about_a_figure_of_a_method():
    known, claimed = settings.get_published(), settings.get_claims()
    assert {word for words in claimed.values() for word in words} <= set(claims.FIGURES)
    rows = [*known, *methods.names()]  # those that read a file have claims but no published row
    assert all(any(claims.of(name, {word: "x"}) for name in rows) for word in claimed)
    assert [name for name in known if not claims.of(name, claimed)] == ["dola-low"]
    for part in (part for given in known.values() if isinstance(given, dict) for part in given):
        assert part in {one.name for one in pocket.PARTS}


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_world_is_whole_or_absent(tmp_path, monkeypatch):
    folder = tmp_path / "world"
    with monkeypatch.context() as stopped:
        stopped.setattr("pathlib.Path.rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pocket.write_world(folder, 10)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as full:
        full.setattr("PIL.Image.Image.save", no_space)
        with pytest.raises(LVLMError, match="cannot be written to .*: No space left on device"):
            pocket.write_world(folder, 10)
    assert not list(tmp_path.iterdir())
    pocket.write_world(folder, 10)
    for part in pocket.PARTS:
        assert part.data(folder).folder == folder
    assert len(list((folder / "images").iterdir())) == 10
    monkeypatch.setattr(splits, "write_split", None)
    pocket.write_world(folder, 10)  # nothing is written again


def test_every_setting_is_a_method():
    known = pocket_benchmark.chosen(["all"])
    assert list(pocket_benchmark.chosen(["VCD"])) == ["vcd"]
    assert {type(method).__name__ for method in known.values()} >= {"CMAC", "SEVI", "CLVA", "EAH", "OPERA", "CAPL"}
    assert all(name == name.lower() and " " not in name for name in known)


@pytest.mark.slow
def test_with_the_pocket_model(tmp_path):
    assert run(tmp_path, "--methods", "sevi-focused", "--batch-size", "16") == 0
    figures, controls = tables(tmp_path / "table.md")[:2]
    greedy = float(figures[2][1].split()[0])
    assert 60 < greedy <= 100  # of POPE's random split
    assert len(controls) == 3
