"""Tests of wellposed.data.text."""

import math

import pytest
import torch

from wellposed.data.card import DataError, DataFile
from wellposed.data.sets.english_docstrings import CARD
from wellposed.data.text import english_text, make_lexicon


def test_english_is_whole_and_in_three_parts():
    """Its size is that of the card; fails if held-out blocks overlap the training text."""
    corpus = english_text()
    parts = (corpus.tokens, corpus.valid, corpus.test)
    assert sum(map(len, parts)) == CARD.train
    assert all(part.dtype == torch.int64 for part in parts)
    assert 0.08 < (len(corpus.valid) + len(corpus.test)) / CARD.train < 0.12
    assert len(set(corpus.characters)) == 48
    assert int(torch.cat(parts).max()) == 47
    share = (corpus.tokens == 47).double().mean()
    assert 0.0 < share < 0.002  # the alphabet covers the text
    held_out, text = corpus.decode(corpus.test[:400]), corpus.decode(corpus.tokens)
    assert held_out[:100] not in text
    assert " the " in held_out


def test_frequencies_alone():
    """Between the entropy of letters and that of a uniform alphabet."""
    corpus = english_text()
    assert 2.5 < corpus.unigram_loss < math.log(48)
    count = [corpus.tokens.tolist().count(i) + 1 for i in range(48)]
    expected = -sum(math.log(count[t] / sum(count)) for t in corpus.test[:500].tolist()) / 500
    assert corpus.unigram_loss == pytest.approx(expected, abs=0.2)


def test_a_smaller_alphabet_and_other_blocks():
    small = english_text(num_characters=10, block=1000)
    assert len(small.characters) == 10
    assert int(small.tokens.max()) == 9
    assert (small.tokens == 9).double().mean() > 0.1
    assert not torch.equal(small.valid[:1000], english_text(num_characters=10).valid[:1000])
    with pytest.raises(ValueError, match="num_characters"):
        english_text(num_characters=1)
    with pytest.raises(ValueError, match="block"):
        english_text(block=2)


def test_another_text_is_an_error(monkeypatch):
    """A new version of the package must not pass as the same text."""
    wrong = tuple(DataFile(f.name, f.size, "0" * 64) for f in CARD.files)
    card = type(CARD)(**{**CARD.__dict__, "files": wrong})
    monkeypatch.setattr("wellposed.data.text.CARD", card)
    with pytest.raises(DataError, match="damaged"):
        english_text()


def test_lexicon_writes_its_words_at_their_frequencies():
    """Fails if words run together, or if the frequencies are not Zipf's."""
    g = torch.Generator().manual_seed(0)
    language = make_lexicon(30, lengths=(2, 4), generator=g)
    text = language.write(60_000, generator=g)
    assert text.shape == (60_000,)
    words = "".join(language.characters[i] for i in text.tolist()).split(" ")[:-1]
    spelled = ["".join(language.characters[i] for i in row[: k - 1]) for row, k in
               zip(language.spelling.tolist(), language.length.tolist(), strict=True)]  # fmt: skip
    assert len(set(spelled)) == 30
    assert set(words) == set(spelled)
    share = words.count(spelled[0]) / len(words)
    assert share == pytest.approx(1 / sum(1 / r for r in range(1, 31)), rel=0.05)
    log = {w: math.log(p) for w, p in zip(spelled, language.probability.tolist(), strict=True)}
    empirical = -sum(log[w] for w in words) / sum(len(w) + 1 for w in words)
    assert language.entropy == pytest.approx(empirical, rel=0.02)


def test_lexicon_corpus_and_seeds():
    a, b, c = (make_lexicon(20, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a.spelling, b.spelling)
    assert not torch.equal(a.spelling, c.spelling)
    corpus = a.corpus(500, 70, generator=torch.Generator().manual_seed(3))
    assert [len(p) for p in (corpus.tokens, corpus.valid, corpus.test)] == [500, 70, 70]
    assert corpus.to("cpu").characters == a.characters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (0, 2)}, "lengths must be"),
        ({"lengths": (3, 2)}, "lengths must be"),
        ({"num_letters": 27}, "num_letters must be"),
        ({"num_words": 0}, "num_words must be"),
        ({"num_letters": 1, "lengths": (1, 2), "num_words": 3}, "num_words must be"),
    ],
)
def test_bad_lexicon(options, message):
    with pytest.raises(ValueError, match=message):
        make_lexicon(**({"num_words": 2, "generator": torch.Generator()} | options))
    with pytest.raises(ValueError, match="size must be"):
        make_lexicon(2, generator=torch.Generator()).write(0, generator=torch.Generator())
