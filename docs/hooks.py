"""Hooks of mkdocs: the documents of the top folder become pages, and links to source files become their names."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "readme.md", "ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "contributing.md",
         "CHANGELOG.md": "changelog.md"}  # fmt: skip
_IMAGE = re.compile(r"(!\[[^\]]*\]\()docs/")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Adds the documents of the top folder."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown, page, **_):
    """Turns a link within the repository into a link to its page, or into plain text where it has none."""
    folder = ROOT if page.file.src_uri in PAGES.values() else (ROOT / "docs" / page.file.src_uri).parent

    def within(match):
        words, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path:
            return match[0]
        place = (folder / path).resolve().relative_to(ROOT).as_posix()
        if place in PAGES:
            place = PAGES[place]
        elif place.startswith("docs/"):
            place = place.removeprefix("docs/")
        else:
            return words
        depth = page.file.src_uri.count("/")
        return f"[{words}]({'../' * depth}{place}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(within, _IMAGE.sub(r"\1", markdown))
