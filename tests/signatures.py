"""What checks the signatures of the package while tests run (see `conftest.py`)."""

from beartype import BeartypeConf, beartype

# PEP 484: where a signature says float, an int will do.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
