"""The one exception that users of this package are meant to read."""


class LVLMError(Exception):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what was expected, and what to do. Command-line tools
    print it to stderr and exit with code 2; every other exception is a bug in this package.
    """
