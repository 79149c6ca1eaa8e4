"""The tables of docs/models.md: every method on every family, eight tokens of prompts with two images, none and one.

To write them anew (some ten minutes of one core):

    python -m tests.models.method_tables --write
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.fitted import Fitted, Source
from lvlm_jax.models.pictures import round_up_to_bucket
from tests.compiler import optimised
from tests.methods.entries import ENTRIES
from tests.models import zoo

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
NEW_TOKENS = 8
TWO, NONE, ONE = range(3)  # samples of the batch, by their images

# Columns with settings of their own; others are methods as they act in every small model, see ENTRIES.
OWN = {
    "capl truncated": ("capl", {"mode": "truncated"}),
    "clva": (
        "clva",
        {"noise_layers": 1, "anchor_start": 0.0, "anchor_end": 0.0, "lambda_": 0.5, "rho": 0.5, "layers": (1,),
         "gate": False},
    ),
    "cmac": ("cmac", {}),
    "opera": ("opera", {"beams": 2, "candidates": 2}),
    "sevi + cicd": ("sevi", {"start_layer": 0, "cicd": True, "kappa": 0.6}),
    "iat": ("iat", {"start_layer": 0, "end_layer": None}),
    "only": ("only", {}),
    "var": ("var", {"layers": (0, 1), "tau": 1.2, "p": 0.2, "rho": 0.95, "least": 0.05}),
    "adaiat": ("adaiat", {"alpha": 0.8, "layers": (0, 1)}),
    "adhh": ("adhh", {"heads": (0, 0, 0, 1, 1, 0, 1, 1), "tau": 0.05}),
}  # fmt: skip


def columns(names: str) -> dict[str, tuple[str, dict]]:
    """Column -> method and the settings under which it acts in two decoder layers and on images of a few tokens."""
    return {name: OWN.get(name) or (name, ENTRIES[name].fields) for name in names.split(", ")}


METHODS = columns(
    "capl, capl truncated, clva, cmac, deco, dola, eah, icd, m3id, middle_layers, opera, pai, sevi + cicd, sid, vaf, "
    "vcd, vista"
)
# In the quick suite each family has CMAC and one more method, and each method a family.
QUICK = {
    "gemma3": "capl",
    "glm4v": "sid",
    "idefics3": "dola",
    "instructblip": "icd",
    "internvl": "capl truncated",
    "internvl_chat": "deco",
    "llava": "vaf",
    "llava_next": "pai",
    "llava_onevision": "middle_layers",
    "qwen2_5_vl": "m3id",
    "qwen2_vl": "eah",
    "qwen3_vl": "vista",
    "qwen_vl": "clva",
    "smolvlm": "sevi + cicd",
}
# Methods of the field, on the families that tables compare: tables of their own. What `lvlm fit` would have found in a
# model of two layers is drawn at random.
FIELD = columns("avisc, dab, farsight, iat, memvr, nolan, only, sparc, spin, var, vhr")
MORE = columns("adaiat, adhh, causalmm, damro, nullu, ritual, vti")
FIELD_FAMILIES = ("internvl", "llava", "qwen2_5_vl")
SEVERAL_IMAGES = ("capl", "capl truncated", "dab")  # act on the sample with two images alone
LATER = ("adaiat", "iat", "m3id", "sparc")  # leave the first token alone

TOKENS = (5, 7, 11)  # before those steps
TEXT_TOO = ("deco", "dola", "nullu")  # look at no image, and treat all samples alike

PARTS = {"methods": (METHODS, zoo.FAMILIES), "field": (FIELD, FIELD_FAMILIES), "more": (MORE, FIELD_FAMILIES)}
RAN = "✓"


def build(column: str, model: LVLM | None = None) -> methods.Method:
    name, settings = (METHODS | FIELD | MORE)[column]
    if column in ("adaiat", "nullu", "vti"):
        settings = settings | {"fitted": drawn(column, model)}
    return methods.get(name)(**settings)


def drawn(word: str, model: LVLM) -> Fitted:
    """A file of `lvlm fit`, of random numbers."""
    text, vision, random = model.config.text, model.config.vision, np.random.default_rng(3)
    layers, heads, width = text.num_layers, text.num_heads, text.hidden_size
    arrays = {
        "adaiat": {"ratios": random.uniform(0.3, 2, (layers, heads)), "thresholds": np.full(layers, heads)},
        "nullu": {"directions": np.linalg.qr(random.normal(size=(layers, width, 2)))[0].swapaxes(1, 2)},
        "vti": {
            "directions": random.normal(size=(layers, width)),
            "vision_directions": random.normal(size=(vision.num_layers, vision.hidden_size)),
        },
    }[word]
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    return Fitted(arrays, Source(word, model.hash, "pairs", "{}"))


def stepped(case: zoo.Case, method: methods.Method | None, *rows: int, tokens: Iterable[int] = ()):
    """The logits behind the prompts, or after tokens that are the same for every method.

    There is room for the answer as `generate` makes it.
    """
    prompt = case.prompt(*rows)
    state, step = case.model.prefill(prompt, method, int(prompt.lengths.max()) + 64)
    for token in tokens:
        state, step = case.model.decode(state, np.full(3, token, np.int32))
    return step


def assert_generates(case: zoo.Case, method: methods.Method) -> None:
    """Eight tokens for each sample; a logit that is not a number would make their log-probabilities none."""
    out = case.model.generate(case.prompt(), method, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    assert [len(tokens) for tokens in out.tokens] == [NEW_TOKENS] * 3
    assert np.isfinite(np.concatenate(out.logprobs)).all()


def assert_acts(case: zoo.Case, column: str, plain: np.ndarray, later: np.ndarray) -> None:
    """Samples with images are changed, the one without is not; some, where there are several images.

    `plain` are the logits without a method, `later` those after three tokens.
    """
    step = stepped(case, build(column, case.model), tokens=TOKENS if column in LATER else ())
    plain = later if column in LATER else plain
    main, combined = np.asarray(step.main), np.asarray(step.combined)
    assert np.isfinite(main).all() and not np.isnan(combined).any() and (combined < np.inf).all()
    kept = np.isfinite(combined)
    changed = np.where(kept, np.abs(combined - plain), 0).max(axis=1)
    if step.contrast is not None:
        apart = np.abs(np.asarray(step.contrast) - main).max(axis=1)
        changed = np.minimum(changed, apart)
    acts = {TWO} if column in SEVERAL_IMAGES else {TWO, NONE, ONE} if column in TEXT_TOO else {TWO, ONE}
    assert min(changed[sample] for sample in acts) > 1e-3, f"nothing changed: {changed}"
    for sample in {TWO, NONE, ONE} - acts:
        alone = kept[sample]  # CMAC cuts there too, with nothing to contrast
        np.testing.assert_allclose(combined[sample][alone], plain[sample][alone], rtol=0, atol=1e-4)


def measured(case: zoo.Case, columns: Iterable[str] = tuple(METHODS)) -> dict[str, str]:
    """A row of the table: for each method that it runs, or the reason why it does not."""
    plain, later = (np.asarray(stepped(case, None, tokens=tokens).main) for tokens in ((), TOKENS))
    cells = {}
    for column in columns:
        try:
            assert_generates(case, build(column, case.model))
            if column != "opera":
                assert_acts(case, column, plain, later)
            cells[column] = RAN
        except LVLMError as error:
            cells[column] = str(error)
    return cells


def table(rows: dict[str, dict[str, str]], columns: Iterable[str] = tuple(METHODS)) -> str:
    """Families by methods in Markdown; reasons stand below it."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    reasons: list[str] = []
    for name, cells in sorted(rows.items()):
        shown = []
        for column in columns:
            if cells[column] != RAN and cells[column] not in reasons:
                reasons.append(cells[column])
            shown.append(RAN if cells[column] == RAN else f"no ({reasons.index(cells[column]) + 1})")
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    lines += [f"\n({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


def marked(part: str) -> str:
    """The pattern of what docs/models.md holds between the marks of a generated part."""
    return rf"(?<=<!-- {part} -->\n).*?(?=<!-- end -->)"


def committed(part: str) -> str:
    found = re.search(marked(part), DOCUMENT.read_text(encoding="utf-8"), re.S)
    assert found, f"docs/models.md has no part {part!r}"
    return found[0]


def committed_row(name: str, part: str = "methods") -> str:
    return next(line for line in committed(part).splitlines() if line.startswith(f"| `{name}` |"))


def sizes(most: int, smallest: int = 1) -> list[int]:
    return sorted({round_up_to_bucket(count, smallest) for count in range(1, most + 1)})


# Family -> what decides on the programs of its tower for up to eight images in a batch, and the buckets of each.
BUCKETS: dict[str, dict[str, list[int]]] = {
    "`llava_next`": {"tiles of all images (5 an image)": sizes(5 * 8)},
    "`llava_onevision`": {"tiles of all images (37 an image that comes alone)": sizes(37 * 8)},
    "`internvl`": {"tiles of all images (13 an image)": sizes(13 * 8)},
    "`smolvlm`, `idefics3`": {"tiles of all images (17 an image)": sizes(17 * 8)},
    "`instructblip`": {"images": list(range(1, 9)), "Q-Former words of the longest instruction": sizes(512, 16)},
    "`qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`": {
        "images": sizes(8),
        "tokens of the largest image (16384 at most)": sizes(16384, 16),
    },
    "`glm4v`": {"images": sizes(8), "tokens of the largest image (7500 at most)": sizes(7500, 16)},
    "`llava`, `qwen_vl`, `gemma3`": {"images": list(range(1, 9))},
}


def program_table() -> str:
    """Bounds on the number of programs of the towers, in Markdown."""
    lines = ["| family | what decides | sizes | programs at most |", "|---|---|---|---|"]
    for family, buckets in BUCKETS.items():
        for place, (what, found) in enumerate(buckets.items()):
            count = str(np.prod([len(sizes) for sizes in buckets.values()])) if place == 0 else ""
            lines.append(f"| {family if place == 0 else ''} | {what} | {', '.join(map(str, found))} | {count} |")
    return "\n".join(lines) + "\n"


def written(text: str, part: str, content: str) -> str:
    """The document with a generated part replaced."""
    return re.sub(marked(part), lambda _: content, text, flags=re.S)


def measured_rows(names: Iterable[str], columns: Iterable[str], load: Callable[[str, Path], zoo.Case]) -> dict:
    """The rows of a table, printed as they come."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder, optimised(False):
        for name in names:
            (Path(folder) / name).mkdir()
            rows[name] = measured(load(name, Path(folder) / name), columns)
            jax.clear_caches()  # the programs of all families together exceed a process's mappings
            print(name, *(cell for cell in rows[name].values()), flush=True)
    return rows


def main(words: list[str], load: Callable[[str, Path], zoo.Case] = zoo.load) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/models.md")
    parser.add_argument("--part", choices=tuple(PARTS), help="one of the tables alone")
    arguments = parser.parse_args(words)
    text = DOCUMENT.read_text(encoding="utf-8")
    for part, (columns, names) in PARTS.items():
        if arguments.part in (None, part):
            text = written(text, part, table(measured_rows(names, columns, load), columns))
    if arguments.write:
        DOCUMENT.write_text(written(text, "programs", program_table()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
