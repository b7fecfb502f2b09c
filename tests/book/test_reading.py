"""Reading order, related papers, and reading time."""

import pytest
import yaml

import sandbox
from wellposed.book.card import Card
from wellposed.book.errors import UserError
from wellposed.book.reading import dependents, reading_minutes, reading_order, related

PLAIN = Card.model_validate(yaml.safe_load(sandbox.CARD))


def card(
    *needs: str, level: str = "introductory", year: int = 2020, title: str = "", tags: str = "t"
) -> Card:
    """A card of which only what an order can depend on matters."""
    given = {"prerequisites": [*needs], "level": level, "year": year, "title": title}
    return PLAIN.model_copy(update={**given, "tags": tags.split()})


def test_what_a_paper_builds_on_comes_first_even_if_it_is_harder() -> None:
    cards = {"easy": card("hard"), "hard": card(level="advanced"), "free": card(level="advanced")}
    assert reading_order(cards) == ["free", "hard", "easy"]


def test_then_level_then_year_then_title() -> None:
    cards = {
        "e": card(level="advanced", year=1990),
        "d": card(level="intermediate", year=1991),
        "c": card(year=2001, title="b"),
        "b": card(year=2001, title="a"),
        "a": card(year=2000, title="z"),
    }
    assert reading_order(cards) == ["a", "b", "c", "d", "e"]


def test_the_order_does_not_depend_on_the_order_of_the_files() -> None:
    cards = {name: card(*needs) for name, needs in {"a": "b", "b": "c", "c": "", "d": "b"}.items()}
    turned = dict(reversed(cards.items()))
    assert reading_order(cards) == reading_order(turned) == ["c", "b", "a", "d"]


def test_a_prerequisite_of_another_chapter_or_named_twice_blocks_nothing() -> None:
    assert reading_order({"a": card("elsewhere"), "b": card("a", "a")}) == ["a", "b"]


def test_a_circle_is_named() -> None:
    cards = {"a": card("b"), "b": card("a"), "c": card()}
    with pytest.raises(UserError, match=r"each other's prerequisites: a, b$"):
        reading_order(cards)


def test_related_papers_share_rare_tags() -> None:
    cards = {
        "me": card("before", tags="common rare"),
        "rare": card(tags="rare", title="B"),
        "both": card(tags="common rare", title="C"),
        "common": card(tags="common", title="A"),
        "none": card(tags="other"),
        "before": card(tags="common"),
        "after": card("me", tags="common"),
    }
    assert related("me", cards) == ["both", "rare", "common"]
    assert related("me", cards, count=1) == ["both"]
    assert dependents("me", cards) == ["after"]


def test_reading_time_counts_words_and_cells() -> None:
    def minutes(words: int, cells: int) -> int:
        text = {"cell_type": "markdown", "source": "word " * words}
        return reading_minutes({"cells": [text] + cells * [{"cell_type": "code", "source": "1"}]})

    assert minutes(0, 0) == 1
    assert minutes(600, 4) == 5
    assert minutes(601, 4) == 6
    assert minutes(2001, 0) == 15, "beyond ten minutes, in steps of five"
