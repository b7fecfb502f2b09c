"""Low-rank regression of many tasks from sums."""

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.multitask import TaskStatistics, fit_head, fit_statistics, task_statistics

F64 = torch.float64


def _data(seed=0, counts=(9, 20, 4, 0, 15, 30), d=6, k=2, noise=0.3):
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, k, generator=g, dtype=F64)).Q
    heads = torch.randn(k, len(counts), generator=g, dtype=F64)
    inputs = [torch.randn(n, d, generator=g, dtype=F64) for n in counts]
    targets = [
        x @ basis @ heads[:, m] + noise * torch.randn(len(x), generator=g, dtype=F64)
        for m, x in enumerate(inputs)
    ]
    return inputs, targets, basis @ heads


def _error(inputs, targets, fit):
    predicted = fit.basis @ fit.heads
    return sum(
        (x @ predicted[:, m] - y).square().sum() for m, (x, y) in enumerate(zip(inputs, targets))
    )


def test_stationary_point_of_the_sum_of_squares():
    """The gradient in basis and heads, by autograd on the samples; fails for a mean over tasks."""
    inputs, targets, _ = _data()
    fit = fit_statistics(task_statistics(inputs, targets), 2, steps=1000, tol=1e-10)
    assert fit.converged
    basis, heads = (t.clone().requires_grad_() for t in (fit.basis, fit.heads))
    loss = sum(
        (x @ basis @ heads[:, m] - y).square().sum()
        for m, (x, y) in enumerate(zip(inputs, targets))
    )
    loss.backward()
    assert basis.grad.norm() < 1e-5
    assert heads.grad.norm() < 1e-5
    assert not fit.heads[:, 3].any()  # the empty task
    torch.testing.assert_close(fit.basis.T @ fit.basis, torch.eye(2, dtype=F64))


def test_one_sweep_by_loops():
    """Heads, then basis, from a given start: normal equations of Kronecker products."""
    inputs, targets, _ = _data(1, counts=(12, 15, 11))
    start = torch.linalg.qr(
        torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    ).Q
    heads = [
        torch.linalg.lstsq(x @ start, y[:, None]).solution[:, 0] for x, y in zip(inputs, targets)
    ]
    system = torch.cat([torch.kron(w, x.contiguous()) for x, w in zip(inputs, heads)])
    solved = torch.linalg.lstsq(system, torch.cat(targets)[:, None]).solution.reshape(2, 6).T
    expected = torch.linalg.qr(solved).Q
    fit = fit_statistics(task_statistics(inputs, targets), 2, steps=1, start=start)
    torch.testing.assert_close(fit.basis @ fit.basis.T, expected @ expected.T, rtol=0, atol=1e-6)
    assert fit.n_iter == 1


def test_full_rank_is_every_task_alone():
    inputs, targets, _ = _data(3, counts=(12, 15, 20, 9, 11, 30))
    fit = fit_statistics(task_statistics(inputs, targets), 6)
    for m, (x, y) in enumerate(zip(inputs, targets)):
        alone = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        torch.testing.assert_close((fit.basis @ fit.heads)[:, m], alone, rtol=1e-5, atol=1e-6)


def test_batch_is_problem_by_problem():
    """Problems that converge leave the batch without disturbing the others."""
    problems = [
        task_statistics(*_data(seed, noise=noise)[:2]) for seed, noise in ((4, 0), (5, 2), (6, 0.1))
    ]
    stacked = TaskStatistics(
        *(torch.stack([getattr(p, n) for p in problems]) for n in ("gram", "moment", "counts"))
    )
    together = fit_statistics(stacked, 2, steps=100)
    for i, problem in enumerate(problems):
        alone = fit_statistics(problem, 2, steps=100)
        torch.testing.assert_close(
            (together.basis @ together.heads)[i], alone.basis @ alone.heads, rtol=1e-8, atol=1e-10
        )
        assert together.converged[i] == alone.converged


def test_sums_of_two_samples_are_the_sums_of_both():
    inputs, targets, _ = _data(7)
    whole = task_statistics(inputs, targets)
    first = task_statistics([x[:3] for x in inputs], [y[:3] for y in targets])
    rest = task_statistics([x[3:] for x in inputs], [y[3:] for y in targets])
    both = first + rest
    torch.testing.assert_close(both.gram, whole.gram)
    torch.testing.assert_close(both.moment, whole.moment)
    assert torch.equal(both.counts, whole.counts)


def test_sharing_a_basis_helps_and_knobs_matter():
    inputs, targets, truth = _data(8, counts=(8,) * 40, noise=0.5)
    sums = task_statistics(inputs, targets)
    error = lambda fit: float((fit.basis @ fit.heads - truth).square().sum())  # noqa: E731
    assert error(fit_statistics(sums, 2)) < 0.5 * error(fit_statistics(sums, 6))
    assert not fit_statistics(sums, 2, steps=2).converged
    assert fit_statistics(sums, 2, tol=1e-2).n_iter < fit_statistics(sums, 2, tol=1e-9).n_iter
    assert error(fit_statistics(sums, 2, ridge=0.5)) != error(fit_statistics(sums, 2))
    small = fit_statistics(TaskStatistics(sums.gram.float(), sums.moment.float(), sums.counts), 2)
    assert small.basis.dtype == torch.float32
    assert error(small) == pytest.approx(error(fit_statistics(sums, 2)), rel=1e-2)


def test_fewer_tasks_than_columns():
    """The unused columns stay where they were; nothing is singular."""
    inputs, targets, _ = _data(9, counts=(20,), noise=0.1)
    fit = fit_statistics(task_statistics(inputs, targets), 3)
    alone = torch.linalg.lstsq(inputs[0], targets[0][:, None]).solution[:, 0]
    torch.testing.assert_close((fit.basis @ fit.heads)[:, 0], alone, rtol=1e-4, atol=1e-5)


def test_single_samples_in_float32():
    """Fails if the ridge ignores that a task's sums are larger than their projection."""
    g = torch.Generator().manual_seed(12)
    x = torch.randn(200, 24, 1, 30, generator=g)
    y = torch.randn(200, 24, 1, 1, generator=g)
    counts = torch.ones(200, 24, dtype=torch.int64)
    sums = TaskStatistics(x.mT @ x, (x.mT @ y).squeeze(-1), counts)
    fit = fit_statistics(sums, 4, steps=20)
    assert fit.basis.isfinite().all()
    assert fit.heads.isfinite().all()


def test_head_is_least_squares():
    inputs, targets, _ = _data(10)
    basis = torch.linalg.qr(
        torch.randn(6, 2, generator=torch.Generator().manual_seed(11), dtype=F64)
    ).Q
    expected = torch.linalg.lstsq(inputs[5] @ basis, targets[5][:, None]).solution[:, 0]
    torch.testing.assert_close(
        fit_head(inputs[5], targets[5], basis), expected, rtol=1e-6, atol=1e-8
    )
    assert fit_head(inputs[5], targets[5], basis, ridge=1.0).norm() < expected.norm()


def test_bad_input():
    inputs, targets, _ = _data()
    sums = task_statistics(inputs, targets)
    for options in ({"rank": 0}, {"rank": 7}, {"rank": 2, "steps": 0}, {"rank": 2, "ridge": -1.0}):
        with pytest.raises(ValueError, match=r"rank must lie in 1\.\.6"):
            fit_statistics(sums, **options)
    with pytest.raises(ValueError, match="inputs must be"):
        task_statistics(inputs, [y[:1] for y in targets])
    with pytest.raises(ValueError, match="same tasks"):
        task_statistics(inputs, targets[:2])
    with pytest.raises(ValueError, match="must fit"):
        fit_head(inputs[0], targets[0], torch.ones(4, 2, dtype=F64))


def _tasks(g):
    """Inputs and targets of any number of tasks."""
    m, n, d = sizes(g, 3, least=2)
    return torch.randn(m, n, d, generator=g), torch.randn(m, n, generator=g)


def _statistics(x, y):
    return task_statistics(list(x), list(y))


CASES = {
    "fit_head": Case(_tasks, lambda x, y: fit_head(x, y, torch.eye(x.shape[-1])[:, :2].to(x))),
    "fit_statistics": Case(_tasks, lambda x, y: fit_statistics(_statistics(x, y), 1, steps=20)),
    "task_statistics": Case(_tasks, _statistics),
}


def test_the_start_at_any_scale():
    """Fails if products of huge numbers overflow before the eigenvalue solver sees them."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 9, 4, generator=g), torch.randn(3, 9, generator=g)
    fits = [fit_statistics(task_statistics(list(x), list(s * y)), 2) for s in (1.0, 1e15)]
    flat = [fit.basis @ fit.basis.mT for fit in fits]
    torch.testing.assert_close(flat[1], flat[0], rtol=1e-3, atol=1e-3)
