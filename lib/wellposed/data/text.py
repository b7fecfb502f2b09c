"""Text for small language models: English from docstrings, and a made-up language.

The English is the prose in the docstrings of scikit-learn, a dependency that is pinned, so it is at
hand offline; its card says so with checksums. A docstring repeats what others say, so a line counts
only the first time. The made-up language has as much text as one wants and a known entropy: words
of random letters, drawn independently with Zipf's frequencies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wellposed.data.sets.english_docstrings import CARD
from wellposed.data.store import folder_of, verified

__all__ = ["Corpus", "Lexicon", "english_text", "make_lexicon"]

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_NO_PROSE = (">>>", "..", ":")


@dataclass(frozen=True)
class Corpus:
    """A text as numbers, in three parts that do not overlap.

    Attributes:
        tokens: training text, int64, shape (n,), entries in [0, len(characters)).
        valid: text to choose hyper-parameters by, int64, shape (n_valid,).
        test: text to report on, int64, shape (n_test,).
        characters: what each number stands for; the last one stands for all rare characters.
    """

    tokens: Tensor
    valid: Tensor
    test: Tensor
    characters: tuple[str, ...]

    @property
    def unigram_loss(self) -> float:
        """Loss on the test text of who knows only how frequent characters are, in nats."""
        count = torch.bincount(self.tokens, minlength=len(self.characters)).double() + 1.0
        return float(-(count / count.sum()).log()[self.test].mean())

    def decode(self, tokens: Tensor) -> str:
        """The text that numbers of shape (n,) stand for."""
        return "".join(self.characters[i] for i in tokens.tolist())

    def to(self, device: torch.device | str) -> Corpus:
        """The same corpus with its tensors on ``device``."""
        parts = (self.tokens.to(device), self.valid.to(device), self.test.to(device))
        return replace(self, tokens=parts[0], valid=parts[1], test=parts[2])


def _prose(source: str) -> list[str]:
    """Lines of the docstrings that are sentences rather than code, tables or headings."""
    lines = (line.strip() for doc in _DOCSTRING.findall(source) for line in doc.splitlines())
    return [
        line
        for line in lines
        if line.count(" ") >= 4
        and not line.startswith(_NO_PROSE)
        and sum(c.isalpha() or c == " " for c in line) > 0.88 * len(line)
    ]


def english_text(*, num_characters: int = 48, block: int = 4000) -> Corpus:
    """English technical prose, character by character.

    Every tenth block of the text is held out; half of each is for validation, half for the test.

    Args:
        num_characters: size of the alphabet, at least 2: the commonest characters and one more
            that stands for all others.
        block: characters in a block, at least 20.

    Returns:
        A :class:`Corpus` on the CPU.

    Raises:
        DataError: scikit-learn is missing or another version.
        ValueError: an argument out of range.

    Source: docstrings of scikit-learn, see its card.

    Example:
        >>> corpus = english_text()
        >>> len(corpus.characters), corpus.characters[0], corpus.characters[1]
        (48, ' ', 'e')
    """
    if num_characters < 2:
        raise ValueError(f"num_characters must be at least 2, got {num_characters}")
    if block < 20:
        raise ValueError(f"block must be at least 20, got {block}")
    content = verified(CARD, folder_of(CARD))
    lines = (line for data in content.values() for line in _prose(data.decode()))
    text = re.sub(r"\s+", " ", " ".join(dict.fromkeys(lines)).lower())
    # UTF-32 turns the text into numbers at once.
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32).long()
    count = torch.bincount(codes)
    common = count.argsort(descending=True, stable=True)[: num_characters - 1]
    number = torch.full((len(count),), num_characters - 1)
    number[common] = torch.arange(num_characters - 1)
    characters = (*(chr(c) for c in common.tolist()), UNKNOWN)
    return _split(number[codes], characters, block)


def _split(tokens: Tensor, characters: tuple[str, ...], block: int) -> Corpus:
    """Hold out every tenth block, half of it for validation and half for the test."""
    place = torch.arange(len(tokens))
    held_out = (place // block) % 10 == 9
    first_half = place % block < block // 2
    return Corpus(
        tokens[~held_out], tokens[held_out & first_half], tokens[held_out & ~first_half], characters
    )


@dataclass(frozen=True)
class Lexicon:
    """A made-up language: words drawn independently, with a space behind each.

    Attributes:
        spelling: letters of each word, then a space (0), int64, shape (num_words, longest + 1);
            what lies behind the space means nothing.
        length: characters of each word with its space, int64, shape (num_words,).
        probability: of each word, float64, shape (num_words,), sums to 1.
        characters: the space and the letters.
    """

    spelling: Tensor
    length: Tensor
    probability: Tensor
    characters: tuple[str, ...]

    @property
    def entropy(self) -> float:
        """Entropy rate in nats a character: that of a word over the mean length of a word."""
        per_word = torch.special.entr(self.probability).sum()
        return float(per_word / (self.probability * self.length).sum())

    def write(self, size: int, *, generator: torch.Generator) -> Tensor:
        """A text of ``size`` characters, int64, shape (size,), from independent words.

        Raises:
            ValueError: ``size`` below 1.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        device = generator.device
        spelling, length = self.spelling.to(device), self.length.to(device)
        edges = self.probability.to(device).cumsum(0)
        pieces: list[Tensor] = []
        missing = size
        while missing > 0:
            few = min(missing // 2 + 1, 1_000_000)
            draw = torch.rand(few, generator=generator, dtype=torch.float64, device=device)
            words = torch.searchsorted(edges, draw * edges[-1]).clamp_(max=len(edges) - 1)
            within = torch.arange(spelling.shape[1], device=device) < length[words, None]
            pieces.append(spelling[words][within])
            missing -= len(pieces[-1])
        return torch.cat(pieces)[:size]

    def corpus(self, size: int, held_out: int, *, generator: torch.Generator) -> Corpus:
        """A :class:`Corpus` with ``size`` characters to train on and twice ``held_out`` to test."""
        train, valid, test = (
            self.write(n, generator=generator) for n in (size, held_out, held_out)
        )
        return Corpus(train, valid, test, self.characters)


def make_lexicon(
    num_words: int,
    *,
    generator: torch.Generator,
    lengths: tuple[int, int] = (2, 8),
    num_letters: int = 26,
    exponent: float = 1.0,
) -> Lexicon:
    r"""Words of random letters whose r-th has a probability proportional to :math:`r^{-s}`.

    Args:
        num_words: how many different words, at least 1.
        generator: CPU generator of the spelling.
        lengths: shortest and longest word in letters.
        num_letters: size of the alphabet without the space, in [1, 26].
        exponent: :math:`s`; 1 is Zipf's law.

    Returns:
        A :class:`Lexicon`.

    Raises:
        ValueError: an argument out of range, or fewer spellings than words.

    Source: ours; Zipf's law for the frequencies.

    Example:
        >>> fair = make_lexicon(2, lengths=(1, 1), exponent=0.0, generator=torch.Generator())
        >>> round(fair.entropy / 0.6931471805599453, 6)  # one bit a word, two characters a word
        0.5
    """
    shortest, longest = lengths
    if not 1 <= shortest <= longest:
        raise ValueError(f"lengths must be 1 <= shortest <= longest, got {lengths}")
    if not 1 <= num_letters <= 26:
        raise ValueError(f"num_letters must be in [1, 26], got {num_letters}")
    spellings = sum(num_letters**k for k in range(shortest, longest + 1))
    if not 1 <= num_words <= spellings // 2 + 1:
        raise ValueError(
            f"num_words must be at least 1 and at most about half of the {spellings} spellings, "
            f"got {num_words}"
        )
    found: dict[tuple[int, ...], None] = {}
    while len(found) < num_words:
        size = torch.randint(shortest, longest + 1, (num_words,), generator=generator).tolist()
        letters = torch.randint(1, num_letters + 1, (num_words, longest), generator=generator)
        # Two equal spellings would be one word: a dictionary keeps each once, in order.
        found |= {tuple(row[:k]): None for k, row in zip(size, letters.tolist(), strict=True)}
    words = list(found)[:num_words]
    padded = [[*word, *[0] * (longest + 1 - len(word))] for word in words]
    rank = torch.arange(1, num_words + 1, dtype=torch.float64)
    weight = rank**-exponent
    characters = (" ", *"abcdefghijklmnopqrstuvwxyz"[:num_letters])
    length = torch.tensor([len(word) + 1 for word in words])
    return Lexicon(torch.tensor(padded), length, weight / weight.sum(), characters)
