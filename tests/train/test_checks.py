"""Tests of wellposed.train.checks."""

import pytest

from contract import Case, sizes
from wellposed.train.checks import check_epochs


@pytest.mark.parametrize(
    ("given", "text"), [((0, 2), "num_epochs must be at least 1, got 0"), ((1, 1), "got 1")]
)
def test_a_training_that_does_nothing_is_refused(given: tuple[int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_epochs(*given)


def _checked(num_epochs: int, batch_size: int) -> int:
    check_epochs(num_epochs, batch_size + 1)
    return num_epochs


CASES = {"check_epochs": Case(lambda g: tuple(sizes(g, 2)), _checked)}
