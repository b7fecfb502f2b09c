"""L-BFGS for problems side by side."""

import pytest
import scipy.optimize
import torch

from contract import Case, sizes
from wellposed.ops.lbfgs import minimize_lbfgs

F64 = torch.float64


def _rosenbrock(x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(-1)
        (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def _quadratic(hessians, centers):
    def objective(x):
        grad = torch.einsum("bij,bj->bi", hessians, x - centers)
        return ((x - centers) * grad).sum(-1) / 2, grad

    return objective


def test_rosenbrock_beside_scipy():
    """Fails if the two-loop recursion runs through the pairs in the wrong order."""
    start = torch.tensor([[-1.2, 1.0, 0.5, -0.3], [2.0, -1.0, 1.0, 3.0]], dtype=F64)
    found = minimize_lbfgs(_rosenbrock, start, tol=1e-14, grad_tol=1e-9)
    torch.testing.assert_close(found.x, torch.ones(2, 4, dtype=F64), atol=1e-7, rtol=0)
    for i in range(2):
        peer = scipy.optimize.minimize(
            lambda x: scipy.optimize.rosen(x),
            start[i].numpy(),
            jac=scipy.optimize.rosen_der,
            method="L-BFGS-B",
        )
        assert found.num_evals[i] < 2 * peer.nfev
    assert found.converged.all()
    assert (found.values[1:] <= found.values[:-1]).all()


def test_problems_do_not_touch_each_other():
    """Fails if a step length or the initial scaling is shared."""
    g = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 6, 6, generator=g, dtype=F64)
    scale = torch.tensor([1.0, 100.0, 0.01], dtype=F64)
    hessians = (roots @ roots.mT + torch.eye(6, dtype=F64)) * scale[:, None, None]
    centers = torch.randn(3, 6, generator=g, dtype=F64)
    zero = torch.zeros(3, 6, dtype=F64)
    together = minimize_lbfgs(_quadratic(hessians, centers), zero, tol=1e-15, grad_tol=1e-8)
    torch.testing.assert_close(together.x, centers, atol=1e-5, rtol=0)
    for i in range(3):
        one = slice(i, i + 1)
        alone = minimize_lbfgs(
            _quadratic(hessians[one], centers[one]), zero[one], tol=1e-15, grad_tol=1e-8
        )
        steps = min(6, len(alone.values))
        torch.testing.assert_close(together.values[:steps, i], alone.values[:steps, 0])


def test_kinks_are_descended():
    """The maximum of a norm and a slope: gradient descent with a fixed step does not settle."""

    def objective(x):
        return x.abs().sum(-1) + (x - 1).square().sum(-1) / 4, x.sign() + (x - 1) / 2

    found = minimize_lbfgs(objective, torch.tensor([[3.0, -2.0, 0.7]], dtype=F64), tol=1e-12)
    assert found.value.item() == pytest.approx(0.75, abs=1e-3)


def test_a_start_at_the_minimum_takes_no_step():
    found = minimize_lbfgs(lambda x: (x.square().sum(-1), 2 * x), torch.zeros(2, 3))
    assert found.num_iters.tolist() == [0, 0]
    assert found.num_evals.tolist() == [1, 1]
    assert found.converged.all()


def test_limits_and_memory_matter():
    start = torch.full((1, 4), -1.0, dtype=F64)
    short = minimize_lbfgs(_rosenbrock, start, max_iter=5)
    assert short.num_iters.item() == 5
    assert not short.converged
    one, ten = (minimize_lbfgs(_rosenbrock, start, memory=m, tol=1e-14) for m in (1, 10))
    assert one.num_evals != ten.num_evals

    def lifted(x):  # tol is relative
        return _rosenbrock(x)[0] + 10, _rosenbrock(x)[1]

    loose = minimize_lbfgs(lifted, start, tol=1e-1)
    coarse = minimize_lbfgs(_rosenbrock, start, grad_tol=5.0)
    assert loose.num_iters < ten.num_iters
    assert coarse.grad.abs().sum() <= 5.0
    assert coarse.num_iters < ten.num_iters


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"x": torch.zeros(3)}, r"x must have shape \(b, d\)"),
        ({"max_iter": -1}, "max_iter must be at least 0"),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"grad_tol": -1.0}, "grad_tol must be at least 0"),
        ({"memory": 0}, "memory must be at least 1"),
        ({"x": torch.full((1, 2), torch.nan)}, "objective must be finite"),
    ],
)
def test_bad_input(options, text):
    arguments = {"x": torch.zeros(1, 2), **options}
    with pytest.raises(ValueError, match=text):
        minimize_lbfgs(lambda x: (x.sum(-1), x), **arguments)


def _bowl(both):
    """Minimize a convex function with another center in each problem."""
    x, center = both.unbind(-1)
    gap = lambda z: z - center  # noqa: E731
    value = lambda z: gap(z).square().sum(-1) / 2 + (1 + gap(z).square()).log().sum(-1)  # noqa: E731
    slope = lambda z: gap(z) + 2 * gap(z) / (1 + gap(z).square())  # noqa: E731
    return minimize_lbfgs(lambda z: (value(z), slope(z)), x, max_iter=40)


def _starts(g):
    return (torch.randn(*sizes(g, 2), 2, generator=g),)


CASES = {"minimize_lbfgs": Case(_starts, _bowl)}
