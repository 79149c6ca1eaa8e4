"""The version of this package, for `pyproject.toml` and for the records of runs."""

__version__ = "0.2.0"
