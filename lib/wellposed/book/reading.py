"""In which order papers are read, which belong together, and how long a page takes to read."""

import heapq
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import get_args

from wellposed.book.card import Card, Level
from wellposed.book.errors import UserError
from wellposed.book.notebook import Notebook

LEVELS: tuple[str, ...] = get_args(Level)
"""The levels, the easiest first."""

WORDS_A_MINUTE = 200
SECONDS_A_CELL = 30
"""Code, with the table or figure under it, is looked at rather than read."""


def reading_order(cards: Mapping[str, Card]) -> list[str]:
    """The order in which to read papers: what a paper builds on comes before it.

    Among the papers whose prerequisites have been read, the easier comes first, then the older,
    then the alphabet. The order follows from the cards, so that a new paper needs no entry in a
    list. Prerequisites outside the given papers play no part.

    Args:
        cards: cards by slug, as of one chapter.

    Returns:
        The slugs, each once.

    Raises:
        UserError: papers are each other's prerequisites.

    Example:
        >>> reading_order({})
        []
    """
    missing = {slug: len(set(card.prerequisites) & set(cards)) for slug, card in cards.items()}
    ready = [(_rank(cards[slug]), slug) for slug, count in missing.items() if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, done = heapq.heappop(ready)
        order.append(done)
        for slug in dependents(done, cards):
            missing[slug] -= 1
            if not missing[slug]:
                heapq.heappush(ready, (_rank(cards[slug]), slug))
    if len(order) < len(cards):
        circle = ", ".join(sorted(set(cards) - set(order)))
        raise UserError(f"papers that are each other's prerequisites: {circle}")
    return order


def _rank(card: Card) -> tuple[int, int, str]:
    return LEVELS.index(card.level), card.year, card.title


def dependents(slug: str, cards: Mapping[str, Card]) -> list[str]:
    """The papers that name a paper among their prerequisites."""
    return [other for other, card in cards.items() if slug in card.prerequisites]


def related(slug: str, cards: Mapping[str, Card], *, count: int = 4) -> list[str]:
    """The papers that share most with a paper, by their tags; a rare tag binds more than a common.

    Args:
        slug: the paper.
        cards: the cards of all papers by slug.
        count: how many at most.

    Returns:
        Slugs, the nearest first. Papers that share no tag, and those that are a prerequisite one
        way or the other, are left out.
    """
    frequency = Counter(tag for card in cards.values() for tag in set(card.tags))
    apart = {slug, *cards[slug].prerequisites, *dependents(slug, cards)}
    scores = {}
    for other, card in cards.items():
        shared = set(card.tags) & set(cards[slug].tags)
        if shared and other not in apart:
            scores[other] = sum(1 / frequency[tag] for tag in shared)
    return sorted(scores, key=lambda other: (-scores[other], cards[other].title))[:count]


def reading_minutes(notebook: Notebook) -> int:
    """How long a notebook takes to read: its prose by the word, its code by the cell.

    Args:
        notebook: as :func:`wellposed.book.notebook.read_notebook` returns it.

    Returns:
        Minutes, rounded up to the next five beyond ten; at least 1.

    Example:
        >>> reading_minutes({"cells": [{"cell_type": "markdown", "source": "word " * 700}]})
        4
    """
    words = cells = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cells += 1
        else:
            words += len(re.findall(r"\w+", cell["source"]))
    minutes = max(1, math.ceil(words / WORDS_A_MINUTE + cells * SECONDS_A_CELL / 60))
    return minutes if minutes <= 10 else 5 * math.ceil(minutes / 5)
