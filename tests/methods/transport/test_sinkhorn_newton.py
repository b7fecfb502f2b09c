"""Sinkhorn-Newton-Sparse."""

import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch

from contract import Case
from wellposed.methods.transport.sinkhorn_newton import (
    image_transport,
    lyapunov_potential,
    mass_outside,
    random_assignment,
    sinkhorn,
    sinkhorn_newton_sparse,
    sparse_newton_direction,
    transport_plan,
)

F64 = torch.float64


def _problem(n=6, m=8, seed=0):
    return _problem_of(torch.Generator().manual_seed(seed), n, m)


def _problem_of(g, n=6, m=8):
    cost = torch.rand(n, m, generator=g, dtype=F64)
    r, c = (torch.rand(k, generator=g, dtype=F64) + 0.2 for k in (n, m))
    return cost, r / r.sum(), c / c.sum()


def _potentials_and_problem(g):
    cost, r, c = _problem_of(g)
    x, y = (torch.rand(k, generator=g, dtype=F64) / 4 for k in (6, 8))
    return x, y, cost, r, c


def _images(g):
    return torch.rand(4, 5, generator=g), torch.rand(4, 5, generator=g)


CASES = {
    "random_assignment": Case(
        inputs=lambda g: (torch.zeros(1),),
        call=lambda like: random_assignment(
            5, generator=torch.Generator().manual_seed(3), dtype=like.dtype
        ),
    ),
    "image_transport": Case(inputs=_images, call=lambda *z: image_transport(*z, power=2)),
    "transport_plan": Case(
        inputs=_potentials_and_problem,
        call=lambda x, y, cost, r, c: transport_plan(x, y, cost, 5.0),
    ),
    "lyapunov_potential": Case(
        inputs=_potentials_and_problem, call=lambda *z: lyapunov_potential(*z, 5.0)
    ),
    "mass_outside": Case(
        inputs=lambda g: (torch.rand(5, 6, generator=g),),
        call=lambda plan: mass_outside(plan, sparsity=0.3),
    ),
    "sinkhorn": Case(inputs=_problem_of, call=lambda *z: sinkhorn(*z, 10.0, num_iters=30).plan),
    "sparse_newton_direction": Case(
        inputs=_potentials_and_problem,
        call=lambda *z: sparse_newton_direction(*z, 5.0, sparsity=0.5),
    ),
    "sinkhorn_newton_sparse": Case(
        inputs=_problem_of,
        call=lambda *z: sinkhorn_newton_sparse(*z, 20.0, sparsity=0.6, tol=1e-5).plan,
    ),
}


# --- the potential --------------------------------------------------------------------------------


def test_plan_and_potential_from_loops():
    """Fails if the e^-1 or the factor 1/eta is lost."""
    cost, r, c = _problem()
    x, y, eta = r / 3, c / 2, 4.0
    plan = torch.zeros_like(cost)
    for i in range(6):
        for j in range(8):
            plan[i, j] = math.exp(eta * (x[i] + y[j] - cost[i, j]) - 1)
    torch.testing.assert_close(transport_plan(x, y, cost, eta), plan)
    value = -plan.sum() / eta + sum(r * x) + sum(c * y)
    torch.testing.assert_close(lyapunov_potential(x, y, cost, r, c, eta), value)


def test_gradient_and_hessian_are_those_of_the_paper():
    cost, r, c = _problem()
    x, y, eta = r / 3, c / 2, 4.0
    assert torch.autograd.gradcheck(
        lambda *z: lyapunov_potential(*z, eta),
        [t.clone().requires_grad_() for t in (x, y, cost, r, c)],
    )
    plan = transport_plan(x, y, cost, eta)
    gradient = torch.func.grad(lyapunov_potential, (0, 1))(x, y, cost, r, c, eta)
    torch.testing.assert_close(gradient[0], r - plan.sum(1))
    torch.testing.assert_close(gradient[1], c - plan.sum(0))

    def packed(z):
        return lyapunov_potential(z[:6], z[6:], cost, r, c, eta)

    hessian = torch.func.hessian(packed)(torch.cat([x, y]))
    torch.testing.assert_close(-hessian, _negative_hessian(plan, eta, 48))


def test_strong_duality():
    """At the optimum the potential is the primal value, entropy included."""
    cost, r, c = _problem()
    eta = 30.0
    result = sinkhorn_newton_sparse(cost, r, c, eta, sparsity=0.5)
    primal = (cost * result.plan).sum() + torch.special.xlogy(result.plan, result.plan).sum() / eta
    dual = lyapunov_potential(result.x, result.y, cost, r, c, eta)
    torch.testing.assert_close(dual, primal, rtol=1e-11, atol=0)


# --- the direction --------------------------------------------------------------------------------


def _negative_hessian(plan, eta, keep):
    """Diagonals of the full plan; the `keep` largest entries off them, picked one by one."""
    n, m = plan.shape
    largest = sorted(((plan[i, j].item(), i, j) for i in range(n) for j in range(m)), reverse=True)
    block = torch.zeros_like(plan)
    for value, i, j in largest[:keep]:
        block[i, j] = value
    top = torch.cat([plan.sum(1).diag(), block], 1)
    return eta * torch.cat([top, torch.cat([block.T, plan.sum(0).diag()], 1)])


@pytest.mark.parametrize(("sparsity", "keep"), [(0.1, 5), (0.25, 12), (0.26, 13), (47 / 48, 47)])
def test_direction_solves_the_sparsified_system(sparsity, keep):
    """Fails if the diagonals are rebuilt from the sparse plan or the ceiling becomes a floor."""
    cost, r, c = _problem()
    x, y, eta = r / 3, c / 2, 12.0
    plan = transport_plan(x, y, cost, eta)
    gradient = torch.cat([r - plan.sum(1), c - plan.sum(0)])
    expected = torch.linalg.solve(_negative_hessian(plan, eta, keep), gradient)
    found = torch.cat(sparse_newton_direction(x, y, cost, r, c, eta, sparsity=sparsity))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_dense_direction_is_the_least_norm_solution():
    cost, r, c = _problem()
    x, y, eta = r / 3, c / 2, 12.0
    plan = transport_plan(x, y, cost, eta)
    gradient = torch.cat([r - plan.sum(1), c - plan.sum(0)])
    expected = torch.linalg.pinv(_negative_hessian(plan, eta, 48)) @ gradient
    found = torch.cat(sparse_newton_direction(x, y, cost, r, c, eta, sparsity=1.0))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sparsity", [4 / 120, 1.0])
def test_direction_to_the_promised_residual(sparsity):
    cost, r, c = random_assignment(120, generator=torch.Generator().manual_seed(5))
    eta = 300.0
    warm = sinkhorn(cost, r, c, eta, num_iters=20)
    plan = transport_plan(warm.x, warm.y, cost, eta)
    matrix = _negative_hessian(plan, eta, math.ceil(sparsity * 120 * 120 - 1e-6))
    gradient = torch.cat([r - plan.sum(1), c - plan.sum(0)])
    found = sparse_newton_direction(warm.x, warm.y, cost, r, c, eta, sparsity=sparsity)
    assert (matrix @ torch.cat(found) - gradient).norm() <= 2e-10 * gradient.norm()


def test_direction_is_an_ascent_direction():
    cost, r, c = _problem()
    x, y, eta = r / 3, c / 2, 12.0
    plan = transport_plan(x, y, cost, eta)
    for sparsity in (0.05, 0.3, 1.0):
        dx, dy = sparse_newton_direction(x, y, cost, r, c, eta, sparsity=sparsity)
        assert (r - plan.sum(1)) @ dx + (c - plan.sum(0)) @ dy > 0


# --- Sinkhorn -------------------------------------------------------------------------------------


def test_sinkhorn_iteration_by_hand():
    """x first, then y, from zero; fails if the order flips."""
    cost, r, c = _problem()
    eta, x, y = 7.0, torch.zeros(6, dtype=F64), torch.zeros(8, dtype=F64)
    for _ in range(3):
        x = x + (r.log() - transport_plan(x, y, cost, eta).sum(1).log()) / eta
        y = y + (c.log() - transport_plan(x, y, cost, eta).sum(0).log()) / eta
    result = sinkhorn(cost, r, c, eta, num_iters=3)
    torch.testing.assert_close(result.x, x)
    torch.testing.assert_close(result.y, y)
    torch.testing.assert_close(result.plan, transport_plan(x, y, cost, eta))
    assert (result.num_sinkhorn, result.num_newton, result.num_cg) == (3, 0, 0)


def test_each_half_step_maximizes_the_potential():
    cost, r, c = _problem()
    eta = 7.0
    before, after = (sinkhorn(cost, r, c, eta, num_iters=k) for k in (3, 4))
    middle = lyapunov_potential(after.x, before.y, cost, r, c, eta)
    start = lyapunov_potential(before.x, before.y, cost, r, c, eta)
    end = lyapunov_potential(after.x, after.y, cost, r, c, eta)
    assert start < middle < end
    assert transport_plan(after.x, before.y, cost, eta).sum(1).allclose(r)


def test_sinkhorn_stops_and_resumes():
    cost, r, c = _problem()
    whole = sinkhorn(cost, r, c, 60.0, num_iters=500, tol=1e-8)
    first = sinkhorn(cost, r, c, 60.0, num_iters=5)
    rest = sinkhorn(cost, r, c, 60.0, num_iters=500, tol=1e-8, x=first.x, y=first.y)
    assert whole.converged
    assert whole.marginal_error <= 1e-8 < whole.errors[-2]
    assert whole.num_sinkhorn == 5 + rest.num_sinkhorn > 20
    relaxed = sinkhorn(cost, r, c, 60.0, num_iters=500, tol=1e-8, relaxation=1.5)
    assert relaxed.num_sinkhorn < whole.num_sinkhorn
    torch.testing.assert_close(relaxed.plan, whole.plan, rtol=0, atol=1e-6)


# --- the whole method -----------------------------------------------------------------------------


def test_same_plan_as_sinkhorn_in_far_fewer_iterations():
    cost, r, c = random_assignment(60, generator=torch.Generator().manual_seed(1))
    fast = sinkhorn_newton_sparse(cost, r, c, 150.0, sparsity=4 / 60)
    slow = sinkhorn(cost, r, c, 150.0, num_iters=100_000, tol=1e-12)
    assert fast.converged
    assert slow.converged
    assert (fast.plan - slow.plan).abs().sum() < 1e-9
    assert fast.num_sinkhorn + fast.num_newton < slow.num_sinkhorn / 10
    assert len(fast.errors) == fast.num_sinkhorn + fast.num_newton
    torch.testing.assert_close(fast.plan, transport_plan(fast.x, fast.y, cost, 150.0))


def test_little_entropy_gives_the_optimal_assignment():
    """At n = 12 and eta = 1e4 the plan is the permutation that the Hungarian method finds."""
    cost, r, c = random_assignment(12, generator=torch.Generator().manual_seed(4))
    rows, columns = scipy.optimize.linear_sum_assignment(cost.numpy())
    best = np.zeros((12, 12))
    best[rows, columns] = 1 / 12
    result = sinkhorn_newton_sparse(cost, r, c, 1e4, sparsity=4 / 12, newton_iters=200, tol=1e-10)
    np.testing.assert_allclose(result.plan.numpy(), best, atol=1e-4)


def test_strong_entropy_gives_the_independent_plan():
    cost, r, c = _problem()
    result = sinkhorn_newton_sparse(cost, r, c, 1e-6)
    torch.testing.assert_close(result.plan, r[:, None] * c, rtol=1e-5, atol=0)


def test_shifting_rows_and_columns_of_the_cost_changes_no_plan():
    cost, r, c = _problem()
    shifted = cost + r[:, None] * 3 - 5 * c
    plans = [sinkhorn_newton_sparse(k, r, c, 40.0, sparsity=0.5).plan for k in (cost, shifted)]
    torch.testing.assert_close(plans[0], plans[1], rtol=1e-9, atol=1e-12)


def test_transposing_the_problem_transposes_the_plan():
    cost, r, c = _problem()
    one = sinkhorn_newton_sparse(cost, r, c, 40.0, sparsity=0.5)
    two = sinkhorn_newton_sparse(cost.T, c, r, 40.0, sparsity=0.5)
    torch.testing.assert_close(one.plan, two.plan.T, rtol=1e-9, atol=1e-12)


def test_last_newton_steps_are_superlinear_when_nothing_is_dropped():
    """Fails if conjugate gradients keep one loose tolerance: then the order drops to 1."""
    cost, r, c = random_assignment(60, generator=torch.Generator().manual_seed(1))
    result = sinkhorn_newton_sparse(cost, r, c, 100.0, sinkhorn_iters=3, sparsity=1.0, tol=1e-11)
    e = result.errors[result.num_sinkhorn :]
    e = e[e > 1e-12].log()
    assert len(e) >= 3
    assert (e[-1] - e[-2]) / (e[-2] - e[-3]) > 1.3


def test_more_entries_mean_fewer_steps():
    cost, r, c = random_assignment(80, generator=torch.Generator().manual_seed(2))
    steps = [
        sinkhorn_newton_sparse(
            cost, r, c, 200.0, sparsity=k / 80, newton_iters=500, tol=1e-9
        ).num_newton
        for k in (1, 2, 4, 80)
    ]
    assert steps[0] > steps[1] > steps[2] >= steps[3] > 0


def test_default_sparsity_is_two_entries_a_row():
    cost, r, c = _problem(10, 14)
    default = sinkhorn_newton_sparse(cost, r, c, 60.0, newton_iters=500)
    explicit = sinkhorn_newton_sparse(cost, r, c, 60.0, newton_iters=500, sparsity=2 / 14)
    other = sinkhorn_newton_sparse(cost, r, c, 60.0, newton_iters=500, sparsity=6 / 14)
    torch.testing.assert_close(default.errors, explicit.errors, rtol=0, atol=0)
    assert other.num_newton < default.num_newton


def test_warm_up_length_and_tolerance_matter():
    cost, r, c = _problem()
    short = sinkhorn_newton_sparse(cost, r, c, 60.0, sinkhorn_iters=1, sparsity=0.5)
    long = sinkhorn_newton_sparse(cost, r, c, 60.0, sinkhorn_iters=15, sparsity=0.5)
    loose = sinkhorn_newton_sparse(cost, r, c, 60.0, sparsity=0.5, tol=1e-2)
    assert (short.num_sinkhorn, long.num_sinkhorn) == (1, 15)
    assert short.num_newton > long.num_newton
    assert 1e-12 < loose.marginal_error <= 1e-2
    torch.testing.assert_close(short.plan, long.plan, rtol=1e-8, atol=1e-12)
    none = sinkhorn_newton_sparse(cost, r, c, 4.0, sinkhorn_iters=0, sparsity=0.5)
    assert none.num_sinkhorn == 0
    assert none.converged


def test_nearly_separate_blocks_converge():
    """Pixels far apart at eta = 1200: the Hessian is singular in double precision.

    Fails if the line search starts at the full step, which is 1e18 times too long.
    """
    g = torch.Generator().manual_seed(7)
    source, target = (torch.rand(6, 6, generator=g, dtype=F64).round() for _ in range(2))
    cost, r, c = image_transport(source, target, power=1)
    result = sinkhorn_newton_sparse(cost, r, c, 1200.0, sparsity=0.5, newton_iters=300, tol=1e-10)
    assert result.converged
    assert result.plan.isfinite().all()


@pytest.mark.parametrize(("seed", "eta"), [(4, 1e5), (0, 14 / 0.0003530317411894468)])
def test_separate_blocks_converge(seed, eta):
    """Rows exchange mass through links of e^-250. Fails without the damping."""
    problem = random_assignment(5, generator=torch.Generator().manual_seed(seed))
    result = sinkhorn_newton_sparse(*problem, eta, sparsity=0.8, newton_iters=200, tol=1e-9)
    assert result.converged


def test_running_out_of_steps_warns_once_and_says_so():
    cost, r, c = _problem()
    with pytest.warns(RuntimeWarning, match="after 1 Newton steps") as caught:
        result = sinkhorn_newton_sparse(cost, r, c, 100.0, sparsity=0.5, newton_iters=1)
    assert len(caught) == 1
    assert not result.converged
    assert result.num_newton == 1


def test_unreachable_tolerance_ends():
    """Rounding stops the search; it neither loops forever nor loses accuracy."""
    cost, r, c = _problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = sinkhorn_newton_sparse(cost, r, c, 60.0, sparsity=0.5, newton_iters=500, tol=0.0)
    assert result.num_newton < 100
    assert result.marginal_error < 1e-13


def test_tiny_problems():
    one = torch.ones(1, dtype=F64)
    result = sinkhorn_newton_sparse(one[:, None], one, one, 3.0)
    assert result.plan.item() == pytest.approx(1.0, abs=1e-12)
    cost, r, c = _problem(1, 4)
    torch.testing.assert_close(sinkhorn_newton_sparse(cost, r, c, 3.0).plan[0], c)


def test_float32():
    cost, r, c = (t.float() for t in _problem())
    result = sinkhorn_newton_sparse(cost, r, c, 40.0, sparsity=0.5, tol=1e-5)
    wide = sinkhorn_newton_sparse(*_problem(), 40.0, sparsity=0.5)
    assert result.plan.dtype == result.x.dtype == torch.float32
    torch.testing.assert_close(result.plan.double(), wide.plan, rtol=1e-3, atol=1e-5)


def test_no_gradient_is_recorded():
    cost, r, c = _problem()
    cost.requires_grad_()
    assert not sinkhorn_newton_sparse(cost, r, c, 40.0, sparsity=0.5).plan.requires_grad


@pytest.mark.parametrize("solver", [sinkhorn, sinkhorn_newton_sparse])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cost": torch.ones(6, 7, dtype=F64)}, ValueError, r"c must have shape \(7,\)"),
        ({"cost": torch.ones(1, 6, 8, dtype=F64)}, ValueError, r"cost must have shape \(n, m\)"),
        ({"cost": torch.full((6, 8), math.inf, dtype=F64)}, ValueError, "cost must be finite"),
        ({"r": torch.zeros(6, dtype=F64)}, ValueError, "r must be positive"),
        ({"r": torch.ones(6, dtype=F64)}, ValueError, "equal mass"),
        ({"eta": 0.0}, ValueError, "eta must be positive and finite, got 0"),
        ({"eta": math.nan}, ValueError, "eta must be positive"),
        ({"tol": -1.0}, ValueError, "tol must be at least 0"),
        ({"cost": torch.ones(6, 8)}, TypeError, "share a dtype"),
    ],
)
def test_bad_problem(solver, change, error, text):
    cost, r, c = _problem()
    iterations = {"num_iters": 3} if solver is sinkhorn else {}
    arguments = {"cost": cost, "r": r, "c": c, "eta": 5.0, **iterations, **change}
    with pytest.raises(error, match=text):
        solver(**arguments)


@pytest.mark.parametrize("sparsity", [0.0, -0.1, 1.1, math.nan])
def test_bad_sparsity(sparsity):
    cost, r, c = _problem()
    with pytest.raises(ValueError, match=r"sparsity must lie in \(0, 1\]"):
        sinkhorn_newton_sparse(cost, r, c, 5.0, sparsity=sparsity)
    with pytest.raises(ValueError, match=r"sparsity must lie in \(0, 1\]"):
        sparse_newton_direction(r, c, cost, r, c, 5.0, sparsity=sparsity)
    with pytest.raises(ValueError, match=r"sparsity must lie in \(0, 1\]"):
        mass_outside(cost, sparsity=sparsity)


def test_other_bad_input():
    cost, r, c = _problem()
    with pytest.raises(ValueError, match="newton_iters must be at least 0"):
        sinkhorn_newton_sparse(cost, r, c, 5.0, newton_iters=-1)
    with pytest.raises(ValueError, match="tol must be at least 1e-06 in float32"):
        sinkhorn_newton_sparse(cost.float(), r.float(), c.float(), 5.0)
    with pytest.raises(ValueError, match=r"x must have shape \(6,\), got \(8,\)"):
        transport_plan(c, c, cost, 5.0)
    with pytest.raises(ValueError, match=r"y must have shape \(8,\), got \(6,\)"):
        lyapunov_potential(r, r, cost, r, c, 5.0)


# --- plans ----------------------------------------------------------------------------------------


def test_mass_outside_from_a_sort():
    plan = transport_plan(*(t / 3 for t in _problem()[1:]), _problem()[0], 9.0)
    entries = sorted(plan.flatten().tolist())
    for sparsity, keep in ((0.1, 5), (0.5, 24), (1.0, 48)):
        expected = sum(entries[: 48 - keep]) / sum(entries)
        assert mass_outside(plan, sparsity=sparsity).item() == pytest.approx(expected, abs=1e-15)


def test_plans_without_mass_are_refused():
    """Fails if a share of nothing, or a direction from it, is NaN."""
    with pytest.raises(ValueError, match="positive mass"):
        mass_outside(torch.zeros(2, 2), sparsity=0.5)
    cost, r, c = _problem()
    x, y = torch.full_like(r, -1e6), torch.zeros_like(c)
    with pytest.raises(ValueError, match="finite mass in each row"):
        sparse_newton_direction(x, y, cost, r, c, 5.0, sparsity=0.5)
    with pytest.raises(ValueError, match="r and c must fit"):
        lyapunov_potential(0 * r, 0 * c, cost, r[:2], c, 5.0)
