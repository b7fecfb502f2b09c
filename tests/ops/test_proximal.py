"""Defects of maps that are no proximal operators."""

import pytest
import torch

from contract import Case
from wellposed.nets import MLP
from wellposed.nets.convex import LPN, ConvLPN
from wellposed.nets.denoiser import Residual
from wellposed.ops.proximal import prox_defects
from wellposed.train import seeded


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def test_defects_of_matrices_and_networks():
    """Rows and columns of the Jacobian; fails if only the diagonal is looked at."""
    m = normal(4, 4)
    found = prox_defects(lambda y: y @ m.mT, normal(3, 4, seed=1))
    want = torch.linalg.matrix_norm(m - m.mT) / torch.linalg.matrix_norm(m)
    torch.testing.assert_close(found.asymmetry, want.expand(3))
    least = torch.linalg.eigvalsh((m + m.mT) / 2)[0]
    torch.testing.assert_close(found.min_eigenvalue, least.expand(3))
    y = normal(3, 4, seed=2)
    with seeded(0):
        net = LPN(4, 7, 3, alpha=0.05).double()
    exact = prox_defects(net, y)
    assert exact.asymmetry.max() < 1e-12
    assert exact.min_eigenvalue.min() >= 0.05 - 1e-12
    with seeded(0):
        plain = Residual(MLP((4, 7, 4))).double()
        conv = ConvLPN((1, 4, 4), 3, 3, alpha=0.1).double()
    assert prox_defects(plain, y).asymmetry.min() > 0.01
    convolved = prox_defects(conv, normal(2, 16))
    assert convolved.asymmetry.max() < 1e-12
    assert convolved.min_eigenvalue.min() >= 0.1 - 1e-12
    with pytest.raises(ValueError, match=r"y must have shape \(b, d\)"):
        prox_defects(plain, y[0])
    with pytest.raises(ValueError, match=r"denoiser must keep the shape \(3, 4\), got \(3, 2\)"):
        prox_defects(lambda y: y[:, :2], y)


CASES = {
    "prox_defects": Case(
        inputs=lambda g: (torch.randn(3, 4, generator=g),),
        call=lambda y: prox_defects(lambda v: torch.tanh(v.roll(1, -1) - 0.5 * v), y),
    ),
}
