"""The batched Lasso."""

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.lasso import lasso

F64 = torch.float64


def _problem(seed=0, n=4, p=15, batch=()):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, n, p, generator=g, dtype=F64)
    return A, torch.randn(*batch, n, generator=g, dtype=F64)


def _objective(A, b, x, alpha):
    return 0.5 * (A @ x - b).square().sum() + alpha * x.abs().sum()


def test_same_objective_as_scikit_learn():
    """scikit-learn divides the squared error by the rows; fails if alpha is passed unscaled."""
    from sklearn.linear_model import Lasso

    for seed in range(5):
        A, b = _problem(seed)
        for alpha in (0.01, 0.1, 0.5):
            peer = Lasso(alpha=alpha / len(b), fit_intercept=False, tol=1e-12, max_iter=10**6)
            theirs = torch.from_numpy(peer.fit(A.numpy(), b.numpy()).coef_)
            ours = lasso(A, b, alpha)
            assert abs(_objective(A, b, ours, alpha) - _objective(A, b, theirs, alpha)) < 2e-6


def test_same_objective_as_skglm():
    skglm = pytest.importorskip("skglm")
    A, b = _problem(6)
    peer = skglm.Lasso(alpha=0.1 / len(b), fit_intercept=False, tol=1e-10, max_iter=1000)
    theirs = torch.from_numpy(peer.fit(A.numpy(), b.numpy()).coef_)
    assert abs(_objective(A, b, lasso(A, b, 0.1), 0.1) - _objective(A, b, theirs, 0.1)) < 2e-6


def test_optimality_conditions():
    """A^T (b - A x) is alpha times the sign where x is not zero, and at most alpha elsewhere."""
    A, b = _problem(7, n=30, p=8)
    x = lasso(A, b, 3.0)
    slope = A.T @ (b - A @ x)
    used = x != 0
    torch.testing.assert_close(slope[used], 3.0 * x[used].sign(), rtol=0, atol=0.02)
    assert (slope[~used].abs() <= 3.02).all()
    assert 0 < used.sum() < 8


def test_batch_and_strengths():
    A, b = _problem(8, batch=(3,))
    alpha = torch.tensor([0.05, 0.2, 1.0], dtype=F64)
    together = lasso(A, b, alpha)
    for i in range(3):
        alone = lasso(A[i], b[i], float(alpha[i]))
        gap = _objective(A[i], b[i], together[i], alpha[i]) - _objective(
            A[i], b[i], alone, alpha[i]
        )
        assert abs(gap) < 2e-6


def test_limits():
    A, b = _problem(9)
    silent = (A.T @ b).abs().max()
    assert not lasso(A, b, float(silent) * 1.0001).any()
    assert lasso(A, b, float(silent) * 0.99).any()
    weak = lasso(A, b, 1e-5)
    assert (A @ weak - b).norm() < 1e-3
    assert not lasso(A, torch.zeros_like(b), 0.1).any()
    assert lasso(A.float(), b.float(), 0.1).dtype == torch.float32


def test_running_out_of_steps_warns(monkeypatch):
    monkeypatch.setattr("wellposed.ops.lasso.MAX_STEPS", 20)
    A, b = _problem(10)
    with pytest.warns(RuntimeWarning, match="stopped after 20 steps"):
        early = lasso(A, b, 1e-3)
    monkeypatch.undo()
    final = lasso(A, b, 1e-3)
    assert early.isfinite().all()
    assert not torch.equal(early, final)


def test_bad_input():
    A, b = _problem()
    with pytest.raises(ValueError, match="A must be"):
        lasso(A, b[:2], 0.1)
    with pytest.raises(ValueError, match="must be finite"):
        lasso(A * float("inf"), b, 0.1)
    with pytest.raises(ValueError, match="alpha must be positive"):
        lasso(A, b, -1.0)


def _regression(g):
    b, n, p = sizes(g, 3)
    return torch.randn(b, n, p, generator=g), torch.randn(b, n, generator=g)


CASES = {"lasso": Case(_regression, lambda A, b: lasso(A, b, 0.2))}


def test_large_errors_are_solved_to_their_rounding():
    """A gap of 1e-6 cannot be seen beside a squared error of 1e20; fails if it is asked for."""
    A, b = _problem(2)
    found = lasso(A, 1e10 * b, 1e10 * 0.1)
    torch.testing.assert_close(found, 1e10 * lasso(A, b, 0.1), rtol=1e-3, atol=1e6)


def test_hopeless_problems_end_early():
    """One huge entry makes steps of nothing; fails if all steps are taken."""
    A, b = _problem(3)
    A[0, 0] = 1e100
    with pytest.warns(RuntimeWarning, match="lasso stopped after 2000 steps"):
        lasso(A, b, 0.1)
    with pytest.raises(ValueError, match="not empty"):
        lasso(A[:, :0], b, 0.1)
