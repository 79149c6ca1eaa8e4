"""Decodes tokens to text, and finds stop strings."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

LONGEST_LETTER = 8  # tokens of one character: four bytes of UTF-8 and a few before them


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of generated tokens, without special tokens and surrounding blanks."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def first_stop(text: str, strings: Sequence[str]) -> int | None:
    """The place where the first complete stop string begins; None without one.

    "First" is the string that ends first, so the result does not depend on how often a growing text is checked.
    """
    ends_and_starts = [(place + len(string), place) for string in strings if (place := text.find(string)) >= 0]
    return min(ends_and_starts)[1] if ends_and_starts else None


def decode_raw(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of generated tokens, with special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the special tokens, which `decode` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token): number for number, token in added.items() if token.special}


def tokens_before(
    tokenizer: Any, tokens: Sequence[int], cut: int, read: Callable[[Any, Sequence[int]], str] = decode
) -> int:
    """How many leading tokens give the first `cut` characters of the text that `read` makes of them."""

    def enough(count: int) -> bool:
        return len(read(tokenizer, tokens[:count])) >= cut

    # Bisection: decoding every prefix of an answer of thousands of tokens would be slow.
    count = bisect.bisect_left(range(len(tokens)), True, key=enough)
    # An incomplete character of several tokens may be decoded as more characters.
    return next((before for before in range(max(0, count - LONGEST_LETTER), count) if enough(before)), count)


class StreamWriter:
    """Splits the growing text of an answer into pieces that never have to be taken back.

    It holds back the possible beginning of a stop string, and the replacement character of an incomplete character.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self.written = 0

    def push(self, text: str, final: bool) -> str:
        """The next piece of `text`; all of the rest if it is final."""
        end = len(text) if final else self._safe(text)
        piece = text[self.written : end]
        self.written = max(self.written, end)
        return piece

    def _safe(self, text: str) -> int:
        end = len(text.rstrip("�"))
        for string in self.strings:
            # Text that was already written was not the beginning of the string.
            for size in range(min(len(string) - 1, end - self.written), 0, -1):
                if text.endswith(string[:size], 0, end):
                    end -= size
                    break
        return end
