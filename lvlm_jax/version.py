"""The version of this package; `pyproject.toml` and the records of runs read it here."""

__version__ = "0.1.0"
