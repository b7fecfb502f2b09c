"""Units for powers, and the warning of a run that diverged."""

import warnings

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.numerics import unit_of, warn_of_nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordinary_numbers_keep_every_bit(dtype):
    """Fails if the unit is the largest entry always."""
    for size in (1e-3, 1.0, 1e3):
        x = size * torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(x / unit_of(x, power=4), x)
    assert unit_of(torch.zeros(3, dtype=dtype), power=2).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [2, 4])
def test_powers_of_scaled_numbers_stay_in_range(dtype, power):
    """Fails if the bound ignores the power."""
    limit = torch.finfo(dtype)
    for size in (limit.max**0.9, limit.tiny**0.9):
        x = torch.full((7,), size, dtype=dtype)
        total = (x / unit_of(x, power=power)).pow(power).sum()
        assert total.item() == pytest.approx(7.0)


def test_each_problem_has_its_own_unit():
    x = torch.tensor([[1e15, 1.0], [1.0, 2.0]])
    assert unit_of(x, power=2, dim=(-1,)).tolist() == [[torch.tensor(1e15).item()], [1.0]]


def test_nan_is_announced_and_nothing_else():
    """One warning for a NaN in any value, none for infinities and integers."""
    with pytest.warns(RuntimeWarning, match="fit diverged: its result holds NaN") as said:
        warn_of_nan("fit", torch.ones(2), torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert len(said) == 1
    with warnings.catch_warnings(record=True) as silent:
        warnings.simplefilter("always")
        warn_of_nan("fit", torch.tensor([torch.inf]), torch.arange(3))
    assert silent == []


CASES = {
    "unit_of": Case(
        lambda g: (torch.randn(*sizes(g, 2), generator=g),), lambda x: unit_of(x, power=4)
    ),
    "warn_of_nan": Case(lambda g: (torch.randn(3, generator=g),), lambda x: warn_of_nan("it", x)),
}
