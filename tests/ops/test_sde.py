"""The adaptive solver of stochastic differential equations."""

import math

import pytest
import torch

from contract import Case, sizes
from wellposed.ops import sde
from wellposed.ops.sde import brownian_path, sdeint_rows

F64 = torch.float64
DRIFT, NOISE = 0.5, 0.8


def _path(paths=1, entries=500, cells=256, seed=1, **options):
    g = torch.Generator().manual_seed(seed)
    return brownian_path(
        (paths, entries), generator=g, cells=cells, like=torch.ones(1, dtype=F64), **options
    )


def _exact(path, y0):
    return y0 * torch.exp(DRIFT - NOISE**2 / 2 + NOISE * path.values[-1])


@pytest.mark.parametrize("cells", [1, 8])
def test_moments_of_path_and_integral(cells):
    """Var W(1) = 1, Var of the integral = 1/3, covariance = 1/2 (to four standard errors).

    With one cell all of the integral is drawn: fails if its own part has another variance.
    """
    path = _path(entries=20_000, cells=cells)
    w, area = path.values[-1, 0], path.integral[-1, 0]
    assert float(w.var()) == pytest.approx(1, abs=0.04)
    assert float(area.var()) == pytest.approx(1 / 3, abs=0.014)
    assert float((w * area).mean()) == pytest.approx(1 / 2, abs=0.02)


def test_increments_from_the_grid():
    path = _path(paths=2, entries=3, cells=16)
    start, stop = torch.tensor([2, 5, 0, 7]), torch.tensor([4, 5, 16, 8])
    dw, area = path.between(start, stop)
    for row in range(4):
        a, b, own = int(start[row]), int(stop[row]), row % 2
        torch.testing.assert_close(dw[row], path.values[b, own] - path.values[a, own])
        gained = path.integral[b, own] - path.integral[a, own]
        torch.testing.assert_close(area[row], gained - (b - a) / 16 * path.values[a, own])
    assert dw[1].abs().max() == area[1].abs().max() == 0


def test_coefficients_are_consistent():
    """Weights of the first integrals sum to one and those of the others to zero (Roessler)."""
    assert sum(sde.ALPHA) == pytest.approx(1)
    assert [round(sum(row), 12) + 0.0 for row in sde.BETA] == [1.0, 0.0, 0.0, 0.0]
    for rows, nodes in ((sde.A0, sde.C0), (sde.A1, sde.C1)):
        assert [sum(row) for row in rows] == pytest.approx(list(nodes[1:]))


def test_strong_order_is_three_halves():
    """Geometric Brownian motion, exact on the same path; fails with order one without chi_2."""
    path, y0 = _path(entries=4000), torch.ones(1, 4000, dtype=F64)
    errors = []
    for steps in (4, 8, 16, 32):
        y, many = y0, 256 // steps
        for j in range(steps):
            a = torch.tensor([j * many])
            y, _, _ = sde._step(
                lambda t, z: DRIFT * z,
                lambda t, z: NOISE * z,
                torch.zeros(1, dtype=F64),
                torch.tensor([1 / steps], dtype=F64),
                y,
                path.between(a, a + many),
                (1.0, 1.0),
            )
        errors.append(float((y - _exact(path, y0)).square().mean().sqrt()))
    assert math.log2(errors[0] / errors[-1]) / 3 > 1.3


def test_tolerance_controls_the_error():
    path, y0 = _path(), torch.ones(1, 500, dtype=F64)
    found = [
        sdeint_rows(lambda t, y: DRIFT * y, lambda t, y: NOISE * y, y0, path, rtol=tol, atol=tol)
        for tol in (0.5, 0.1, 0.02)
    ]
    errors = [float((s.y - _exact(path, y0)).square().mean().sqrt()) for s in found]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert found[0].nfe < found[1].nfe < found[2].nfe
    one = sdeint_rows(lambda t, y: DRIFT * y, lambda t, y: NOISE * y, y0, path, rtol=1e-3, atol=0.1)
    assert one.nfe != found[1].nfe


def test_without_noise_it_solves_the_ordinary_equation():
    path, y0 = _path(entries=2), torch.ones(1, 2, dtype=F64)
    found = sdeint_rows(lambda t, y: -2 * y, lambda t, y: 0 * y, y0, path, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.y, y0 * math.exp(-2), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.step_sizes.sum(0), torch.ones(1, dtype=F64))
    accepted = found.step_sizes > 0
    torch.testing.assert_close(
        found.stiffness[accepted], torch.full((int(accepted.sum()),), 2.0, dtype=F64)
    )


def test_rows_do_not_see_each_other_and_share_paths():
    rate = torch.tensor([-1.0, -8.0], dtype=F64)[:, None]
    path, y0 = _path(entries=50), torch.ones(2, 50, dtype=F64)
    both = sdeint_rows(lambda t, y: rate * y, lambda t, y: 0.3 * y, y0, path)
    for i in range(2):
        one = sdeint_rows(lambda t, y, i=i: rate[i] * y, lambda t, y: 0.3 * y, y0[:1], path)
        torch.testing.assert_close(both.y[i : i + 1], one.y)
        assert int(both.nfe[i]) == int(one.nfe[0])
    assert both.nfe[0] < both.nfe[1]


def test_rejected_steps_do_not_enter():
    """A drift that jumps: some steps are rejected, and their error is zero in the record."""
    jump = lambda t, y: torch.where(t[:, None] > 0.5, 8.0, 0.05).expand_as(y)  # noqa: E731
    found = sdeint_rows(jump, lambda t, y: 0 * y, torch.zeros(1, 2, dtype=F64), _path(entries=2))
    assert int(found.num_rejected) > 0
    assert int((found.step_sizes > 0).sum()) == int(found.num_accepted)
    assert (found.error[found.step_sizes == 0] == 0).all()
    calls = []
    count = sdeint_rows(
        lambda t, y: calls.append(1) or -y, lambda t, y: y, torch.ones(1, 500, dtype=F64), _path()
    )
    assert int(count.nfe) == len(calls)


def test_discrete_adjoint():
    path, y0 = _path(entries=3, cells=8), torch.randn(1, 3, dtype=F64, requires_grad=True)
    w = torch.tensor(0.4, dtype=F64, requires_grad=True)

    def run(y, weight):
        s = sdeint_rows(
            lambda t, z: torch.tanh(weight * z),
            lambda t, z: weight * z,
            y,
            path,
            rtol=1e6,
            atol=1e6,
        )
        return s.y, 1e6 * s.error, s.stiffness

    assert torch.autograd.gradcheck(run, (y0, w))


def test_bad_input():
    good = {"drift": lambda t, y: y, "diffusion": lambda t, y: y, "path": _path(2, 3)}
    call = lambda y0, **more: sdeint_rows(y0=y0, **{**good, **more})  # noqa: E731
    with pytest.raises(ValueError, match="path must have shape"):
        call(torch.ones(3, 3, dtype=F64))
    with pytest.raises(ValueError, match="path must have shape"):
        call(torch.ones(2, 4, dtype=F64))
    with pytest.raises(ValueError, match="rtol and atol must be positive"):
        call(torch.ones(2, 3, dtype=F64), rtol=0.0)
    with pytest.raises(RuntimeError, match="within 1 steps"):
        call(torch.ones(2, 3, dtype=F64), max_steps=1)
    with pytest.raises(RuntimeError, match="not finite"):
        call(torch.ones(2, 3, dtype=F64), drift=lambda t, y: y * math.nan)
    g = torch.Generator()
    for bad in ({"length": 0.0}, {"cells": 0}):
        with pytest.raises(ValueError, match="length must be positive, cells at least 1"):
            brownian_path((1, 2), generator=g, **bad)
    with pytest.raises(ValueError, match="one for each of 3 paths"):
        brownian_path((3, 2), generator=[g, g])
    two = brownian_path((2, 5), generator=[torch.Generator().manual_seed(k) for k in (1, 2)])
    one = brownian_path((1, 5), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(two.values[:, 1:], one.values)
    long = brownian_path((1, 4000), generator=g.manual_seed(1), length=4.0)
    assert float(long.values[-1].var()) == pytest.approx(4, rel=0.15)


def _driven(y):
    """Geometric Brownian motion from y."""
    g = torch.Generator().manual_seed(0)
    path = brownian_path(tuple(y.shape), generator=g, cells=32, like=y)
    return sdeint_rows(lambda t, z: -z, lambda t, z: 0.1 * z, y, path)


CASES = {
    "brownian_path": Case(
        lambda g: (torch.zeros(sizes(g, 2)),),
        lambda y: brownian_path(
            tuple(y.shape), generator=torch.Generator().manual_seed(0), cells=4, like=y
        ),
    ),
    "sdeint_rows": Case(lambda g: (torch.randn(sizes(g, 2), generator=g),), _driven),
}
