"""The words of docstrings, comments and pages: constructions that readers had to read twice do not come back."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lvlm_jax").rglob("*.py"))
GENERATED = ("pocket_training.md", "pocket_benchmark.md", "smol_benchmark.md")  # commands write these pages
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED]
PAGES += [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
PROMPTS = ("smol_text.py", "questions.py", "conversations.py")  # their strings are questions to models
BANNED = {
    r"\b(go(es|ing)?|went) on (until|with|where|from|between)\b|\bgone on\b": "continues, resumes",
    r"\b[Ss]topped (and started again|or killed, the)\b": "after a stop, the same command resumes",
    r"\b[Ww]hat is (asked|left|told|wanted|minimised|measured|kept|written)\b": "name it: the question, the rest",
    r"\bas it (goes|comes)\b": "name the order",
    r"\bas they come\b": "in the order in which they end",
    r"(^|[.:] )Of [^.,]*, ": "subject first: X of Y",
    r"^What ": "begin with the noun: The result of ...",
    r"\b[Ww]hoever\b": "everybody who",
    r"\b(anew|thereof|whereof|wherein|thereby)\b": "again; of it",
    r"\b[Dd]oes what\b|\bwhat c[ao]mes? of\b|\bdiffers? from what\b": "name it: runs the missing stages, the results",
    r"\b(after|of|over|about) so many [a-z]+s\b": "this number of",
    r"\bwhere (none|one|there|nothing) (is|are|has)\b": "if",
    r", where (it|they) (has|have|is|are|do|does)\b[^.;]{0,9}[.;]": "if",
    r"\b(tell|tells) (it|them|a \w+|the \w+|real \w+) from\b": "distinguishes; differs from",
    r"\bby what (it|is|they)\b|\bwhat is in it\b": "name it",
    r"\bas ever\b": "as always, or leave it out",
    r"\bbut for (case|text|its|the)\b": "apart from",
    r"\btold (apart|from|of)\b": "distinguished; differs from",
    r"\bhas no use for\b": "does not use",
    r"\bin the place of (the|a|one|numbers|arrays) (?!answer)": "instead of",
    r"(?<!there )\b(is|are) no (file|folder|log|setting|method|command|function|list|path|JSON|sinks?)\b": "is not a",
    r"\bto come to lie\b": "is moved to",
    r"\bof the (kin|like)\b": "similar",
    r"\bway of the data\b": "data flow",
}
NAMES = {
    "told": "events",
    "held": "what is held: contents, is_held_out",
    "taken": "what is taken: registered, rows",
    "found": "what is found: matches, results",
    "said": "what is said: message, caption",
    "asked": "what is asked: questions, prompts",
    "made": "what is made: result, figures",
    "kept": "what is kept: kept_ids, entries",
    "given": "what is given: settings, value",
    "answered": "what is answered: results, answers",
    "named": "what is named: names, keywords",
    "wanted": "what is wanted: method_names, expectation",
    "seen": "what is seen: visible, ids",
    "opened": "what is opened: images, files",
    "looked": "looker",
    "witness": "what it observes",
    "wider": "the wider thing: outer_window",
    "primed": "after_warm_up",
    "primes": "warm_up_fields",
    "drivers": "decode_loop",
    "got": "result",
    **dict.fromkeys(
        ("Asked", "Said", "Answered", "Logged", "Kept", "WaysBack"), "a noun: Question, Answer, LoggedAnswers"
    ),
}


def _texts(path: Path) -> list[tuple[int, str]]:
    """The docstrings and comments of a file, with their lines."""
    source = path.read_text()
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = list(ast.walk(ast.parse(source)))
    documented = [node for node in nodes if isinstance(node, kinds)]
    texts = [(getattr(node, "lineno", 1), text) for node in documented if (text := ast.get_docstring(node))]
    if path.name not in PROMPTS:  # messages, help texts, headings
        strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        texts += [(node.lineno, f" {node.value}") for node in strings]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return texts + [(token.start[0], token.string[2:]) for token in tokens if token.type == tokenize.COMMENT]


def _faults(texts: list[tuple[str, str]]) -> list[str]:
    return [
        f"{where}: {match.group(0).strip()!r}; write: {hint}"
        for pattern, hint in BANNED.items()
        for where, text in texts
        for match in re.finditer(pattern, text, re.MULTILINE if pattern.startswith("(^") else 0)
    ]


def test_docstrings_and_comments():
    texts = [(f"{path.relative_to(ROOT)}:{line}", text) for path in SOURCES for line, text in _texts(path)]
    assert not (faults := _faults(texts)), "\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)  # code blocks
    lines = [(f"{page.name}: {line[:40]!r}", line) for line in text.split("\n") if not line.startswith(("|", "    "))]
    assert not (faults := _faults(lines)), "\n".join(faults)


def test_names():
    classes, faults = [], []
    for path in [*SOURCES, *sorted((ROOT / "tools").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes.append(node.name)
            name = getattr(node, "name", None) or getattr(node, "arg", None)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                name = node.attr.strip("_")
            kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.arg | ast.Name | ast.Attribute
            if isinstance(node, kinds) and name in NAMES:
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}; write: {NAMES[name]}")
    assert not faults, "\n".join(faults)
    assert classes.count("Row") <= 1, "one class Row in the package; name the others by their content"


@pytest.mark.parametrize(
    "text",
    [
        "Goes on until it ends.",
        "Of these, one is left.",
        "What is asked.",
        "It goes on where it was.",
        "Does what is missing.",
        "A list, where there are many.",
        "A model of so many layers.",
        "It is no path.",
    ],
)
def test_the_list_finds_faults(text):
    assert _faults([("here", text.replace("Goes on", "It goes on"))])
