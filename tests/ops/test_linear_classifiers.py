"""Tests of wellposed.ops.linear_classifiers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor

from contract import Case, sizes
from wellposed.ops.linear_classifiers import LinearPath, logistic_path, signed_labels, svm_path

REGS = [3.0, 0.1, 1e-2, 1e-4]


def problem(n: int, d: int, seed: int = 0, gap: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two classes of Gaussians of different sizes, off the origin, with unequal variances."""
    g = torch.Generator().manual_seed(seed)
    y = torch.where(torch.arange(n) < n // 3, -1.0, 1.0).double()
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(0.2, 1.5, d)
    return x + gap * y[:, None] / d**0.5 + 2, y


def objective(path: LinearPath, x: Tensor, y: Tensor, k: int, reg: float, kind: str) -> float:
    """The definition, with explicit sums."""
    w, b = path.weight[k], path.bias[k]
    total = 0.0
    for xi, yi in zip(x, y):
        margin = float(yi * (xi @ w + b))
        total += max(0.0, 1 - margin) if kind == "svm" else float(np.log1p(np.exp(-margin)))
    return total / len(x) + reg * float(w @ w)


@pytest.mark.parametrize(("n", "d"), [(40, 60), (60, 5)])
def test_svm_is_that_of_scikit_learn(n: int, d: int) -> None:
    """Separable and not; fails if the box is not 1 / (2 n reg) or the bias is penalized."""
    x, y = problem(n, d)
    path = svm_path(x, y, REGS, tol=1e-7, max_iter=200)
    for k, reg in enumerate(REGS):
        peer = SVC(kernel="linear", C=1 / (2 * n * reg), tol=1e-8).fit(x.numpy(), y.numpy())
        assert np.allclose(path.weight[k], peer.coef_[0], rtol=0, atol=2e-4 * path.weight[k].norm())
        inside = np.abs(peer.dual_coef_).min() < 0.99 / (2 * n * reg)
        if inside:  # else the bias is not unique
            assert abs(float(path.bias[k]) - peer.intercept_[0]) < 1e-3 * (
                1 + abs(peer.intercept_[0])
            )


@pytest.mark.parametrize(("n", "d"), [(40, 60), (60, 5)])
def test_logistic_regression_is_that_of_scikit_learn(n: int, d: int) -> None:
    """Fails if the bias is penalized or the second derivative is wrong by a factor of two."""
    x, y = problem(n, d)
    path = logistic_path(x, y, REGS, tol=1e-12)
    for k, reg in enumerate(REGS):
        peer = LogisticRegression(C=1 / (2 * n * reg), solver="newton-cholesky", tol=1e-12)
        peer.set_params(max_iter=500).fit(x.numpy(), y.numpy())
        assert np.allclose(path.weight[k], peer.coef_[0], rtol=0, atol=1e-5 * path.weight[k].norm())
        assert abs(float(path.bias[k]) - peer.intercept_[0]) < 1e-4


@pytest.mark.parametrize(("kind", "solve"), [("svm", svm_path), ("logistic", logistic_path)])
def test_no_small_change_lowers_the_objective(kind: str, solve: object) -> None:
    """Against the definition; fails if the regularizer is halved."""
    x, y = problem(30, 4)
    path = solve(x, y, [0.05], tol=1e-9)  # type: ignore[operator]
    best = objective(path, x, y, 0, 0.05, kind)
    g = torch.Generator().manual_seed(1)
    for _ in range(50):
        move = 0.03 * torch.randn(5, generator=g, dtype=torch.float64)
        near = LinearPath(
            path.weight + move[:4], path.bias + move[4], path.coef, path.residual, path.converged, 0
        )
        assert objective(near, x, y, 0, 0.05, kind) >= best - 1e-9


def test_the_hard_margin_separates_with_margin_one() -> None:
    x, y = problem(30, 50)
    path = svm_path(x, y, [1e-3, 1e-4], tol=1e-7)
    margins = y * (x @ path.weight[1] + path.bias[1])
    assert abs(float(margins.min()) - 1) < 1e-2
    assert torch.allclose(path.weight[0], path.weight[1], atol=1e-2 * float(path.weight[1].norm()))


def test_strong_regularization_gives_the_difference_of_the_means() -> None:
    """All losses are linear then; fails without the centering of the problem."""
    x, y = problem(60, 8)
    y = torch.tensor([-1.0, 1.0]).repeat(30).double()
    weight = svm_path(x, y, [100.0]).weight[0]
    difference = x[y > 0].mean(0) - x[y < 0].mean(0)
    assert torch.allclose(weight, difference / (4 * 100.0), atol=1e-12)


def test_problems_do_not_feel_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side (as on a GPU) and one after the other; fails if padding leaks."""
    x, y = (torch.stack(t) for t in zip(*(problem(30, 6, s, 0.5 + s) for s in range(4))))
    apart = svm_path(x, y, REGS, tol=1e-8, max_iter=200)
    monkeypatch.setattr(Tensor, "split", lambda self, size: (self,))
    for solve, one in ((svm_path, apart), (logistic_path, logistic_path(x, y, REGS))):
        both = solve(x, y, REGS, tol=1e-8, max_iter=200)
        assert both.weight.shape == (4, 4, 6)
        assert torch.allclose(both.weight, one.weight, rtol=1e-2, atol=1e-3)


def test_it_says_when_it_did_not_finish() -> None:
    x, y = problem(40, 60)
    for solve in (svm_path, logistic_path):
        with pytest.warns(RuntimeWarning, match="did not reach"):
            path = solve(x, y, [1e-4], tol=1e-12, max_iter=1)
        assert not path.converged.any()


def test_tolerance_changes_the_residual() -> None:
    x, y = problem(40, 60)
    loose, tight = (svm_path(x, y, [1e-3], tol=tol).residual for tol in (1e-2, 1e-7))
    assert tight < 1e-7 < loose < 1e-2


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 6),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    reg=st.floats(1e-2, 10),
    seed=st.integers(0, 1000),
)
def test_random_problems(n: int, d: int, scale: float, reg: float, seed: int) -> None:
    """Finite in, finite and optimal out: the certificate is recomputed here."""
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(n, d, generator=g, dtype=torch.float64)
    y = torch.where(torch.arange(n) < (n + 1) // 2, -1.0, 1.0).double()
    path = svm_path(x, y, [reg], tol=1e-5, max_iter=300)
    assert path.weight.isfinite().all()
    assert path.bias.isfinite().all()
    assert path.converged.all()
    box = 1 / (2 * n * reg)
    signed = path.coef[0] * y
    assert ((signed >= 0) & (signed <= box * (1 + 1e-12))).all()


@pytest.mark.parametrize("solve", [svm_path, logistic_path])
def test_bad_input(solve: object) -> None:
    x, y = problem(10, 3)
    for args, text in (
        ((x, y[:-1], [1.0]), "x must be"),
        ((x, 2 * y, [1.0]), "labels -1 and 1"),
        ((x, y.abs(), [1.0]), "both classes"),
        ((x, y, []), "regs"),
        ((x, y, [0.0]), "regs"),
        ((x * torch.nan, y, [1.0]), "finite"),
    ):
        with pytest.raises(ValueError, match=text):
            solve(*args)  # type: ignore[operator]
    with pytest.raises(ValueError, match="tol"):
        solve(x, y, [1.0], tol=0.0)  # type: ignore[operator]
    with pytest.raises(TypeError, match="floating"):
        solve(x.long(), y, [1.0])  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.*did not reach tol")
@pytest.mark.parametrize("path", [svm_path, logistic_path])
def test_a_huge_problem_has_an_answer(path) -> None:  # type: ignore[no-untyped-def]
    """The system of rank two, plus one, is indefinite after rounding."""
    x, y = problem(12, 2)
    assert path(1e40 * x, y, [0.1]).weight.isfinite().all()


def _classes(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two problems; the labels take turns."""
    n, d = sizes(g, 2, least=2)
    y = torch.ones(2, n, dtype=torch.int64)
    y[:, ::2] = -1
    return torch.randn(2, n, d, generator=g), y


CASES = {
    "signed_labels": Case(_classes, signed_labels),
    "svm_path": Case(_classes, lambda x, y: svm_path(x, y, [0.5, 0.1], tol=1e-3)),
    "logistic_path": Case(_classes, lambda x, y: logistic_path(x, y, [0.5, 0.1], tol=1e-3)),
}
