"""Messages: one line, at most 300 characters, whatever a value or a library puts into them."""

import pickle

from lvlm_jax.errors import LONGEST, LVLMError, shown


class Odd:
    def __repr__(self):
        raise RuntimeError


def test_a_message_is_one_printable_line():
    for given, expected in (
        ("a file is missing; check the path", "a file is missing; check the path"),
        ("a library\n  said\r\nthis\u2028and that\n", "a library said this and that"),
        ("two  blanks of 'a  name'", "two  blanks of 'a  name'"),
        ("a name \x1b[31m\x00 \ud83d, é and 图", "a name \\x1b[31m\\x00 \\ud83d, é and 图"),
        (KeyError("a"), "'a'"),
    ):
        error = LVLMError(given)
        assert str(error) == expected == str(pickle.loads(pickle.dumps(error)))


def test_long_messages_keep_their_beginning_and_their_end():
    message = str(LVLMError(f"alpha is '{'x' * 500}'; expected a number"))
    assert message.startswith("alpha is 'xxx") and message.endswith("xxx'; expected a number") and len(message) < 100
    start = "model_type 'x' is not known; expected one of model_0, "
    models = ", ".join(f"model_{number}" for number in range(1, 400))
    message = str(LVLMError(f"{start}{models}; give another"))
    assert message.startswith(start) and message.endswith("; give another")
    assert len(message) == LONGEST and "…" in message


def test_values_in_messages():
    for value, expected in (
        ("a\nb", r"'a\nb'"),
        (10**5000, "a very long int"),
        (Odd(), "a value of type Odd without a text"),
        (None, "None"),
    ):
        assert shown(value) == expected and len(shown([value] * 100)) <= 60
