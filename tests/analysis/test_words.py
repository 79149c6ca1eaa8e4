"""Words from tokens, and the tokens of each word."""

import numpy as np

from lvlm_jax import analysis

PIECES = ["<s>", "A", " din", "ing", " table", ",", " it", "'", "s", " 犬", "が", ".", "</s>"]


def decode(tokens):
    return "".join(PIECES[token] for token in tokens if not PIECES[token].startswith("<")).strip()


def test_words_know_their_place_and_their_tokens():
    text, words = analysis.words_of(list(range(len(PIECES))), decode)
    assert text == "A dining table, it's 犬が."
    assert [word.text for word in words] == ["A", "dining", "table", "it's", "犬", "が"]
    assert [word.tokens for word in words] == [(1,), (2, 3), (4,), (6, 7, 8), (9,), (10,)]
    assert all(text[word.start : word.end] == word.text for word in words)


def test_a_word_has_the_mean_of_its_tokens():
    _, words = analysis.words_of(list(range(len(PIECES))), decode)
    maps = np.arange(len(PIECES), dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    np.testing.assert_allclose(analysis.word_maps(maps, words)[:, 0], [1, 2.5, 4, 7, 9, 10])
    assert analysis.words_of([], decode) == ("", []) and analysis.words_of([0, 11, 12], decode) == (".", [])
    assert analysis.word_maps(np.ones((3, 2)), []).shape == (0, 2)
