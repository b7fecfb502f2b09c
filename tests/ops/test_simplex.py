"""Projections on the simplex, against a peer, a general solver and enumeration."""

import itertools

import pytest
import scipy.optimize
import torch

from contract import Case, sizes
from wellposed.ops.simplex import project_simplex, project_sparse_simplex, simplex_threshold

F64 = torch.float64


def _slsqp(x, z):
    """The same projection as a general quadratic program."""
    found = scipy.optimize.minimize(
        lambda p: ((p - x) ** 2).sum() / 2,
        abs(x) + 0.1,
        jac=lambda p: p - x,
        bounds=[(0, None)] * len(x),
        constraints={"type": "eq", "fun": lambda p: p.sum() - z, "jac": lambda p: p * 0 + 1},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("z", [0.3, 1.0, 4.0])
def test_simplex_from_a_quadratic_program(z):
    """Fails if the threshold divides by rho + 1."""
    x = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(project_simplex(x, z), _slsqp(x.numpy(), z), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_sparse_simplex_from_all_supports(k):
    """Fails if the full vector is projected before its k largest entries are kept."""
    x = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=F64)
    best = None
    for support in itertools.combinations(range(5), k):
        p = torch.zeros(5, dtype=F64)
        p[list(support)] = _slsqp(x[list(support)].numpy(), 1.0)
        if best is None or (p - x).norm() < (best - x).norm():
            best = p
    torch.testing.assert_close(project_sparse_simplex(x, k), best, atol=1e-6, rtol=0)


def test_k_from_one_to_beyond_the_length():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=F64)
    for k in range(1, 8):
        p = project_sparse_simplex(x, k)
        assert (p > 0).sum(-1).max() <= k
        torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=F64))
    one = torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0)
    torch.testing.assert_close(project_sparse_simplex(x, 1), one, rtol=0, atol=0)
    torch.testing.assert_close(project_sparse_simplex(x, 99), project_simplex(x), rtol=0, atol=0)


def test_idempotent_and_shift_invariant():
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(3), dtype=F64)
    p = project_sparse_simplex(x, 3)
    torch.testing.assert_close(project_sparse_simplex(p, 3), p)
    torch.testing.assert_close(project_sparse_simplex(x + 5, 3), p)


def test_axes_and_totals():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=F64)
    z = torch.rand(3, 5, dtype=F64) + 0.1
    p = project_sparse_simplex(x, 2, z, dim=1)
    torch.testing.assert_close(p.sum(1), z)
    for i, j in itertools.product(range(3), range(5)):
        torch.testing.assert_close(
            p[i, :, j], project_sparse_simplex(x[i, :, j], 2, float(z[i, j]))
        )
    assert (project_sparse_simplex(x, 2, 0.0) == 0).all()


@pytest.mark.parametrize("k", [2, 6])
def test_gradient(k):
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(5), dtype=F64).requires_grad_()
    z = torch.rand(2, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, z: project_sparse_simplex(x, k, z), (x, z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_dtype_is_kept(dtype):
    x = torch.tensor([0.5, 0.75, -1.0, 0.25], dtype=dtype)
    p = project_sparse_simplex(x, 2)
    assert p.dtype == dtype
    assert p.tolist() == [0.375, 0.625, 0, 0]


def test_threshold_gives_the_total():
    v = torch.tensor([3.0, 1.0, 0.5])
    theta = simplex_threshold(v, 2.5)
    assert (v - theta).clamp(min=0).sum().item() == pytest.approx(2.5)


def test_bad_input():
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        project_sparse_simplex(x, 0)
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        project_sparse_simplex(x, 1.5)
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        project_sparse_simplex(x.int(), 1)
    with pytest.raises(ValueError, match="z must be finite and at least 0"):
        project_sparse_simplex(x, 1, -1.0)
    with pytest.raises(ValueError, match=r"z must have shape \(3,\), got \(2,\)"):
        project_sparse_simplex(x, 1, torch.ones(2))
    with pytest.raises(ValueError, match="at least one entry along dim"):
        project_simplex(torch.ones(3, 0))


def _rows(g):
    """Rows in descending order, and a total for each."""
    n, k = sizes(g, 2)
    return torch.randn(n, k, generator=g).sort(descending=True).values, torch.rand(n, generator=g)


CASES = {
    "project_simplex": Case(_rows, project_simplex),
    "project_sparse_simplex": Case(_rows, lambda x, z: project_sparse_simplex(x, 2, z)),
    "simplex_threshold": Case(_rows, simplex_threshold),
}
