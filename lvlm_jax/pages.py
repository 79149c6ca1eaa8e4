"""Renders self-contained HTML pages: one file with its data inside, without external references."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, title: str, data: Mapping[str, Any], parts: Sequence[Path] = ()) -> str:
    """Renders a page from a template with the places `{{ title }}` and, in a script element, `{{ data | tojson }}`.

    Title and data are escaped: no text in them can become markup or end the script.

    Args:
        data: JSON values, without nan.
        parts: further folders with files that the template includes.
    """
    loader = jinja2.FileSystemLoader([template.parent, *parts])
    environment = jinja2.Environment(loader=loader, autoescape=True, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template.name).render(title=title, data=data)
