"""Scaling a matrix to marginals, against explicit loops and identities."""

import math

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.sinkhorn import (
    check_marginals,
    log_sweep,
    marginal_error,
    scale_kernel,
    sinkhorn_scaling,
)

F64 = torch.float64


def _problem(n=5, m=7, spread=3.0, seed=0, dtype=F64, batch=()):
    g = torch.Generator().manual_seed(seed)
    log_kernel = -spread * torch.rand(*batch, n, m, generator=g, dtype=dtype)
    r = torch.rand(*batch, n, generator=g, dtype=dtype) + 0.1
    c = torch.rand(*batch, m, generator=g, dtype=dtype) + 0.1
    return log_kernel, r / r.sum(-1, keepdim=True), c / c.sum(-1, keepdim=True)


def _loops(log_kernel, r, c, sweeps):
    """The textbook iteration in Python floats."""
    kernel = log_kernel.exp().tolist()
    u, v = [1.0] * len(r), [1.0] * len(c)
    for _ in range(sweeps):
        for i in range(len(u)):
            u[i] = r[i].item() / sum(kernel[i][j] * v[j] for j in range(len(v)))
        for j in range(len(v)):
            v[j] = c[j].item() / sum(kernel[i][j] * u[i] for i in range(len(u)))
    return torch.tensor(
        [[u[i] * kernel[i][j] * v[j] for j in range(len(v))] for i in range(len(u))], dtype=F64
    )


@pytest.mark.parametrize("sweeps", [1, 2, 11, 25])
def test_matches_the_textbook_iteration(sweeps):
    """Fails if the order of rows and columns flips, or a sweep is lost at the edge of a chunk."""
    log_kernel, r, c = _problem()
    result = sinkhorn_scaling(log_kernel, r, c, max_iter=sweeps)
    torch.testing.assert_close(result.plan, _loops(log_kernel, r, c, sweeps), rtol=1e-12, atol=0)
    assert result.n_iter == sweeps == len(result.errors)


def test_fast_sweeps_are_the_log_sweeps():
    """A spread of 1e4 in the exponent: the plain kernel would be all zeros."""
    log_kernel, r, c = _problem(spread=1e4)
    log_u, log_v = torch.zeros_like(r), torch.zeros_like(c)
    for _ in range(200):
        log_u, log_v = log_sweep(log_kernel, r.log(), c.log(), log_u, log_v)
    result = sinkhorn_scaling(log_kernel, r, c, max_iter=200)
    torch.testing.assert_close(result.plan, scale_kernel(log_kernel, log_u, log_v))
    torch.testing.assert_close(
        result.log_u[:, None] + result.log_v, log_u[:, None] + log_v, rtol=1e-9, atol=1e-6
    )


def test_huge_factors_fall_back_to_logarithms():
    """Two blocks that exchange mass through a link of e^-2000: factors grow without bound.

    Fails (NaN or a stuck error) without the fallback or with a missing fold of the factors.
    """
    log_kernel = torch.tensor([[0.0, -2000.0], [-1900.0, 0.0]], dtype=F64)
    r, c = torch.tensor([0.6, 0.4], dtype=F64), torch.tensor([0.4, 0.6], dtype=F64)
    result = sinkhorn_scaling(log_kernel, r, c, max_iter=20000, tol=1e-10)
    assert result.converged
    p = result.plan
    # The cross ratio of a plan is that of its kernel: p11 p22 / (p12 p21) = e^3900, so p21 = 0.
    expected = torch.tensor([[0.4, 0.2], [0.0, 0.4]], dtype=F64)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-9)


def test_stops_at_the_very_sweep():
    """Fails if the stop is rounded up to a whole chunk."""
    log_kernel, r, c = _problem(spread=20.0)
    full = sinkhorn_scaling(log_kernel, r, c, max_iter=300)
    for tol in (1e-2, 1e-4, 1e-8):
        result = sinkhorn_scaling(log_kernel, r, c, max_iter=300, tol=tol)
        first = int((full.errors <= tol).nonzero()[0]) + 1
        assert result.n_iter == first
        assert result.converged
        assert result.marginal_error <= tol
        torch.testing.assert_close(result.errors, full.errors[:first], rtol=1e-6, atol=1e-15)


def test_errors_are_the_errors_of_the_plans():
    log_kernel, r, c = _problem(spread=20.0)
    trace = sinkhorn_scaling(log_kernel, r, c, max_iter=13, relaxation=1.4).errors
    for sweep in (1, 2, 12, 13):
        result = sinkhorn_scaling(log_kernel, r, c, max_iter=sweep, relaxation=1.4)
        torch.testing.assert_close(trace[sweep - 1], marginal_error(result.plan, r, c))


def test_a_batch_is_its_elements():
    log_kernel, r, c = _problem(batch=(2, 3), spread=5.0)
    result = sinkhorn_scaling(log_kernel, r, c, max_iter=17)
    for i in range(2):
        for j in range(3):
            one = sinkhorn_scaling(log_kernel[i, j], r[i, j], c[i, j], max_iter=17)
            torch.testing.assert_close(result.plan[i, j], one.plan)
            torch.testing.assert_close(result.errors[:, i, j], one.errors)
    assert sinkhorn_scaling(log_kernel, r, c, max_iter=500, tol=1e-9).marginal_error.max() <= 1e-9


def test_a_batch_stops_when_all_have_converged():
    log_kernel, r, c = _problem(batch=(2,), spread=5.0)
    log_kernel[0] = 0.0  # converges in one sweep
    alone = sinkhorn_scaling(log_kernel[1], r[1], c[1], tol=1e-9)
    assert sinkhorn_scaling(log_kernel, r, c, tol=1e-9).n_iter == alone.n_iter > 1


def test_shift_of_rows_and_columns_changes_no_plan():
    log_kernel, r, c = _problem()
    shifted = log_kernel + torch.linspace(-900, 900, 5, dtype=F64)[:, None]
    shifted = shifted + torch.linspace(-700, 300, 7, dtype=F64)
    plans = [sinkhorn_scaling(k, r, c, tol=1e-13).plan for k in (log_kernel, shifted)]
    torch.testing.assert_close(plans[0], plans[1], rtol=1e-9, atol=1e-12)


def test_constant_kernel_gives_the_independent_plan():
    _, r, c = _problem()
    result = sinkhorn_scaling(torch.full((5, 7), 3.0, dtype=F64), r, c, max_iter=1)
    torch.testing.assert_close(result.plan, r[:, None] * c)


def test_forbidden_pairs_stay_empty():
    log_kernel, r, _ = _problem(4, 4)
    log_kernel[0, 1] = -math.inf
    result = sinkhorn_scaling(log_kernel, r, r, tol=1e-10)
    assert result.plan[0, 1] == 0
    assert result.converged


def test_over_relaxation_is_faster_near_its_best_factor():
    """Linear convergence factor theta^2 of Sinkhorn, best factor 2 / (1 + sqrt(1 - theta^2)).

    Fails if the exponent is dropped: then all counts agree.
    """
    log_kernel = torch.tensor([[0.0, -5.0], [-5.0, 0.0]], dtype=F64)
    r, c = torch.tensor([0.55, 0.45], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    plain = sinkhorn_scaling(log_kernel, r, c, max_iter=2000, tol=1e-11)
    p = plain.plan
    second = torch.linalg.svdvals(p / (p.sum(1, keepdim=True) * p.sum(0)).sqrt())[1].item()
    rate = (plain.errors[60] / plain.errors[50]) ** 0.1
    assert rate == pytest.approx(second**2, abs=1e-3)
    best = 2 / (1 + math.sqrt(1 - second**2))
    fast = sinkhorn_scaling(log_kernel, r, c, max_iter=2000, tol=1e-11, relaxation=best)
    torch.testing.assert_close(fast.plan, p, rtol=0, atol=1e-9)
    assert fast.n_iter < plain.n_iter / 3


def test_warm_start_continues():
    log_kernel, r, c = _problem(spread=20.0)
    half = sinkhorn_scaling(log_kernel, r, c, max_iter=12)
    rest = sinkhorn_scaling(log_kernel, r, c, max_iter=9, log_u=half.log_u, log_v=half.log_v)
    whole = sinkhorn_scaling(log_kernel, r, c, max_iter=21)
    torch.testing.assert_close(rest.plan, whole.plan, rtol=1e-10, atol=0)
    again = sinkhorn_scaling(log_kernel, r, c, tol=1.0, log_u=half.log_u, log_v=half.log_v)
    assert again.n_iter == 0
    assert again.converged


def test_zero_sweeps_and_not_converged():
    log_kernel, r, c = _problem(spread=20.0)
    none = sinkhorn_scaling(log_kernel, r, c, max_iter=0)
    torch.testing.assert_close(none.plan, log_kernel.exp())
    assert none.errors.shape == (0,)
    assert not sinkhorn_scaling(log_kernel, r, c, max_iter=2, tol=1e-12).converged


@pytest.mark.parametrize("relaxation", [1.0, 1.3])
def test_log_sweep_gradients(relaxation):
    log_kernel, r, c = _problem(3, 4)
    inputs = [log_kernel, r.log(), c.log(), r.log(), c.log()]
    inputs = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *z: log_sweep(*z, relaxation=relaxation), inputs)


def test_scale_kernel_gradients_and_exact_zeros():
    log_kernel, r, c = _problem(3, 4)
    inputs = [t.clone().requires_grad_() for t in (log_kernel, r, c)]
    assert torch.autograd.gradcheck(scale_kernel, inputs)
    tiny = scale_kernel(torch.full((1, 1), -720.0, dtype=F64), torch.zeros(1), torch.zeros(1))
    assert tiny.item() == 0  # exp(-720) is subnormal


def test_marginal_error_by_hand():
    plan = torch.tensor([[0.2, 0.3], [0.1, 0.4]], dtype=F64)
    r, c = torch.tensor([0.4, 0.6], dtype=F64), torch.tensor([0.35, 0.65], dtype=F64)
    assert marginal_error(plan, r, c).item() == pytest.approx(0.1 + 0.1 + 0.05 + 0.05)


def test_float32():
    log_kernel, r, c = _problem(dtype=torch.float32, spread=200.0)
    result = sinkhorn_scaling(log_kernel, r, c, max_iter=5000, tol=1e-5)
    assert result.plan.dtype == torch.float32
    assert result.converged


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"r": torch.ones(4, dtype=F64)}, ValueError, r"r must have shape \(5,\), got \(4,\)"),
        ({"c": torch.ones(6, dtype=F64)}, ValueError, r"c must have shape \(7,\), got \(6,\)"),
        ({"r": torch.zeros(5, dtype=F64)}, ValueError, "r must be positive and finite"),
        ({"c": torch.full((7,), math.nan, dtype=F64)}, ValueError, "c must be positive and finite"),
        ({"r": torch.ones(5, dtype=F64)}, ValueError, "equal mass, got 5 and 1"),
        ({"r": torch.ones(5)}, TypeError, "must share a dtype"),
        ({"log_kernel": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "float32 or float64"),
        ({"log_kernel": torch.full((5, 7), math.nan, dtype=F64)}, ValueError, "not contain NaN"),
        ({"log_kernel": torch.ones(0, 7, dtype=F64)}, ValueError, "not empty"),
        ({"max_iter": -1}, ValueError, "max_iter must be at least 0, got -1"),
        ({"tol": -1.0}, ValueError, "tol must be at least 0, got -1"),
        ({"relaxation": 2.0}, ValueError, r"relaxation must lie in \(0, 2\), got 2"),
    ],
)
def test_bad_input(change, error, text):
    log_kernel, r, c = _problem()
    arguments = {"log_kernel": log_kernel, "r": r, "c": c, **change}
    with pytest.raises(error, match=text):
        sinkhorn_scaling(**arguments)


def test_masses_may_differ_by_rounding_only():
    log_kernel, r, c = _problem()
    check_marginals(log_kernel, r, c * (1 + 1e-12))
    with pytest.raises(ValueError, match="equal mass"):
        check_marginals(log_kernel, r, c * (1 + 1e-6))


def _random_problem(g):
    """Kernel and marginals of any shape."""
    n, m = sizes(g, 2)
    r, c = (torch.rand(k, generator=g, dtype=torch.float64) + 0.1 for k in (n, m))
    return torch.randn(n, m, generator=g, dtype=torch.float64), r / r.sum(), c / c.sum()


CASES = {
    "check_marginals": Case(_random_problem, check_marginals),
    "log_sweep": Case(
        _random_problem, lambda k, r, c: log_sweep(k, r.log(), c.log(), 0 * r, 0 * c)
    ),
    "marginal_error": Case(_random_problem, lambda k, r, c: marginal_error(k.exp(), r, c)),
    "scale_kernel": Case(_random_problem, scale_kernel),
    "sinkhorn_scaling": Case(
        _random_problem, lambda k, r, c: sinkhorn_scaling(k, r, c, max_iter=30)
    ),
}


def test_a_sweep_over_forbidden_pairs_alone():
    """Fails if minus infinity is subtracted from itself."""
    zero = torch.zeros(2)
    for part in log_sweep(torch.full((2, 2), -torch.inf), zero, zero, zero, zero):
        assert not part.isnan().any()
