"""Groups the tokens of an answer into words, according to the decoded text."""

import dataclasses
import re
from collections.abc import Callable, Sequence

# Chinese, Japanese and Korean have no spaces between words: each character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’-][^\W{_UNSPACED}]+)*")


@dataclasses.dataclass(frozen=True)
class Word:
    """One word of an answer.

    Attributes:
        text: the word, without punctuation around it.
        start, end: place of the word in the answer's text.
        tokens: indices of the word's tokens in the answer.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


def words_of(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, list[Word]]:
    """The text of an answer and its words.

    `decode` turns token ids into text. Words do not depend on how the tokenizer marks the beginning of a word. Special
    tokens belong to no word, and a token may belong to two words.
    """
    text = decode(tokens)
    # End of the text after each token; the text of a token lies between two of these.
    ends = [len(decode(tokens[:count])) for count in range(len(tokens))] + [len(text)]
    words = []
    for match in _WORD.finditer(text):
        own = [index for index in range(len(tokens)) if ends[index] < match.end() and ends[index + 1] > match.start()]
        if own:
            words.append(Word(match.group(), match.start(), match.end(), tuple(own)))
    return text, words
