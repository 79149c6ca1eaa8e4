"""LLaMA-Factory's `dataset_info.json`: the file of a data set, and the names of its columns and tags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_jax import files
from lvlm_jax.errors import LVLMError, shown

FILE = "dataset_info.json"
# LLaMA-Factory's name of each column, and its name in `pair_formats`.
_COLUMNS = {
    "messages": "conversations",
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    **{name: name for name in ("system", "history", "images", "chosen", "rejected")},
    **{name: name for name in ("videos", "audios", "tools", "kto_tag")},  # refused if a row has them
}
_TAGS = {"role_tag": "from", "content_tag": "value"}
_ROLE_TAGS = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
_OTHER_TAGS = {"observation_tag": "observation", "function_tag": "function_call"}
_ROLES = {"human": "user", "gpt": "assistant"}


def resolved(path: str | Path) -> tuple[Path, Path, dict[str, Any] | None]:
    """The file of a data set, the folder of its images, and its entry of `dataset_info.json` or None.

    Args:
        path: a file of rows, or a `dataset_info.json`, followed by a colon and the name of the entry. Without a name,
            the description must have only one entry, or only one entry with `ranking`.

    Raises:
        LVLMError: a description or an entry is malformed, or needs something unsupported; the message says what.
    """
    before, marker, name = str(path).rpartition(FILE)
    if not marker or (name and not name.startswith(":")):
        path = files.expand(path)
        return path, path.parent, None
    info = files.expand(before + FILE)
    entries = files.read_json(info, "LLaMA-Factory's description", dict)
    ranked = [key for key, entry in entries.items() if isinstance(entry, dict) and entry.get("ranking")]
    only = ranked if len(ranked) == 1 else list(entries)
    entry_name = name.removeprefix(":") or (only[0] if len(only) == 1 else "")
    if entry_name not in entries:
        names = ", ".join(map(str, (ranked or list(entries))[:10]))
        raise LVLMError(f"{str(path)!r} names no data set; expected {FILE}:NAME, NAME one of: {names or 'none'}")
    entry = _checked(entries[entry_name], f"entry {entry_name[:60]!r} of {str(info)!r}")
    return info.parent / entry["file_name"], info.parent, entry


def _checked(entry: Any, where: str) -> dict[str, Any]:
    """Checks an entry; returns it with `columns` and `tags`, which are added if they are missing."""
    if not isinstance(entry, dict):
        raise LVLMError(f"{where} is {shown(entry)}; expected an object with a file_name")
    entry = {key: value for key, value in entry.items() if value not in (None, "", False)}
    for key in ("script_url", "hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name"):
        if key in entry and "file_name" not in entry:
            raise LVLMError(f"{where} takes its rows from a {key}; download them and give their file_name")
    name = files.field(entry, ("file_name",), str, where)
    if not name:
        raise LVLMError(f"{where} has an empty file_name; expected a file beside {FILE}")
    if "num_samples" in entry:
        raise LVLMError(f"{where} has num_samples, which is not supported; make a file of those rows")
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
        raise LVLMError(f"{where}: formatting is {shown(entry['formatting'])}; expected alpaca or sharegpt")
    for key, allowed in (("columns", _COLUMNS), ("tags", {**_TAGS, **_ROLE_TAGS, **_OTHER_TAGS})):
        names_of_key = entry.setdefault(key, {})
        if not isinstance(names_of_key, dict):
            raise LVLMError(f"{where}: {key} is {shown(names_of_key)}; expected an object of names")
        for ours, theirs in names_of_key.items():
            if ours not in allowed:
                raise LVLMError(f"{where}: {key} has {ours[:40]!r}; expected one of {', '.join(allowed)}")
            if theirs is not None and (not isinstance(theirs, str) or not theirs):
                raise LVLMError(f"{where}: {ours} of {key} is {shown(theirs)}; expected a name")
    return entry


def renamed(row: dict, entry: Mapping[str, Any], where: str) -> dict:
    """A row of the data set that `entry` describes, with the names of `pair_formats` for its columns.

    Raises:
        LVLMError: two columns get the same name.
    """
    tags = {**_TAGS, **_ROLE_TAGS, **{key: tag for key, tag in entry["tags"].items() if tag}}
    names = {column: _COLUMNS[key] for key, column in entry["columns"].items() if column}
    roles = {tags[key]: _ROLES.get(ours, ours) for key, ours in _ROLE_TAGS.items()}

    def message(turn: Any) -> Any:
        if not isinstance(turn, Mapping) or tags["role_tag"] not in turn:
            return turn
        role = turn[tags["role_tag"]]
        role = roles.get(role, role) if isinstance(role, str) else role
        return {"role": role, "content": turn.get(tags["content_tag"])}

    def value(content: Any) -> Any:
        return [message(one) for one in content] if isinstance(content, list) else message(content)

    result: dict[str, Any] = {}
    for key, column in row.items():
        name = names.get(key, key)
        if name in result:
            raise LVLMError(f"{where} has two columns that {FILE} calls {name}; rename or remove one")
        result[name] = value(column)
    return result
