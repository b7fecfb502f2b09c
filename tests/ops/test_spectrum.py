"""How many frequencies a vector is made of."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.spectrum import inverse_participation_ratio


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("p", "r"), [(6, 2), (7, 2), (7, 3), (5, 1)])
def test_the_ratio_is_its_definition(p, r):
    """Fails with a two-sided transform, and if the norm is not taken over frequencies."""
    vectors = torch.randn(4, p, generator=_gen(), dtype=torch.float64)
    for u, got in zip(vectors.tolist(), inverse_participation_ratio(vectors, r).tolist()):
        size = []
        for j in range(p // 2 + 1):
            a = sum(v * math.cos(2 * math.pi * j * n / p) for n, v in enumerate(u))
            b = sum(v * math.sin(2 * math.pi * j * n / p) for n, v in enumerate(u))
            size.append(math.hypot(a, b))
        norm = math.sqrt(sum(s * s for s in size))
        assert got == pytest.approx(sum((s / norm) ** (2 * r) for s in size), rel=1e-12)


def test_limits_of_the_ratio():
    p = 31
    n = torch.arange(p, dtype=torch.float64)
    waves = torch.stack([torch.cos(2 * torch.pi * f * n / p + f) for f in range(1, 16)])
    torch.testing.assert_close(inverse_participation_ratio(waves), torch.ones(15).double())
    delta = torch.eye(p, dtype=torch.float64)
    torch.testing.assert_close(
        inverse_participation_ratio(delta), torch.full((p,), 1 / 16).double()
    )
    assert inverse_participation_ratio(torch.ones(p)).item() == pytest.approx(1.0)
    assert inverse_participation_ratio(torch.zeros(2, p)).tolist() == [0.0, 0.0]
    assert inverse_participation_ratio(torch.zeros(0, p)).shape == (0,)


def test_the_ratio_ignores_scale_and_shift_of_place():
    """A cyclic shift changes phases only."""
    u = torch.randn(3, 11, generator=_gen(), dtype=torch.float64)
    ratio = inverse_participation_ratio(u)
    torch.testing.assert_close(inverse_participation_ratio(-1e200 * u), ratio)
    torch.testing.assert_close(inverse_participation_ratio(u.roll(4, 1)), ratio)


def test_gradient_of_the_ratio():
    u = torch.randn(2, 7, generator=_gen(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(inverse_participation_ratio, u)


@given(
    p=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    r=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_ratio_of_any_finite_vector_lies_between_its_limits(p, scale, r, seed):
    """Fails with overflow at 1e30 in float32 if the vector is not scaled first."""
    ratio = inverse_participation_ratio(scale * torch.randn(3, p, generator=_gen(seed)), r)
    if scale == 0.0:
        assert ratio.tolist() == [0.0] * 3
    else:
        assert ratio.max() <= 1 + 1e-5
        assert ratio.min() >= (p // 2 + 1) ** (1 - r) * (1 - 1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="r must be at least 1"):
        inverse_participation_ratio(torch.ones(3), 0)
    for vectors in (torch.arange(3), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="vectors must be floating point"):
            inverse_participation_ratio(vectors)


CASES = {
    "inverse_participation_ratio": Case(
        inputs=lambda g: (torch.randn(3, 7, generator=g),), call=inverse_participation_ratio
    ),
}
