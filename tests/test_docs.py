"""The documents: their examples run, their commands and flags exist, their links lead somewhere."""

import ast
import contextlib
import json
import re
import shlex
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from lvlm_jax import LVLM, methods
from lvlm_jax.cli import main
from lvlm_jax.methods import registry
from lvlm_jax.weights import names

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING"))]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.S)
# Examples that another test runs, or that need somebody else's program; here only their syntax is read.
ELSEWHERE = {"write_a_method.md": "tests/methods", "serving.md": "tests/serving", "adapters.md": "lmms-eval"}


def blocks(page):
    return [code for language, code in FENCE.findall(page.read_text()) if language in ("python", "py")]


def commands(page):
    """The command lines of a page, each as words; a comment behind it is dropped."""
    shell = [code for language, code in FENCE.findall(page.read_text()) if language == "bash"]
    lines = re.findall(r"^    (.*)$", FENCE.sub("", page.read_text()), re.M) + "\n".join(shell).splitlines()
    ours = (line for line in lines if re.match(r"(.venv/bin/)?lvlm [a-z-]+( |$)", line))
    return [shlex.split(line.split("…")[0].replace("\\", ""), comments=True) for line in ours]


@pytest.fixture(scope="module")
def pocket():
    return LVLM.from_pretrained("pocket")


@pytest.fixture
def namespace(pocket, monkeypatch, tmp_path):
    """Names that examples use without defining them: a model, a question about an image in the current folder."""
    monkeypatch.chdir(tmp_path)
    # A page loads the model again; so that nothing is compiled twice it gets the one that is there.
    monkeypatch.setattr(LVLM, "from_pretrained", lambda name: pocket if name == "pocket" else pytest.fail(name))
    known = dict(registry._REGISTRY)
    image = {"type": "image", "image": names.pocket_file("sample.png")}
    question = [{"role": "user", "content": [image, {"type": "text", "text": "Is there a dog in the image?"}]}]
    yield {"model": pocket, "question": question, "messages": [question], "conversations": [question] * 3}
    registry._REGISTRY.clear()
    registry._REGISTRY.update(known)


LONG = ("attention.md",)  # half a minute of programs


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.name in LONG))
        for page in PAGES
        if blocks(page)
    ],
)
def test_examples_run(page, namespace, capsys):
    for code in blocks(page):
        ast.parse(code)
        if page.name not in ELSEWHERE:
            exec(compile(code, page.name, "exec"), namespace)
    if page.name == "start.md":
        plain, changed, shape, _ = capsys.readouterr().out.split("\n", 3)
        assert "kitchen" in plain and "kitchen" in changed and shape.startswith("(8, ")


def test_the_method_of_the_readme_is_what_its_words_say(namespace):
    exec(next(code for code in blocks(ROOT / "README.md") if "class Dim" in code), namespace)
    dim = methods.get("dim")

    def first_logits(method):
        return np.asarray(namespace["model"].prefill([namespace["question"]], method)[1].combined)

    np.testing.assert_allclose(first_logits(dim(kappa=0.0)), first_logits(None), atol=1e-4)
    assert np.abs(first_logits(dim(kappa=0.9)) - first_logits(None)).max() > 1e-3
    assert list(dim().layers(9)) == [3, 4, 5]


@pytest.mark.slow
def test_the_notebook_runs(namespace, monkeypatch):
    matplotlib.use("agg")
    for cell in json.loads((ROOT / "docs" / "first_look.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)


def test_commands_and_flags_exist(capsys, monkeypatch):
    known, missing = {}, []
    for page in PAGES:
        for _, command, *words in commands(page):
            if command not in known:
                assert command in main.COMMANDS, f"{page.name}: lvlm {command}"
                monkeypatch.setattr("sys.argv", ["lvlm", command, "--help"])
                with contextlib.suppress(SystemExit):
                    main.main()
                known[command] = set(re.findall(r"--[a-zA-Z][\w-]*", capsys.readouterr().out))
            flags = {re.match(r"--[\w-]+", word)[0] for word in words if word.startswith("--")}
            # The settings of a method of the reader's own are flags that no help text has.
            flags -= {"--config", "--help", *(["--delta"] if any(".py:" in word for word in words) else [])}
            missing += [f"{page.name}: lvlm {command} {flag}" for flag in flags - known[command]]
    assert missing == []


def anchors(page):
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"`", "", head).lower()).strip().replace(" ", "-") for head in heads}


def test_links_lead_somewhere():
    dead = []
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file))):
                dead.append(f"{page.name}: {target}")
    assert dead == []
