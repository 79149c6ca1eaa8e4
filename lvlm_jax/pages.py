"""Pages: one HTML file without any reference to the outside, with the data that its script shows inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, title: str, data: Mapping[str, Any], parts: Sequence[Path] = ()) -> str:
    """A page from its template, which has the places `{{ title }}` and, inside a script element, `{{ data | tojson }}`.

    Whatever the data holds stays data: neither the title nor a text in it becomes markup or ends the script.

    Args:
        data: JSON values, without nan.
        parts: folders of files that the template includes, besides its own.
    """
    loader = jinja2.FileSystemLoader([template.parent, *parts])
    environment = jinja2.Environment(loader=loader, autoescape=True, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template.name).render(title=title, data=data)
