"""The pocket benchmark: one command from nothing to the tables, which goes on where it was."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from lvlm_jax.cli import pocket_benchmark
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import get
from lvlm_jax.pocket import benchmark as pocket
from lvlm_jax.pocket import benchmark_run, splits
from tests.evaluation.fakes import Oracle

ROOT = Path(__file__).resolve().parents[2]


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
        scores = json.loads((out / part.name / "vcd" / "scores.json").read_text())
        assert scores["record"]["protocol"] == dataclasses.asdict(get(part.protocol)) | {
            "groups": list(get(part.protocol).groups)
        }
        for name, cell in zip(part.columns.values(), figures[3][1:], strict=False):
            figure = scores["figures"][name]
            if figure["value"] is not None:
                scale = 100 if figure["unit"] == "share" else 1
                assert cell.startswith(f"{figure['value'] * scale:.1f} (") and "<br>" in cell
        last = ["length"] if part.name == "chair" else ["threshold", "olm", "olm-sampled", "pba", "pba-sampled"]
        last = last[: 5 if part.name in ("pope", "mme") else len(last)]
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
