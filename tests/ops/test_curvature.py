"""Tests of wellposed.ops.curvature: bounds on Hessians and small semidefinite systems."""

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.curvature import (
    BlockPartition,
    DenseBound,
    GramBound,
    as_bound,
    check_blocks,
    diagonal_gain,
    divide_or_zero,
    hard_threshold_block,
    solve_semidefinite,
)

F64 = torch.float64


@pytest.mark.parametrize("classes", [1, 3])
def test_gram_bound_from_its_matrix(classes):
    """Fails if classes are not centered or coefficients are flattened by columns."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(9, 4, generator=g, dtype=F64)
    center = torch.eye(classes, dtype=F64) - (1 / classes if classes > 1 else 0)
    matrix, bound = 0.5 * torch.kron(a.T @ a, center), GramBound(a, 0.5, classes)
    n = 4 * classes
    v, index = torch.randn(n, generator=g, dtype=F64), torch.tensor([[0, 2], [3, 1]])
    for one, two in ((bound, matrix), (DenseBound(matrix), matrix)):
        torch.testing.assert_close(one.diagonal(), two.diagonal())
        torch.testing.assert_close(one.apply(v), two @ v)
        torch.testing.assert_close(one.largest_eigenvalue(), torch.linalg.eigvalsh(two)[-1])
        for row, block in zip(index, one.block(index)):
            torch.testing.assert_close(block, two[row][:, row])
        down = one.subtract(v, index[1], v[:2], 0.3)
        torch.testing.assert_close(down, v - 0.3 * two[:, index[1]] @ v[:2])


def test_wide_problems_do_not_form_the_gram_matrix(monkeypatch):
    a = torch.randn(3, 5, dtype=F64)
    v, index = torch.randn(5, dtype=F64), torch.tensor([4, 0])
    expected = GramBound(a).subtract(v, index, v[:2], 0.1)
    monkeypatch.setattr("wellposed.ops.curvature.GRAM_COLUMNS", 4)
    bound = GramBound(a)
    torch.testing.assert_close(bound.subtract(v, index, v[:2], 0.1), expected)
    assert "_gram" not in vars(bound)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("k", "rank"), [(1, 1), (6, 20), (20, 8), (60, 30)])
def test_semidefinite_systems(dtype, k, rank):
    """Fails without the raised diagonal: Cholesky's method breaks down on singular matrices."""
    g = torch.Generator().manual_seed(k)
    a = torch.randn(20, rank, k, generator=g, dtype=dtype) * torch.logspace(-2, 2, k, dtype=dtype)
    v = torch.randn(20, rank, generator=g, dtype=dtype)
    x = solve_semidefinite(a.mT @ a, (a.mT @ v[..., None])[..., 0])
    fit = (a @ x[..., None])[..., 0]
    if k < rank:  # then only a part of v can be reached
        v = (a @ torch.linalg.lstsq(a, v[..., None]).solution)[..., 0]
    assert x.dtype == dtype
    torch.testing.assert_close(fit, v, rtol=0, atol=1e-2 if dtype == torch.float32 else 1e-9)


def test_gain_of_a_coordinate_from_a_grid():
    """Fails if the constrained step is not cut at zero."""
    g = torch.Generator().manual_seed(0)
    gradient, x = torch.randn(20, generator=g, dtype=F64), torch.rand(20, generator=g, dtype=F64)
    lipschitz = torch.rand(20, generator=g, dtype=F64) + 0.1
    d = torch.linspace(-30, 30, 600001, dtype=F64)[:, None]
    for i in range(20):
        drop = -(gradient[i] * d + lipschitz[i] / 2 * d * d)
        free = drop.max()
        bound = drop[d >= -x[i]].max()
        torch.testing.assert_close(diagonal_gain(gradient, lipschitz)[i], free, atol=1e-6, rtol=0)
        found = diagonal_gain(gradient, lipschitz, x)[i]
        torch.testing.assert_close(found, bound, atol=1e-3, rtol=0)


def test_no_curvature_means_no_gain_unless_a_bound_stops_the_step():
    zero, one = torch.zeros(2), torch.ones(2)
    assert diagonal_gain(zero, zero).tolist() == [0, 0]
    assert diagonal_gain(one, zero, 3 * one).tolist() == [3, 3]


def test_partition_pads_without_harm():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(9, 5, generator=g, dtype=F64)
    blocks = [torch.tensor([4]), torch.tensor([0, 2, 3]), torch.tensor([1])]
    partition = BlockPartition.of(blocks, 5, GramBound(a))
    h, gradient = a.T @ a, torch.randn(5, generator=g, dtype=F64)
    for i, b in enumerate(blocks):
        hb = h[b][:, b]
        torch.testing.assert_close(partition.lipschitz()[i], torch.linalg.eigvalsh(hb)[-1])
        score = partition.scores(gradient, "gsq", gradient)[i]
        torch.testing.assert_close(score, gradient[b] @ torch.linalg.solve(hb, gradient[b]))


def _system(g):
    """A positive semidefinite matrix of any size and rank, and two vectors."""
    n, rank = sizes(g, 2)
    a = torch.randn(rank, n, generator=g)
    return a.T @ a, a.T @ torch.randn(rank, generator=g), torch.rand(n, generator=g)


CASES = {
    "as_bound": Case(_system, lambda h, b, x: as_bound(h, len(b))),
    "check_blocks": Case(
        lambda g: (torch.randperm(6, generator=g),), lambda i: check_blocks(i.split(2), 6)
    ),
    "diagonal_gain": Case(
        _system, lambda h, b, x: (diagonal_gain(b, x), diagonal_gain(b, x, x.clone()))
    ),
    "divide_or_zero": Case(_system, lambda h, b, x: divide_or_zero(b, x)),
    "hard_threshold_block": Case(
        _system, lambda h, b, x: hard_threshold_block(b, 1, DenseBound(h), 0.1, 3)
    ),
    "solve_semidefinite": Case(_system, lambda h, b, x: solve_semidefinite(h, b)),
}
