"""The server's page: one self-contained HTML file, which sends requests only to this server."""

from pathlib import Path

from lvlm_jax import pages
from lvlm_jax.analysis import page as attention

TEMPLATE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


def page(model: str) -> tuple[str, str]:
    """The HTML page for the model `model`, and its content security policy."""
    return pages.render(TEMPLATE, f"Ask {model}", {"model": model}, [attention.TEMPLATE.parent]), POLICY
