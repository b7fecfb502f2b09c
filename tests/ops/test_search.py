"""The best of some trials of a search."""

import itertools

import pytest
import torch

from contract import Case
from wellposed.ops.search import best_of_drawn


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def test_best_of_drawn_against_all_subsets():
    """Fails if the trial with the least value is taken instead of the least validation loss."""
    valid, test = rand(6, 2), rand(6, 2, seed=1)
    for k in (1, 3, 6, 9):
        subsets = list(itertools.combinations(range(6), min(k, 6)))
        for s in range(2):
            picks = [float(test[min(c, key=lambda i: float(valid[i, s])), s]) for c in subsets]
            mean = sum(picks) / len(picks)
            assert best_of_drawn(valid, test, k)[s].item() == pytest.approx(mean)
    with pytest.raises(ValueError, match="k must be at least 1"):
        best_of_drawn(valid, test, 0)
    with pytest.raises(ValueError, match="shape of valid_loss"):
        best_of_drawn(valid, test[:3], 1)


CASES = {
    "best_of_drawn": Case(
        inputs=lambda g: (torch.randn(5, 2, generator=g), torch.randn(5, 2, generator=g), 3),
        call=best_of_drawn,
    ),
}
