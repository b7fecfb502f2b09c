"""Ridge regression chosen by leave-one-out."""

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.ridge import ridge_leave_one_out

F64 = torch.float64


def _fit(x, y, ridge):
    return torch.linalg.solve(x.T @ x + len(x) * ridge * torch.eye(x.shape[1], dtype=F64), x.T @ y)


@pytest.mark.parametrize("n", [4, 12])
def test_against_leaving_out_rows_one_by_one(n):
    """The strength stays n lambda when a row is left out; fails if it becomes (n - 1) lambda."""
    g = torch.Generator().manual_seed(n)
    x, y = torch.randn(5, n, 6, generator=g, dtype=F64), torch.randn(5, n, generator=g, dtype=F64)
    ridges = [0.01, 0.1, 1.0, 10.0]
    found = ridge_leave_one_out(x, y, ridges)
    for i in range(5):
        errors = []
        for ridge in ridges:
            total = 0.0
            for row in range(n):
                keep = [j for j in range(n) if j != row]
                scaled = ridge * n / (n - 1)
                total += float((y[i, row] - x[i, row] @ _fit(x[i, keep], y[i, keep], scaled)) ** 2)
            errors.append(total)
        best = ridges[errors.index(min(errors))]
        torch.testing.assert_close(found[i], _fit(x[i], y[i], best))


def test_bad_input():
    with pytest.raises(ValueError, match="x must be"):
        ridge_leave_one_out(torch.ones(3, 2), torch.ones(2), [1.0])
    with pytest.raises(ValueError, match="ridges must be positive"):
        ridge_leave_one_out(torch.ones(3, 2), torch.ones(3), [0.0])


def _regression(g):
    b, n, d = sizes(g, 3)
    return torch.randn(b, n, d, generator=g), torch.randn(b, n, generator=g)


CASES = {
    "ridge_leave_one_out": Case(
        _regression, lambda x, y: ridge_leave_one_out(x, y, [1e-3, 0.1, 10.0])
    )
}
