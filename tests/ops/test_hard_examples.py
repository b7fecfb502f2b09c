"""How much of a total the hardest examples carry."""

import pytest
import torch

from contract import Case
from wellposed.ops.hard_examples import hard_share


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_hard_share_by_hand():
    """The two hardest of eight carry 3 + 5 of 16; fails if the easiest are taken."""
    mass = torch.tensor([1.0, 1, 3, 1, 1, 5, 2, 2])
    hardness = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.1, 0.8, 0.2, 0.3])
    assert hard_share(mass, hardness).item() == 0.5
    assert hard_share(mass, hardness, fraction=0.01).item() == 3 / 16
    even = hard_share(torch.ones(3, 8), torch.rand(3, 8, generator=gen()))
    torch.testing.assert_close(even, torch.full((3,), 0.25))
    with pytest.raises(ValueError, match="must have the same shape"):
        hard_share(mass, hardness[:3])
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), got 1"):
        hard_share(mass, hardness, fraction=1.0)


def test_no_total_has_no_share():
    """Fails if zero is divided by zero."""
    assert hard_share(torch.zeros(2, 4), torch.rand(2, 4)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="n >= 1"):
        hard_share(torch.zeros(2, 0), torch.zeros(2, 0))


CASES = {
    "hard_share": Case(
        inputs=lambda g: (torch.rand(3, 9, generator=g), torch.rand(3, 9, generator=g)),
        call=hard_share,
    ),
}
