"""Stores clients' files in a folder: the content, and beside it OpenAI's file object as JSON."""

import json
import re
import secrets
import time
from pathlib import Path
from typing import Any

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.serving.errors import ApiError

NAME = re.compile(r"(file|batch)-[0-9a-f]{24}")


def new_id(kind: str) -> str:
    """A new id for a "file" or a "batch"."""
    return f"{kind}-{secrets.token_hex(12)}"


class Store:
    """JSON objects by id, and the content of files; nothing is ever half-written."""

    def __init__(self, folder: Path):
        """Makes the folder.

        Raises:
            LVLMError: the folder cannot be made.
        """
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LVLMError(f"the folder {str(folder)!r} cannot be made: {error.strerror or error}") from error

    def path(self, id: str, suffix: str) -> Path:
        """The path of an object's file.

        Raises:
            ApiError: the id is malformed.
        """
        if not NAME.fullmatch(id):
            raise ApiError(404, f"there is no {id[:60]!r} here", "not_found")
        return self.folder / f"{id}{suffix}"

    def save(self, value: dict[str, Any]) -> dict[str, Any]:
        """Writes an object and returns it."""
        files.write_whole(self.path(value["id"], ".json"), json.dumps(value))
        return value

    def load(self, id: str, kind: str) -> dict[str, Any]:
        """The object of a kind, "file" or "batch", with this id.

        Raises:
            ApiError: there is no such object.
        """
        path = self.path(id, ".json")
        if not id.startswith(kind) or not path.is_file():
            raise ApiError(404, f"there is no {kind} {id[:60]!r}", "not_found")
        return json.loads(path.read_text())

    def all(self, kind: str) -> list[dict[str, Any]]:
        """All objects of a kind, the newest first."""
        objects = [
            json.loads(path.read_text()) for path in self.folder.glob(f"{kind}-*.json") if NAME.fullmatch(path.stem)
        ]
        return sorted(objects, key=lambda one: one["created_at"], reverse=True)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.glob("file-*.jsonl"))

    def add_file(self, name: str, purpose: str, content: bytes) -> dict[str, Any]:
        """Stores a file."""
        id = new_id("file")
        self.path(id, ".jsonl").write_bytes(content)
        return self.save(
            {
                "id": id,
                "object": "file",
                "bytes": len(content),
                "created_at": int(time.time()),
                "filename": name,
                "purpose": purpose,
                "status": "processed",
            }
        )

    def content(self, id: str) -> bytes:
        """The content of a file.

        Raises:
            ApiError: there is no file with this id.
        """
        self.load(id, "file")
        return self.path(id, ".jsonl").read_bytes()

    def remove_file(self, id: str) -> None:
        """Removes a file.

        Raises:
            ApiError: there is no file with this id.
        """
        self.load(id, "file")
        for suffix in (".json", ".jsonl"):
            self.path(id, suffix).unlink(missing_ok=True)
