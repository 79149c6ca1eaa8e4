"""Tokens to text, and stop strings."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

LONGEST_LETTER = 8  # tokens of one character; four bytes of UTF-8, and what stands before them


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of generated tokens, without special tokens and surrounding blanks."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def first_stop(text: str, strings: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, so that the answer does not depend on when one looks."""
    found = [(place + len(string), place) for string in strings if (place := text.find(string)) >= 0]
    return min(found)[1] if found else None


def written(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of generated tokens with special tokens, as they stand."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that `decode` leaves out, by what stop strings call them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token): number for number, token in added.items() if token.special}


def tokens_before(
    tokenizer: Any, tokens: Sequence[int], cut: int, read: Callable[[Any, Sequence[int]], str] = decode
) -> int:
    """How many leading tokens it takes to write the first `cut` characters of what `read` makes of them."""

    def enough(count: int) -> bool:
        return len(read(tokenizer, tokens[:count])) >= cut

    # Tokens are halved until the place is found: an answer of thousands would be read thousands of times.
    count = bisect.bisect_left(range(len(tokens)), True, key=enough)
    # A letter of several tokens may be more characters while it is half-written.
    return next((before for before in range(max(0, count - LONGEST_LETTER), count) if enough(before)), count)


class StreamWriter:
    """Turns the growing text of an answer into pieces that never have to be taken back.

    Held back: what may be the beginning of a stop string, and the replacement character of a half-written letter.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self.written = 0

    def push(self, text: str, final: bool) -> str:
        """The next piece of `text`, everything that is left if it is final."""
        end = len(text) if final else self._safe(text)
        piece = text[self.written : end]
        self.written = max(self.written, end)
        return piece

    def _safe(self, text: str) -> int:
        end = len(text.rstrip("�"))
        for string in self.strings:
            # What is written was no beginning of the string when it was.
            for size in range(min(len(string) - 1, end - self.written), 0, -1):
                if text.endswith(string[:size], 0, end):
                    end -= size
                    break
        return end
