"""One representation for many tasks: a fit to raw samples, a random start, and the risk."""

import pytest
import torch

from contract import Case
from wellposed.ops.shared_representation import excess_risk, fit_representation, random_basis

F64 = torch.float64


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_fit_representation_from_raw_samples():
    """Noiseless tasks are recovered from the spectral and from a random start."""
    W = torch.randn(2, 6, generator=_gen(9), dtype=F64)
    inputs = list(torch.randn(6, 12, 5, generator=_gen(11), dtype=F64))
    targets = [x[:, :2] @ w for x, w in zip(inputs, W.T)]
    for generator in (None, _gen(10)):
        fit = fit_representation(inputs, targets, 2, generator=generator)
        assert fit.converged
        truth = torch.cat([W, W.new_zeros(3, 6)])
        torch.testing.assert_close(fit.basis @ fit.heads, truth, rtol=0, atol=1e-4)
    few = fit_representation(inputs, targets, 2, steps=1, generator=_gen(10))
    assert not few.converged
    strong = fit_representation(inputs, targets, 2, ridge=0.3)
    assert (strong.basis @ strong.heads - truth).norm() > 0.01


def test_random_basis_is_orthonormal_and_follows_its_generator():
    x = torch.zeros(4, 5, dtype=F64)
    basis = random_basis(x, 3, _gen(1))
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=F64))
    assert torch.equal(basis, random_basis(x, 3, _gen(1)))
    assert not torch.equal(basis, random_basis(x, 3, _gen(2)))
    assert random_basis(x, 9, _gen(1)).shape == (5, 5)


def test_excess_risk_does_not_see_how_a_predictor_is_written():
    """A rotation of basis and head changes nothing; another head costs its squared distance."""
    basis = torch.linalg.qr(torch.randn(5, 3, generator=_gen(2), dtype=F64)).Q
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=_gen(4), dtype=F64)).Q
    head = torch.randn(3, generator=_gen(3), dtype=F64)
    assert excess_risk(basis @ rotation, rotation.T @ head, basis, head) < 1e-25
    risk = excess_risk(basis, 3 * head, basis, head)
    torch.testing.assert_close(risk, 4 * head.square().sum())


def test_bad_input_is_named():
    W, w = torch.zeros(2, 4), torch.zeros(2)
    with pytest.raises(ValueError, match="same tasks"):
        fit_representation([], [], 1)
    with pytest.raises(ValueError, match="same number of rows"):
        excess_risk(W, W[0], W.T, w)
    with pytest.raises(ValueError, match="an entry for each column"):
        excess_risk(torch.eye(3), torch.ones(2), torch.eye(3), torch.ones(3))


CASES = {
    "fit_representation": Case(
        inputs=lambda g: tuple(torch.randn(9, 6, generator=g, dtype=F64) for _ in range(3)),
        call=lambda *z: fit_representation([v[:, :5] for v in z], [v[:, 5] for v in z], 2).heads,
    ),
    "excess_risk": Case(
        inputs=lambda g: tuple(torch.randn(s, generator=g) for s in ((5, 2), 2, (5, 3), 3)),
        call=excess_risk,
    ),
    "random_basis": Case(
        inputs=lambda g: (torch.randn(4, 3, generator=g),),
        call=lambda x: random_basis(x, 2, torch.Generator().manual_seed(0)),
    ),
}
