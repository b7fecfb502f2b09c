"""Tests of wellposed.nets.seeded."""

import pytest
import torch

from contract import Case, sizes
from wellposed.nets import MLP
from wellposed.nets.seeded import seeded_mlps


def test_each_network_starts_as_it_would_alone() -> None:
    """Fails if one seed runs on into the next network."""
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    nets = seeded_mlps(x, (4, 1), [7, 3])
    for i, seed in enumerate((7, 3)):
        torch.manual_seed(seed)
        torch.testing.assert_close(nets(x)[i], MLP((3, 4, 1)).double()(x[i]))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    seeded_mlps(torch.zeros(1, 2, 2), (1,), [0])
    assert torch.equal(torch.rand(3), expected)


def test_seeds_and_slices_must_match() -> None:
    for x, seeds in ((torch.zeros(2, 3), [0, 1]), (torch.zeros(2, 3, 1), [0])):
        with pytest.raises(ValueError, match="one of seeds for each m"):
            seeded_mlps(x, (1,), seeds)


def _slices(g: torch.Generator) -> tuple[torch.Tensor]:
    return (torch.randn(*sizes(g, 3), generator=g),)


CASES = {"seeded_mlps": Case(_slices, lambda x: seeded_mlps(x, (4, 2), range(len(x)))(x))}
