"""Tests of wellposed.ops.gaussian_frechet."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.gaussian_frechet import frechet_distance, weighted_moments


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_moments_of_a_part_are_those_of_its_rows():
    """Against gathered rows; fails if rows are not centered with the weighted mean."""
    x = torch.randn(2, 30, 4, generator=gen(), dtype=torch.float64)
    weight = (torch.rand(2, 30, generator=gen(1)) < 0.4).double()
    mean, cov = weighted_moments(x, weight)
    for k in range(2):
        rows = x[k][weight[k] > 0]
        torch.testing.assert_close(mean[k], rows.mean(0))
        torch.testing.assert_close(cov[k], torch.cov(rows.T, correction=0))


def test_commuting_covariances():
    """Diagonal case in closed form, with scipy's matrix root for the general one."""
    a, b = torch.tensor([1.0, 4.0]).double(), torch.tensor([9.0, 16.0]).double()
    zero = torch.zeros(2).double()
    value = frechet_distance(zero, a.diag(), zero + 1, b.diag())
    assert value.item() == pytest.approx(2 + (1 - 3) ** 2 + (2 - 4) ** 2)


def test_against_scipy():
    """Fails if the cross term is the root of the product of traces."""
    linalg = pytest.importorskip("scipy.linalg")
    x = torch.randn(3, 20, 5, generator=gen(2), dtype=torch.float64)
    mean, cov = weighted_moments(x, torch.ones(3, 20))
    root = linalg.sqrtm((cov[0] @ cov[1]).numpy()).real.trace()
    expected = (mean[0] - mean[1]).square().sum() + cov[0].trace() + cov[1].trace() - 2 * root
    value = frechet_distance(mean[0], cov[0], mean[1], cov[1])
    assert value.item() == pytest.approx(expected.item())
    several = frechet_distance(mean, cov, mean[1], cov[1])
    assert several[0].item() == pytest.approx(expected.item())
    assert abs(several[1].item()) < 1e-10


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(-4, 4))
def test_distance_is_a_distance(d, n, power):
    """Symmetric, zero on itself, never clearly negative, at all scales and ranks."""
    x = 10.0**power * torch.randn(2, n, d, generator=gen(d + n), dtype=torch.float64)
    mean, cov = weighted_moments(x, torch.ones(2, n))
    one = frechet_distance(mean[0], cov[0], mean[1], cov[1])
    two = frechet_distance(mean[1], cov[1], mean[0], cov[0])
    scale = 100.0**power
    assert abs(one.item() - two.item()) < 1e-5 * scale
    assert one.item() > -1e-5 * scale
    assert abs(frechet_distance(mean[0], cov[0], mean[0], cov[0]).item()) < 1e-5 * scale


def test_bad_input():
    with pytest.raises(ValueError, match="weight must have the shape of x"):
        weighted_moments(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="must match"):
        frechet_distance(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="must be finite"):
        frechet_distance(torch.zeros(2), torch.eye(2) / 0, torch.zeros(2), torch.eye(2))


def _two(x, y):
    ones = torch.ones(x.shape[:1]), torch.ones(y.shape[:1])
    return frechet_distance(
        *weighted_moments(x, ones[0].to(x)), *weighted_moments(y, ones[1].to(y))
    )


CASES = {
    "weighted_moments": Case(
        inputs=lambda g: (torch.randn(5, 3, generator=g), torch.rand(5, generator=g)),
        call=weighted_moments,
    ),
    "frechet_distance": Case(
        inputs=lambda g: (torch.randn(5, 3, generator=g), torch.randn(6, 3, generator=g)),
        call=_two,
    ),
}
