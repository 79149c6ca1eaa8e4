"""Readers of training data and configurations: pairs, conversations, prompts, corrections, configs."""

import functools
import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from lvlm_jax.training import monitor, settings
from lvlm_jax.training.data import correctors, pair_files, prompts, reference
from tests.fuzz import generators as make
from tests.fuzz.engine import Reader, same, used
from tests.fuzz.questions import lines, made
from tests.training import pair_sets

TEXT = {"type": "text", "text": "What?"}
ANSWERS = {"chosen": "a cat", "rejected": "a dog"}
IMAGE = {"images": ["0.png"]}
# A row of every format that `training.data.pair_formats` names.
PAIRS = (
    {**IMAGE, "id": 7, "prompt": "<image>What?", **ANSWERS, "judge": {"score": 3}},
    {**IMAGE, "prompt": [{"role": "user", "content": [{"type": "image"}, TEXT]}], **{
        name: [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for name, text in ANSWERS.items()}},
    {**IMAGE, "conversations": [{"from": "system", "value": "Be."}, {"from": "human", "value": "<image>What?"}],
     **{name: {"from": "gpt", "value": text} for name, text in ANSWERS.items()}},
    {**IMAGE, "instruction": "And now?", "input": "", "history": [["<image>What?", "a cup"]], "system": "", **ANSWERS},
    {f"{name}_messages": [
        {"role": "user", "content": [{"type": "image_url", "value": "0.png"}, {"type": "text", "value": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": text}]},
    ] for name, text in ANSWERS.items()},
    {"idx": 3, "question": "What?", **ANSWERS, "image": {"bytes": None, "path": "0.png"}},
    {"text": json.dumps({"question": "What?", **ANSWERS}), "image_path": "0.png"},
)  # fmt: skip
SAID = {"role": "assistant", "content": "a cat"}
CONVERSATIONS = (
    {**IMAGE, "messages": [{"role": "user", "content": [{"type": "image"}, TEXT]}, SAID]},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png"}, TEXT]}, SAID]},
    {"id": "a", "image": "0.png",
     "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cup"}]},
    {**IMAGE, "instruction": "What?", "input": "", "output": "a cat", "history": [["Hi", "Ho"]]},
)  # fmt: skip
PROMPTS = (
    {**IMAGE, "prompt": "<image>What?", "truth": "a cat"},
    {**IMAGE, "id": "b", "prompt": [{"role": "user", "content": [TEXT]}]},
)
INFO = {
    "mine": {
        "file_name": "rows.jsonl", "ranking": True, "formatting": "sharegpt",
        "columns": {"messages": "talk", "chosen": "good", "rejected": "bad", "images": "pictures"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "other": {"file_name": "other.json"},
}  # fmt: skip
NAMED = {
    "talk": [{"role": "user", "content": "<image>What?"}], "good": {"role": "assistant", "content": "a cat"},
    "bad": {"role": "assistant", "content": "a dog"}, "pictures": ["0.png"],
}  # fmt: skip


@functools.cache
def picture() -> make.Files:
    return made(lambda folder: pair_sets.draw(folder, 1))


def _rows(*kinds: dict) -> st.SearchStrategy[make.Files]:
    def of(row: dict) -> st.SearchStrategy[make.Files]:
        files = {"rows.jsonl": lines([row, row | {"id": "other"}]), **picture()}
        return make.changed_folder(files, "rows.jsonl")

    return st.deferred(lambda: st.sampled_from(kinds).flatmap(of))


def pairs(files: make.Files, folder: Path) -> None:
    """Pairs are the same when they are written and read again."""
    make.write(files, folder)
    found = pair_files.read_pairs(folder / "rows.jsonl")
    _check_pairs(found, folder)


def _check_pairs(found: list[pair_files.Pair], folder: Path) -> None:
    for pair in found:
        images = [part for message in pair.conversation() for part in message["content"] if part["type"] == "image"]
        same(len(images), len(pair.images), "images")
    pair_files.write_pairs(folder / "again.jsonl", found)
    again = pair_files.read_pairs(folder / "again.jsonl")
    for pair, other in zip(found, again, strict=True):
        wanted, read = (json.dumps([one.prompt, one.chosen, one.rejected, one.id]) for one in (pair, other))
        same(read, wanted, "a pair that was written and read again")


def conversations(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    for one in pair_files.read_conversations(folder / "rows.jsonl"):
        same(one.messages[-1]["role"], "assistant", "who speaks last")
        places = [part for message in one.messages for part in message["content"] if part["type"] == "image"]
        same(len(places), len(one.images), "images")


def prompt_file(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    found = prompts.read_prompts(folder / "rows.jsonl")
    for one in found:
        used(one.text, one.truth, one.conversation())
    correctors.from_truth(found[:1]).correct(found[0], "x")


def corrections(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    asked = [prompts.Prompt((), [], name) for name in ("a", "b")]
    corrector = correctors.from_file(folder / "rows.jsonl", asked)
    for one in asked:
        corrector.correct(one, "x").strip()


def dataset_info(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    _check_pairs(pair_files.read_pairs(f"{folder}/dataset_info.json:mine"), folder)


def _described() -> st.SearchStrategy[make.Files]:
    files = {"dataset_info.json": json.dumps(INFO).encode(), "rows.jsonl": lines([NAMED]), **picture()}
    return make.changed_folder(files, "dataset_info.json", "rows.jsonl")


CONFIGS = ("capl", "dpo", "flow_alignment", "sft", "simpo")


@functools.cache
def _fields(name: str) -> dict:
    return settings._flat(settings.read(name))


@st.composite
def overrides(draw) -> tuple[str, list[str]]:
    """A config and words of a command line that change it."""
    name = draw(st.sampled_from(CONFIGS))
    words = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(tuple(_fields(name))))
        key = draw(st.just(key) | make.changed_text(key)) if draw(st.integers(0, 5)) == 0 else key
        value = draw(st.just(str(_fields(name).get(key))) | make.texts | make.numbers.map(make.written_json))
        words.append(f"--config.{key}={value}")
    return name, words


def training_config(case: tuple[str, list[str]], folder: Path) -> None:
    name, words = case
    config = settings.read(name, words)
    settings.check(config)
    for field in settings.describe(config):
        str(field.default)
    flat = settings._flat(config)
    for key, _, text in (word.removeprefix("--config.").partition("=") for word in words[-1:]):
        default = _fields(name)[key]
        if isinstance(default, int | float) and not isinstance(default, bool):
            same(type(default)(flat[key]), type(default)(text), key)
            same(bool(np.isfinite(np.float32(flat[key]))) or key == "optimizer.clip", True, f"{key} in float32")


CONFIG = b'''"""A run."""
from lvlm_jax.training import settings


def get_config():
    config = settings.base("dpo")
    config.data = "pairs.jsonl"
    config.optimizer.peak = 1e-4
    config.batch = 4
    return config
'''


def config_file(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    settings.check(settings.read(folder / "mine.py"))


LOG = lines([{"stage": "dpo", "step": step, "loss": 0.5} for step in (1, 2, 3)] + [{"stage": "sft", "step": 9}])


def training_log(files: make.Files, folder: Path) -> None:
    """Complete records up to step 2 stay, and those of other tasks."""
    make.write(files, folder)
    monitor.rewind(folder / "log.jsonl", "dpo", 2)
    for line in (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else ():
        record = json.loads(line)
        same(record["stage"] != "dpo" or record["step"] <= 2, True, "record")


def _cached() -> make.Files:
    return made(lambda folder: reference._write(folder / "cache.npz", np.ones(5, np.float32), [2, 3]))


def reference_cache(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    found = reference._read(folder / "cache.npz", [2, 3])
    same(found is None or found.shape == (5,), True, "log-probabilities")


CORRECTED = lines([{"record": {}}, {"id": "a", "chosen": "x"}, {"id": "b", "chosen": "y", "rejected": "z"}])

READERS = (
    Reader("pairs", _rows(*PAIRS), pairs, 2),
    Reader("conversations", _rows(*CONVERSATIONS, *PAIRS[:1]), conversations, 2),
    Reader("prompts", _rows(*PROMPTS), prompt_file),
    Reader("corrections", make.changed_folder({"rows.jsonl": CORRECTED}), corrections, 0.5),
    Reader("dataset_info", st.deferred(_described), dataset_info),
    Reader("training log", make.changed_folder({"log.jsonl": LOG}), training_log, 0.5),
    Reader("reference cache", st.deferred(lambda: make.changed_folder(_cached())), reference_cache, 0.3),
    Reader("training config", st.deferred(overrides), training_config, 2),
    Reader("config file", st.deferred(lambda: make.changed_folder({"mine.py": CONFIG})), config_file, 0.5),
)
