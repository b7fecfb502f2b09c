"""L1-A-MTRL: relevance, allocation and the two phases."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from contract import Case
from wellposed.data.linear_tasks import copied_tasks, random_tasks, source_samplers, target_sample
from wellposed.methods.transfer.active_multitask import (
    Exploration,
    allocate_samples,
    collect_from,
    design_error,
    excess_risk,
    exploit,
    explore,
    fit_representation,
    l1_a_mtrl,
    lasso_relevance,
    relevance,
    transfer_error,
)

F64 = torch.float64


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


def _heads(g, k=3, num=8, batch=()):
    W = torch.randn(*batch, k, num, generator=g, dtype=F64)
    return W, torch.randn(*batch, k, generator=g, dtype=F64)


def _sampler(W, noise=0.3):
    """Tasks with basis = the first k unit vectors of R^5; the draw depends on (task, n) only."""

    def sample(task, n):
        g = _gen(1000 * task + n)
        x, e = torch.randn(n, 5, generator=g, dtype=F64), torch.randn(n, generator=g, dtype=F64)
        x, e = x.to(W), e.to(W)
        return x, x[:, : W.shape[0]] @ W[:, task] + noise * e

    return sample


def _target(g, W, w, n=40, noise=0.3):
    x = torch.randn(n, 5, generator=g, dtype=F64)
    return W, x, x[:, :2] @ w + noise * torch.randn(n, generator=g, dtype=F64)


def _problem(g):
    W, w = _heads(g, k=2, num=4)
    return _target(g, W, w)


CASES = {
    "relevance": Case(inputs=lambda g: _heads(g, batch=(2,)), call=relevance),
    "lasso_relevance": Case(inputs=_heads, call=lambda W, w: lasso_relevance(W, w, 0.2)),
    "allocate_samples": Case(
        inputs=lambda g: (torch.randn(3, 6, generator=g, dtype=F64),),
        call=lambda nu: allocate_samples(nu, 100, 1.5, 2),
    ),
    "transfer_error": Case(
        inputs=lambda g: (torch.randn(6, generator=g, dtype=F64), torch.arange(6) + 1),
        call=transfer_error,
    ),
    "design_error": Case(
        inputs=lambda g: (*_heads(g), torch.arange(8) + 1),
        call=design_error,
    ),
    "fit_representation": Case(
        inputs=lambda g: tuple(torch.randn(9, 6, generator=g, dtype=F64) for _ in range(3)),
        call=lambda *z: fit_representation([v[:, :5] for v in z], [v[:, 5] for v in z], 2).heads,
    ),
    "excess_risk": Case(
        inputs=lambda g: tuple(torch.randn(s, generator=g) for s in ((5, 2), 2, (5, 3), 3)),
        call=excess_risk,
    ),
    "collect_from": Case(
        inputs=lambda g: (_heads(g, k=2, num=4)[0],),
        call=lambda W: collect_from([_sampler(W)])(torch.tensor([[3, 0, 2, 1]])),
    ),
    "explore": Case(
        inputs=_problem,
        call=lambda W, x, y: explore(
            collect_from([_sampler(W)]), x[None], y[None], num_tasks=4, rank=2, per_task=9
        ),
    ),
    "exploit": Case(
        inputs=_problem,
        call=lambda W, x, y: exploit(
            collect_from([_sampler(W)]), x[None], y[None], W[:1].abs(), budget=80, rank=2
        ),
    ),
    "l1_a_mtrl": Case(
        inputs=_problem,
        call=lambda W, x, y: l1_a_mtrl(_sampler(W), x, y, num_tasks=4, rank=2, budget=200),
    ),
}


# --- relevance -----------------------------------------------------------------------------------


def test_relevance_solves_both_problems():
    """Against a linear program in other variables and the normal equations; batch by batch."""
    W, w = _heads(_gen(1), k=4, num=12, batch=(5,))
    one, two = relevance(W, w), relevance(W, w, 2)
    for i in range(5):
        A, b = W[i].numpy(), w[i].numpy()
        cost = np.r_[np.zeros(12), np.ones(12)]  # |nu| as upper bounds
        upper = np.block([[np.eye(12), -np.eye(12)], [-np.eye(12), -np.eye(12)]])
        found = linprog(
            cost, upper, np.zeros(24), np.c_[A, np.zeros_like(A)], b, (None, None), "highs-ds"
        )
        assert one[i].abs().sum().item() == pytest.approx(found.fun, rel=1e-7)
        np.testing.assert_allclose(two[i], A.T @ np.linalg.solve(A @ A.T, b), rtol=1e-9)
    torch.testing.assert_close((W @ one[..., None])[..., 0], w, rtol=1e-12, atol=1e-12)
    assert ((one != 0).sum(1) <= 4).all()
    assert (one.abs().sum(1) <= two.abs().sum(1)).all()
    assert (two.norm(dim=1) <= one.norm(dim=1)).all()


def test_relevance_does_not_see_a_rotation_of_the_basis():
    W, w = _heads(_gen(2))
    Q = torch.linalg.qr(torch.randn(3, 3, generator=_gen(3), dtype=F64)).Q
    for p in (1, 2):
        torch.testing.assert_close(relevance(Q @ W, Q @ w, p), relevance(W, w, p))
    torch.testing.assert_close(
        lasso_relevance(Q @ W, Q @ w, 0.1), lasso_relevance(W, w, 0.1), rtol=0, atol=5e-3
    )


def test_optimum_of_transfer_error_is_the_squared_l1_norm():
    """Falsified by any allocation below it; the L2 rule's bound is M times a squared L2 norm."""
    W, w = _heads(_gen(4), batch=(50,))
    one, two = relevance(W, w), relevance(W, w, 2)
    least = one.abs().sum(1).square()
    share = one.abs() / one.abs().sum(1, keepdim=True)
    torch.testing.assert_close(transfer_error(one, share), least)
    torch.testing.assert_close(design_error(W, w, share), least)
    torch.testing.assert_close(
        transfer_error(two, two.square() / two.square().sum(1, keepdim=True)),
        8 * two.square().sum(1),
    )
    tries = torch.rand(200, 50, 8, generator=_gen(5), dtype=F64) ** 5
    tries = tries / tries.sum(-1, keepdim=True)
    assert (design_error(W, w, tries) >= least * (1 - 1e-9)).all()


def test_design_error_is_the_least_transfer_error():
    """Closed form with the inverse, and no feasible weights do better."""
    W, w = _heads(_gen(6))
    counts = torch.arange(1, 9)
    closed = w @ torch.linalg.solve(W @ torch.diag(counts.to(F64)) @ W.T, w)
    torch.testing.assert_close(design_error(W, w, counts), closed)
    null = torch.linalg.svd(W).Vh[3:]
    moved = relevance(W, w, 2) + torch.randn(100, 5, generator=_gen(7), dtype=F64) @ null
    assert (transfer_error(moved, counts.to(F64)) >= closed).all()
    assert design_error(W, w, torch.tensor([5, 5, 0, 0, 0, 0, 0, 0])) == math.inf
    assert transfer_error(torch.tensor([1.0, 0.0]), torch.tensor([0, 3])) == math.inf


def test_copied_tasks_price():
    """The L2 rule pays M/4 * M/(M-1); fails if its exponent is 1 instead of 2."""
    for num in (4, 16, 64):
        tasks = copied_tasks(1, dim=5, num_tasks=num, noise=1.0, generator=_gen())
        one, two = (relevance(tasks.heads, tasks.target_head, p) for p in (1, 2))
        price = [
            design_error(tasks.heads, tasks.target_head, allocate_samples(nu, 10**9, q)).item()
            for nu, q in ((one, 1.0), (two, 2.0))
        ]
        assert price[1] / price[0] == pytest.approx(num / 4 * num / (num - 1), rel=1e-3)


# --- allocation ----------------------------------------------------------------------------------


def test_allocation_by_hand():
    nu = torch.tensor([[0.5, -0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert allocate_samples(nu, 10).tolist() == [[5, 3, 2, 0], [10, 0, 0, 0]]
    assert allocate_samples(nu, 12, 2.0).tolist() == [[8, 2, 2, 0], [12, 0, 0, 0]]
    assert allocate_samples(nu, 12, 1.0, 1).tolist() == [[5, 3, 3, 1], [9, 1, 1, 1]]
    assert allocate_samples(nu, 9, 0.0)[0].tolist() == [3, 3, 3, 0]
    assert allocate_samples(nu, 4, 1.0, 1).tolist() == [[1, 1, 1, 1]] * 2


def test_allocation_sums_exactly_and_stays_within_one():
    nu = torch.randn(200, 7, generator=_gen(8), dtype=F64)
    for budget in (7, 100, 1001):
        counts = allocate_samples(nu, budget, 1.3, 1)
        assert (counts.sum(1) == budget).all()
        weight = nu.abs() ** 1.3
        exact = 1 + weight / weight.sum(1, keepdim=True) * (budget - 7)
        assert ((counts - exact).abs() < 1 + 1e-6).all()


# --- the algorithm -------------------------------------------------------------------------------


def test_learning_beats_uniform_as_the_theory_says():
    """First order: the sources add noise^2 (d - k) E(n)."""
    g = _gen(11)
    tasks = random_tasks(30, dim=12, rank=2, num_tasks=8, noise=0.5, generator=g)
    x, y = target_sample(tasks, 200, g)
    nu = relevance(tasks.heads, tasks.target_head)
    means = []
    for weights in (nu, torch.ones_like(nu)):
        collect = collect_from(source_samplers(tasks, g))
        run = exploit(collect, x, y, weights, budget=4000, rank=2)
        rest = tasks.target_head.unsqueeze(-1)
        missed = tasks.basis @ rest - run.basis @ (run.basis.mT @ tasks.basis @ rest)
        theory = 0.25 * 10 * design_error(tasks.heads, tasks.target_head, run.counts)
        assert missed.square().sum((1, 2)).mean() / theory.mean() == pytest.approx(1.0, abs=0.25)
        means.append(missed.square().sum((1, 2)).mean())
    assert means[0] < 0.8 * means[1]


@pytest.mark.parametrize("rule", ["l1", "l2", "uniform"])
def test_single_problem_against_its_parts(rule):
    """`l1_a_mtrl` written out with the public steps; fails if the rules swap their exponents."""
    W, w = _heads(_gen(12), k=2, num=4)
    _, x, y = _target(_gen(13), W, w)
    found = l1_a_mtrl(_sampler(W), x, y, num_tasks=4, rank=2, budget=402, rule=rule, alpha=0.1)
    assert found.counts.sum() == 402
    if rule == "uniform":
        assert sorted(found.counts.tolist()) == [100, 100, 101, 101]
        return
    collect = collect_from([_sampler(W)])
    phase = explore(collect, x[None], y[None], num_tasks=4, rank=2, per_task=25)
    pair = phase.heads[0], phase.target_head[0]
    nu = lasso_relevance(*pair, 0.1) if rule == "l1" else relevance(*pair, 2)
    torch.testing.assert_close(found.nu, nu)
    assert torch.equal(found.counts, allocate_samples(nu, 402, {"l1": 1, "l2": 2}[rule], 25))
    both = [
        [torch.cat([_sampler(W)(m, n)[i] for n in (25, c - 25) if n]) for m, c in enumerate(nums)]
        for nums in [found.counts.tolist()]
        for i in (0, 1)
    ]
    fit = fit_representation(both[0], both[1], 2)
    projected = fit.basis @ fit.basis.T
    torch.testing.assert_close(found.basis @ found.basis.T, projected, rtol=0, atol=2e-3)
    alone = torch.linalg.lstsq(x @ found.basis, y[:, None]).solution[:, 0]
    torch.testing.assert_close(found.head, alone, rtol=1e-6, atol=1e-8)


def test_hyper_parameters_matter():
    W, w = _heads(_gen(14), k=2, num=4)
    _, x, y = _target(_gen(15), W, w)
    call = {"num_tasks": 4, "rank": 2, "budget": 400}
    base = l1_a_mtrl(_sampler(W), x, y, **call)
    others = [{"exploration": 0.6}, {"alpha": 0.6}, {"budget": 500}]
    for change in others:
        other = l1_a_mtrl(_sampler(W), x, y, **{**call, **change})
        assert not torch.equal(base.counts, other.counts), change
    same = l1_a_mtrl(_sampler(W), x, y, **call, generator=_gen(16))
    assert not torch.equal(same.basis, base.basis)  # another start ...
    gap = same.basis @ same.head - base.basis @ base.head
    assert gap.norm() < 1e-2  # ... the same place
    wide = l1_a_mtrl(_sampler(W), x, y, num_tasks=4, rank=3, budget=400)
    assert wide.basis.shape == (5, 3)


def test_exploration_samples_are_used_again():
    """Fails if phase 2 forgets phase 1 or samples its share twice."""
    asked = []

    def sample(task, n):
        asked.append((task, n))
        return torch.ones(n, 1, dtype=F64), torch.full((n,), float(task + 1), dtype=F64)

    collect = collect_from([sample])
    x, y = torch.ones(1, 2, 1, dtype=F64), torch.full((1, 2), 3.0, dtype=F64)
    phase = explore(collect, x, y, num_tasks=2, rank=1, per_task=3)
    assert isinstance(phase, Exploration)
    run = exploit(collect, x, y, torch.tensor([[0.0, 1.0]]), budget=10, rank=1, explored=phase)
    assert run.counts.tolist() == [[3, 7]]
    assert asked == [(0, 3), (1, 3), (1, 4)]


def test_bad_input_is_named():
    W, w = _heads(_gen(17), k=2, num=4)
    flat = torch.cat([W[:1], 0 * W[:1]])
    with pytest.raises(ValueError, match="target_head must be a combination"):
        relevance(flat, torch.tensor([0.0, 1.0], dtype=F64))
    with pytest.raises(ValueError, match="p must be 1 or 2"):
        relevance(W, w, 3)
    with pytest.raises(ValueError, match="source_heads must be"):
        relevance(W, w[:1])
    with pytest.raises(ValueError, match="finite"):
        relevance(W, w * math.nan)
    with pytest.raises(ValueError, match="alpha must be positive"):
        lasso_relevance(W, w, 0.0)
    with pytest.raises(ValueError, match=r"budget must be at least minimum \* M = 8"):
        allocate_samples(W[0], 7, 1.0, 2)
    with pytest.raises(ValueError, match="nu must be finite and have a weight"):
        allocate_samples(torch.zeros(3), 7)
    with pytest.raises(ValueError, match="minimum and exponent"):
        allocate_samples(W[0], 7, -1.0)
    with pytest.raises(ValueError, match="counts must not be negative"):
        transfer_error(W[0], torch.tensor([1, 1, 1, -1]))
    with pytest.raises(ValueError, match="counts must end in 4 tasks"):
        design_error(W, w, torch.ones(3))
    with pytest.raises(ValueError, match="at least one sampler"):
        collect_from([])
    with pytest.raises(ValueError, match=r"counts must have shape \(1, M\)"):
        collect_from([_sampler(W)])(torch.ones(4, dtype=torch.int64))
    _, x, y = _target(_gen(18), W, w)
    options = {"num_tasks": 4, "rank": 2, "budget": 100}
    with pytest.raises(ValueError, match="rule must be one of l1, l2, uniform"):
        l1_a_mtrl(_sampler(W), x, y, **options, rule="l3")
    with pytest.raises(ValueError, match="exploration must lie"):
        l1_a_mtrl(_sampler(W), x, y, **options, exploration=1.0)
    with pytest.raises(ValueError, match="target_inputs must be"):
        l1_a_mtrl(_sampler(W), x, y[:3], **options)
    with pytest.raises(ValueError, match="per_task must be at least 1"):
        l1_a_mtrl(_sampler(W), x, y, num_tasks=4, rank=2, budget=8)
    with pytest.raises(ValueError, match="rank must lie"):
        l1_a_mtrl(_sampler(W), x, y, num_tasks=4, rank=6, budget=100)


def test_relevance_at_any_scale():
    """Of degree one in the target; scipy's solver takes small numbers for zeros."""
    W, w = _heads(_gen())
    nu = relevance(W, w)
    for size in (1e-10, 1e10):
        torch.testing.assert_close(relevance(size * W, size * w), nu)
        torch.testing.assert_close(relevance(size * W, w) * size, nu)


def test_empty_heads_are_refused():
    with pytest.raises(ValueError, match="not empty"):
        relevance(torch.zeros(0, 3, 4), torch.zeros(0, 3))
