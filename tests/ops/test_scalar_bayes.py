"""Estimators of a scalar, and what a proximal operator can see of a prior."""

import math

import pytest
import torch

from contract import Case
from wellposed.ops.scalar_bayes import bayes_estimators, visible_prior

F64 = torch.float64
GRID = torch.linspace(-10, 10, 4001, dtype=F64)


def test_gaussian_prior_shrinks_by_a_known_factor():
    """Mean, median and mode agree; fails if sigma is not squared."""
    y = torch.tensor([-2.0, 0.4, 3.0], dtype=F64)
    e = bayes_estimators(y, GRID, -GRID.square() / 2, sigma=0.5)
    for got in (e.mean, e.median, e.mode):
        torch.testing.assert_close(got, y / 1.25, atol=5e-3, rtol=0)


def test_laplace_prior_in_closed_form():
    """Mode: soft threshold. Mean: two truncated Gaussians."""

    def cdf(t):
        return 0.5 * (1 + math.erf(t / math.sqrt(2)))

    def pdf(t):
        return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    for y in (-2.5, 0.3, 1.7):
        e = bayes_estimators(torch.tensor([y], dtype=F64), GRID, -GRID.abs())
        right, left = math.exp(-y) * cdf(y - 1), math.exp(y) * cdf(-y - 1)
        up = math.exp(-y) * ((y - 1) * cdf(y - 1) + pdf(y - 1))
        down = math.exp(y) * ((y + 1) * cdf(-y - 1) - pdf(-y - 1))
        assert e.mean.item() == pytest.approx((up + down) / (right + left), abs=1e-3)
        assert e.mode.item() == pytest.approx(math.copysign(max(abs(y) - 1, 0), y), abs=5e-3)
        assert min(e.mean, e.mode) - 5e-3 <= e.median <= max(e.mean, e.mode) + 5e-3


def test_convex_sums_are_seen_whole():
    """Fails if the quadratic is not added before the hull is taken."""
    for penalty in (GRID.abs(), -0.4 * GRID.square(), GRID.square()):
        torch.testing.assert_close(visible_prior(GRID, penalty), penalty, atol=1e-9, rtol=0)


def test_two_wells_leave_a_parabola():
    """Wells of no width at -2 and 2: the hull between them is level."""
    penalty = torch.full_like(GRID, 1e4)
    penalty[[1600, 2400]] = 0.0
    seen = visible_prior(GRID, penalty)
    inside = GRID.abs() <= 2
    torch.testing.assert_close(seen[inside], 2 - GRID[inside].square() / 2, atol=1e-6, rtol=0)


def test_it_keeps_the_proximal_operator():
    g = torch.Generator().manual_seed(0)
    grid = torch.linspace(-3, 3, 301, dtype=F64)
    penalty = torch.randn(301, generator=g, dtype=F64)
    seen = visible_prior(grid, penalty)
    assert (seen <= penalty + 1e-12).all()
    for y in torch.linspace(-4, 4, 33, dtype=F64):
        costs = [(grid - y).square() / 2 + r for r in (penalty, seen)]
        assert costs[0].min().item() == pytest.approx(costs[1].min().item(), abs=1e-9)
        assert costs[1][costs[0].argmin()].item() == pytest.approx(costs[1].min().item(), abs=1e-9)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="increasing grid of at least 2"):
        visible_prior(GRID.flip(0), GRID)
    with pytest.raises(ValueError, match=r"penalty must have shape \(4001,\), got \(3,\)"):
        visible_prior(GRID, torch.zeros(3))
    with pytest.raises(ValueError, match="log_prior must have shape"):
        bayes_estimators(GRID, GRID, torch.zeros(3))
    with pytest.raises(ValueError, match="sigma be positive"):
        bayes_estimators(GRID, GRID, GRID, sigma=0.0)


CASES = {
    "bayes_estimators": Case(
        inputs=lambda g: (torch.randn(4, generator=g), torch.linspace(-5, 5, 101)),
        call=lambda y, x: bayes_estimators(y, x, -x.square()),
    ),
    "visible_prior": Case(
        inputs=lambda g: (torch.linspace(-2, 2, 11), torch.randn(11, generator=g)),
        call=visible_prior,
    ),
}
