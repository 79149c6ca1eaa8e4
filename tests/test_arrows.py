"""ARCHITECTURE.md's table of rooms against the imports of the package: which room may import which."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lvlm_jax"
# What `lvlm_jax` itself offers, and the room each name comes from.
FACE = {"LVLM": "lvlm", "Output": "lvlm", "LVLMError": "errors", "__version__": "version"}
# The package's own front: it imports the public face and belongs to no room.
FRONT = {"__init__", "__main__"}


def table() -> dict[str, set[str]]:
    """Room -> rooms it may import, lowest floor first, from ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = text.partition("| room |")[2].partition("\n\n")[0].splitlines()[2:]
    rooms = {}
    for row in rows:
        name, _, imports = (cell.strip() for cell in row.strip("|").split("|"))
        rooms[name.strip("`")] = set(re.findall(r"`(\w+)`", imports))
    return rooms


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """(room, file) of every module of the package."""
    for folder, _, names in os.walk(package, followlinks=True):  # `configs` is a link to the folder at the top
        for path in sorted(Path(folder) / name for name in names if name.endswith(".py")):
            room = path.relative_to(package).with_suffix("").parts[0]
            if room not in FRONT:
                yield room, path


def imported_rooms(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of the package in a file, also inside functions."""
    here = (package.name, *path.relative_to(package).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else ()
            start = ".".join((*above, *filter(None, [node.module])))
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == package.name and rest:
                yield node.lineno, FACE.get(rest[0], rest[0])


def violations(package: Path, rooms: dict[str, set[str]]) -> list[str]:
    """Imports that the table does not allow, as "file:line imports room"."""
    return [
        f"{path.relative_to(package)}:{line} imports {room}"
        for own, path in modules(package)
        for line, room in imported_rooms(path, package)
        if room != own and room not in rooms.get(own, set())
    ]


def test_every_room_is_in_the_table():
    assert {room for room, _ in modules(PACKAGE)} == set(table())


def test_arrows_point_down():
    names = list(table())
    up = [
        (room, other) for room, others in table().items() for other in others if other not in names[: names.index(room)]
    ]
    assert not up


def test_imports_are_those_of_the_table():
    assert not violations(PACKAGE, table())


@pytest.mark.parametrize(
    "line",
    [
        "from lvlm_jax.generation import decode_loop",
        "from lvlm_jax import LVLM",
        "import lvlm_jax.training.loop",
        "from ..evaluation import scores",
        "def later():\n    from lvlm_jax.cli import common",
    ],
)
def test_a_violation_is_noticed(tmp_path, line):
    planted = tmp_path / "lvlm_jax" / "methods" / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(f"import numpy\nfrom lvlm_jax.attention import Site\n{line}\n")
    (found,) = violations(tmp_path / "lvlm_jax", table())
    assert found.startswith("methods/planted.py:")
