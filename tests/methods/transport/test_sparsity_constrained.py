"""Sparsity-constrained optimal transport."""

import itertools
import math
import warnings

import numpy as np
import ot
import pytest
import scipy.optimize
import torch

from contract import Case
from wellposed.methods.transport.sparsity_constrained import (
    dual_objective,
    semi_dual_objective,
    sparse_ot,
    train_experts,
    transport_choice,
)
from wellposed.ops.dispatch import expert_choice, token_choice
from wellposed.ops.simplex import project_sparse_simplex

F64 = torch.float64


def _problem_of(g, m=6, n=4):
    cost = torch.rand(m, n, generator=g, dtype=F64)
    a, b = (torch.rand(size, generator=g, dtype=F64) + 0.2 for size in (m, n))
    return a / a.sum(), b / b.sum(), cost


def _problem(m=6, n=4, seed=0):
    return _problem_of(torch.Generator().manual_seed(seed), m, n)


def _potentials(g):
    a, b, cost = _problem_of(g)
    alpha, beta = (torch.rand(size, generator=g, dtype=F64) for size in (6, 4))
    return alpha, beta, a, b, cost


def _tokens(g):
    x = torch.randn(2, 16, 3, generator=g)
    return x, (x[..., 0] > 0).long()


def _train(x, y, seed=0, **changes):
    options = {"num_experts": 2, "width": 4, "hidden": 3, "epochs": 2, "batch_size": 8}
    options |= {"route": lambda gates: expert_choice(gates, 4), **changes}
    return train_experts(x, y, x, y, generator=torch.Generator().manual_seed(seed), **options)


CASES = {
    "semi_dual_objective": Case(
        inputs=lambda g: (lambda p: (p[0], *p[2:]))(_potentials(g)),
        call=lambda *z: semi_dual_objective(*z, k=2, gamma=0.5),
    ),
    "dual_objective": Case(inputs=_potentials, call=lambda *z: dual_objective(*z, k=2, gamma=0.5)),
    "sparse_ot": Case(
        inputs=_problem_of,
        call=lambda *z: (lambda r: (r.plan, r.value))(
            sparse_ot(*z, k=6, gamma=0.5, tol=1e-6, max_iter=50)
        ),
    ),
    "transport_choice": Case(
        inputs=lambda g: (torch.rand(2, 8, 2, generator=g),),
        call=lambda gates: transport_choice(gates, 4).tokens,
    ),
    "train_experts": Case(inputs=_tokens, call=lambda x, y: _train(x, y).train_loss),
}


# --- independent references -----------------------------------------------------------------------


def _simplex_loop(v, z):
    """Projection of a short list on the simplex of mass z by bisection on the threshold."""
    low, high = min(v) - z, max(v)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(x - middle, 0) for x in v) > z else (low, middle)
    return [max(x - low, 0.0) for x in v]


def _best_column(s, k, gamma, mass):
    """Largest <t, s> - gamma/2 |t|^2 over all supports of size k, and its t; mass None: no sum."""
    best, column = -math.inf, None
    for support in itertools.combinations(range(len(s)), k):
        v = [s[i] / gamma for i in support]
        t = [max(x, 0.0) for x in v] if mass is None else _simplex_loop(v, mass)
        value = sum(t_i * s[i] - gamma / 2 * t_i**2 for t_i, i in zip(t, support))
        if value > best:
            best, column = value, [0.0] * len(s)
            for t_i, i in zip(t, support):
                column[i] = t_i
    return best, column


def _cutting_planes(a, b, cost, k, gamma, rounds=400):
    """Maximum of the semi-dual from linear programs that cut with the enumerated columns."""
    m, n = cost.shape
    rows, limits = [], []
    point = np.zeros(m)
    best = -math.inf
    for _ in range(rounds):
        found = [
            _best_column((point - cost[:, j]).tolist(), k, gamma, float(b[j])) for j in range(n)
        ]
        value = point @ a - sum(f for f, _ in found)
        grad = a - np.array([t for _, t in found]).sum(0)
        best = max(best, value)
        rows.append(np.append(-grad, 1.0))
        limits.append(value - grad @ point)
        box = [(0, 0)] + [(-3, 3)] * (m - 1) + [(None, None)]
        program = scipy.optimize.linprog(
            np.append(np.zeros(m), -1.0), A_ub=np.array(rows), b_ub=np.array(limits), bounds=box
        )
        point, upper = program.x[:m], program.x[m]
        if upper - best < 1e-7:
            return best, upper
    return best, upper


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_objectives_from_enumeration(k):
    """Fails if the top-k follows the projection, or the conjugate lacks its 1/2."""
    alpha, beta, a, b, cost = _potentials(torch.Generator().manual_seed(1))
    semi, semi_plan = semi_dual_objective(alpha, a, b, cost, k, 0.3)
    dual, dual_plan = dual_objective(alpha, beta, a, b, cost, k, 0.3)
    expected_semi, expected_dual = (alpha @ a).item(), (alpha @ a + beta @ b).item()
    for j in range(4):
        s = (alpha - cost[:, j]).tolist()
        value, column = _best_column(s, k, 0.3, b[j].item())
        expected_semi -= value
        torch.testing.assert_close(semi_plan[:, j], torch.tensor(column, dtype=F64))
        value, column = _best_column([x + beta[j].item() for x in s], k, 0.3, None)
        expected_dual -= value
        torch.testing.assert_close(dual_plan[:, j], torch.tensor(column, dtype=F64))
    assert semi.item() == pytest.approx(expected_semi, abs=1e-12)
    assert dual.item() == pytest.approx(expected_dual, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_value_from_cutting_planes(k):
    """The maximum of a concave function, found with another method and enumerated columns.

    Fails if the line search accepts steps that lower the semi-dual.
    """
    a, b, cost = _problem(4, 3, seed=3)
    low, high = _cutting_planes(*(t.numpy() for t in (a, b, cost)), k, 1.0)
    result = sparse_ot(a, b, cost, k=k, tol=1e-11)
    assert high - low < 1e-6
    assert result.value.item() == pytest.approx(low, rel=2e-3)
    assert result.value.item() < high + 1e-9


def test_objectives_have_danskins_gradient():
    """Fails if the sign of the marginals flips."""
    alpha, beta, a, b, cost = (
        t.requires_grad_() for t in _potentials(torch.Generator().manual_seed(2))
    )
    value, plan = semi_dual_objective(alpha, a.detach(), b.detach(), cost, 2, 0.7)
    grads = torch.autograd.grad(value, (alpha, cost))
    torch.testing.assert_close(grads[0], a.detach() - plan.sum(1))
    torch.testing.assert_close(grads[1], plan)
    assert not plan.requires_grad
    marginals = a.detach(), b.detach()
    assert torch.autograd.gradcheck(
        lambda x, c: semi_dual_objective(x, *marginals, c, 2, 0.7)[0], (alpha, cost)
    )
    assert torch.autograd.gradcheck(
        lambda x, y, c: dual_objective(x, y, *marginals, c, 2, 0.7)[0], (alpha, beta, cost)
    )


# --- the solver -----------------------------------------------------------------------------------


def _pot(a, b, cost, gamma, capfd, **options):
    plan, log = ot.smooth.smooth_ot_semi_dual(
        *(t.numpy() for t in (a, b, cost)),
        gamma,
        stopThr=1e-13,
        numItermax=5000,
        log=True,
        **options,
    )
    capfd.readouterr()  # POT prints from inside its projection
    return torch.from_numpy(plan), -log["res"].fun


@pytest.mark.parametrize(("k", "rel"), [(2, 1e-3), (3, 1e-3), (5, 1e-6), (8, 1e-6)])
def test_value_of_pot(k, rel, capfd):
    """The peer's value: closely where it is smooth; on kinks both may stop a little short."""
    a, b, cost = _problem(20, 8, seed=4)
    _, value = _pot(a, b, cost, 1.0, capfd, reg_type="sparsity_constrained", max_nz=k)
    assert sparse_ot(a, b, cost, k=k, tol=1e-11).value.item() == pytest.approx(value, rel=rel)


@pytest.mark.parametrize("formulation", ["semi_dual", "dual"])
def test_full_k_is_quadratic_transport(formulation, capfd):
    """Limit k = m: plan and value of POT's quadratic regularization."""
    a, b, cost = _problem(12, 9)
    plan, value = _pot(a, b, cost, 0.8, capfd, reg_type="l2")
    result = sparse_ot(a, b, cost, k=12, gamma=0.8, formulation=formulation, tol=1e-13)
    beyond = sparse_ot(a, b, cost, k=99, gamma=0.8, formulation=formulation, tol=1e-13)
    assert result.value.item() == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(result.plan, plan, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.plan, beyond.plan, rtol=0, atol=0)
    assert result.marginal_error < 1e-4
    assert result.converged


def test_one_is_unregularized_transport():
    """Limit k = 1: the linear program plus gamma / 2 sum b^2, approached from below.

    Fails if k = 1 starts at zero.
    """
    for seed in range(5):
        a, b, cost = _problem(64, 32, seed=seed)
        program = ot.emd2(a.numpy(), b.numpy(), cost.numpy()) + 0.4 / 2 * b.square().sum().item()
        result = sparse_ot(a, b, cost, k=1, gamma=0.4, tol=1e-11, max_iter=3000)
        assert program * (1 - 4e-3) < result.value.item() < program + 1e-12
        assert result.evals[0] > 1  # those for k = 2 are counted


def test_matching_is_recovered():
    """With k = m / n a feasible plan is an assignment: then it solves the nonconvex problem."""
    cost = torch.rand(8, 4, generator=torch.Generator().manual_seed(8), dtype=F64)
    a, b = torch.full((8,), 1 / 8, dtype=F64), torch.full((4,), 1 / 4, dtype=F64)
    result = sparse_ot(a, b, cost, k=2, tol=1e-12)
    exact = ot.emd(a.numpy(), b.numpy(), cost.numpy())
    assert result.marginal_error < 1e-6
    torch.testing.assert_close(result.plan, torch.from_numpy(exact), atol=1e-6, rtol=0)
    expected = (result.plan * cost).sum() + result.plan.square().sum() / 2
    torch.testing.assert_close(result.value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_cardinality_and_columns_are_exact(k):
    """Fails if rows are limited instead of columns."""
    a, b, cost = _problem(15, 6, seed=2)
    result = sparse_ot(a, b, cost, k=k)
    assert (result.plan != 0).sum(0).max() <= k
    assert (result.plan >= 0).all()
    torch.testing.assert_close(result.plan.sum(0), b)
    torch.testing.assert_close(result.marginal_error, (result.plan.sum(1) - a).abs().sum())


def test_values_fall_with_k_and_both_duals_agree():
    a, b, cost = _problem(16, 8, seed=6)
    values = [sparse_ot(a, b, cost, k=k, tol=1e-11).value.item() for k in (1, 2, 3, 4, 8, 16)]
    for larger, smaller in itertools.pairwise(values):
        assert smaller <= larger * (1 + 1e-4)
    for k, expected in ((4, values[3]), (16, values[-1])):
        both = sparse_ot(a, b, cost, k=k, formulation="dual", tol=1e-11, max_iter=3000)
        assert both.value.item() == pytest.approx(expected, rel=1e-4)


def test_invariances():
    """Costs shifted by a row constant shift alpha; rows permute; all scales with the mass."""
    a, b, cost = _problem(9, 5)
    options = {"k": 9, "gamma": 0.5, "tol": 1e-13}
    base = sparse_ot(a, b, cost, **options)
    shift = torch.linspace(-1, 1, 9, dtype=F64)
    moved = sparse_ot(a, b, cost + shift[:, None], **options)
    torch.testing.assert_close(moved.plan, base.plan, atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.value, base.value + a @ shift, rtol=1e-8, atol=0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    mixed = sparse_ot(a[order], b, cost[order], **options)
    torch.testing.assert_close(mixed.plan, base.plan[order], atol=1e-4, rtol=0)
    heavy = sparse_ot(3 * a, 3 * b, cost, k=9, gamma=0.5 / 3, tol=1e-13)
    torch.testing.assert_close(heavy.plan, 3 * base.plan, atol=1e-4, rtol=0)


def test_problems_side_by_side_are_solved_alone():
    """Fails if one problem's end stops the others, or curvature leaks between them."""
    problems = [_problem(10, 5, seed=s) for s in range(3)]
    a, b, cost = (torch.stack(parts) for parts in zip(*problems))
    together = sparse_ot(a, b, cost, k=3, tol=1e-10)
    for i, problem in enumerate(problems):
        alone = sparse_ot(*problem, k=3, tol=1e-10)
        assert alone.value.item() == pytest.approx(together.value[i].item(), rel=1e-5)
        steps = int(alone.num_iters) + 1
        assert together.values.shape[1:] == (3,)
        torch.testing.assert_close(together.values[:5, i], alone.values[:5])
        assert alone.values.shape == alone.evals.shape == (steps,)


def test_columns_with_many_nonzeros():
    """Fails if only the first 16 entries of a column are ever looked at."""
    g = torch.Generator().manual_seed(0)
    cost, alpha = torch.rand(60, 2, generator=g, dtype=F64), torch.zeros(60, dtype=F64)
    a, b = torch.full((60,), 1 / 60, dtype=F64), torch.full((2,), 1 / 2, dtype=F64)
    plan = semi_dual_objective(alpha, a, b, cost, 60, 50.0)[1]
    expected = project_sparse_simplex(-cost / 50, 60, b, dim=0)
    assert (expected > 0).sum(0).min() > 32
    torch.testing.assert_close(plan, expected)
    dual = dual_objective(alpha + 1, torch.zeros(2, dtype=F64), a, b, cost, 60, 1.0)[1]
    torch.testing.assert_close(dual, 1 - cost)


def test_zero_marginals_are_allowed():
    a = torch.tensor([0.5, 0.5, 0.0], dtype=F64)
    b = torch.tensor([1.0, 0.0], dtype=F64)
    result = sparse_ot(a, b, torch.rand(3, 2, dtype=F64), k=3)
    torch.testing.assert_close(result.plan[:, 0], a, atol=1e-6, rtol=0)
    assert (result.plan[:, 1] == 0).all()


def test_gamma_tolerance_and_iterations_matter():
    a, b, cost = _problem(12, 6)
    weak, strong = (sparse_ot(a, b, cost, k=12, gamma=g).plan for g in (0.01, 10.0))
    assert (weak > 0).sum() < (strong > 0).sum()
    loose, tight = (sparse_ot(a, b, cost, k=4, tol=t) for t in (1e-3, 1e-11))
    assert loose.num_iters < tight.num_iters
    assert loose.value < tight.value
    with pytest.warns(RuntimeWarning, match="all max_iter=3 iterations in 1 of 1") as caught:
        short = sparse_ot(a, b, cost, k=4, max_iter=3)
    assert not short.converged
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_float32_and_no_gradient():
    a, b, cost = _problem(10, 5)
    wide = sparse_ot(a, b, cost, k=10)
    narrow = sparse_ot(a.float(), b.float(), cost.float().requires_grad_(), k=10)
    assert narrow.plan.dtype == narrow.value.dtype == torch.float32
    assert not narrow.value.requires_grad
    torch.testing.assert_close(narrow.plan.double(), wide.plan, atol=2e-3, rtol=0)
    torch.testing.assert_close(narrow.value.double(), wide.value, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an integer, got float"),
        ({"gamma": 0.0}, ValueError, "gamma must be positive and finite"),
        ({"gamma": math.nan}, ValueError, "gamma must be positive"),
        ({"a": torch.ones(5, dtype=F64)}, ValueError, r"a must have shape \(6,\), got \(5,\)"),
        ({"b": torch.ones(6, dtype=F64)}, ValueError, r"b must have shape \(4,\)"),
        ({"a": torch.ones(6, dtype=F64)}, ValueError, "equal mass"),
        ({"b": torch.tensor([2.0, -1, 0, 0]).double()}, ValueError, "b must be finite and at leas"),
        ({"cost": torch.ones(6, dtype=F64)}, ValueError, r"cost must have shape \(..., m, n\)"),
        ({"cost": torch.full((6, 4), math.nan).double()}, ValueError, "cost must be finite"),
        ({"cost": torch.ones(6, 4)}, TypeError, "must share a dtype"),
        ({"cost": torch.ones(6, 4).int()}, TypeError, "cost must be float32 or float64"),
        ({"formulation": "primal"}, ValueError, 'formulation must be "semi_dual" or "dual"'),
        ({"max_iter": -1}, ValueError, "max_iter must be at least 0"),
        ({"tol": -1.0}, ValueError, "tol must be at least 0"),
    ],
)
def test_bad_problem(change, error, text):
    a, b, cost = _problem()
    with pytest.raises(error, match=text):
        sparse_ot(**{"a": a, "b": b, "cost": cost, "k": 2, **change})


def test_bad_potentials():
    alpha, beta, a, b, cost = _potentials(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"alpha must have shape \(6,\), got \(4,\)"):
        semi_dual_objective(beta, a, b, cost, 2, 1.0)
    with pytest.raises(ValueError, match=r"beta must have shape \(4,\), got \(6,\)"):
        dual_objective(alpha, alpha, a, b, cost, 2, 1.0)


# --- mixture of experts ---------------------------------------------------------------------------


def test_transport_finds_room_where_tokens_collide():
    """All tokens prefer one expert: half must move, and those who lose least do."""
    first = torch.linspace(0.6, 0.9, 8)
    gates = torch.stack([first, 1 - first], dim=-1)[None]
    sent = transport_choice(gates, 4, max_iter=200)
    assert sorted(sent.tokens[0, 0].tolist()) == [4, 5, 6, 7]
    assert (sent.copies(8) == 1).all()
    assert token_choice(gates, 4).copies(8).sum() == 4


def test_transport_choice_depends_on_its_parameters():
    gates = torch.rand(1, 32, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    base = transport_choice(gates, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = transport_choice(gates, 8, max_iter=1)
    assert base.tokens.shape == (1, 4, 8)
    assert not torch.equal(few.tokens, base.tokens)
    assert not torch.equal(transport_choice(gates, 8, gamma=1e4).tokens, base.tokens)
    assert transport_choice(gates, 9).tokens.shape == (1, 4, 9)
    with pytest.raises(ValueError, match=r"gates must have shape \(s, m, n\)"):
        transport_choice(gates[0], 8)
    with pytest.raises(ValueError, match="k must be at least 1"):
        transport_choice(gates, 0)
    with pytest.raises(ValueError, match="gamma must be positive"):
        transport_choice(gates, 8, gamma=0.0)


def test_experts_learn():
    g = torch.Generator().manual_seed(0)
    x, y = _tokens(g)
    run = _train(
        x, y, epochs=30, lr=3e-2, batch_size=16, width=16, route=lambda p: expert_choice(p, 8)
    )
    assert (run.test_accuracy > 0.9).all()
    assert (run.train_loss[-1] < run.train_loss[0]).all()
    assert run.train_loss.shape == run.train_coverage.shape == (30, 2)
    assert (run.load == 1).all()


def test_coverage_and_load_count_tokens_and_places():
    """With as many places as tokens, token choice reaches all and fills 1 / num_experts."""
    x, y = _tokens(torch.Generator().manual_seed(1))
    run = _train(x, y, route=lambda p: token_choice(p, 8))
    torch.testing.assert_close(run.coverage, torch.ones(2))
    torch.testing.assert_close(run.load, torch.full((2,), 0.5))
    torch.testing.assert_close(run.train_coverage, torch.ones(2, 2))


def test_the_balancing_loss_spreads_tokens():
    """Fails if its sign flips."""
    x, y = _tokens(torch.Generator().manual_seed(3))
    options = {"route": lambda p: token_choice(p, 4), "epochs": 40, "lr": 3e-2}
    runs = [_train(x, y, balance=balance, **options).train_coverage[-10:] for balance in (0.0, 3.0)]
    assert runs[1].mean() > runs[0].mean() + 0.02


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 3},
        {"width": 5},
        {"hidden": 4},
        {"batch_size": 16},
        {"lr": 1e-3},
        {"balance": 1.0},
        {"seed": 1},
        {"route": lambda gates: transport_choice(gates, 1)},
    ],
)
def test_every_training_parameter_matters(change):
    x, y = _tokens(torch.Generator().manual_seed(2))
    assert not torch.equal(_train(x, y, **change).train_loss[-1], _train(x, y).train_loss[-1])


def test_bad_training_input():
    x, y = _tokens(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"x must have shape \(s, n, d\)"):
        _train(x, y[:, :3])
    with pytest.raises(ValueError, match="a batch of 99"):
        _train(x, y, batch_size=99)
    with pytest.raises(ValueError, match="balance must be at least 0"):
        _train(x, y, balance=-1.0)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        _train(x, y, epochs=0)


def test_experts_refuse_an_empty_set():
    x, y = torch.zeros(0, 16, 3), torch.zeros(0, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="x must have shape"):
        _train(x, y)
