"""Tests of wellposed.ops.posterior_means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.posterior_means import empirical_mean, two_level_mean, wiener_mean
from wellposed.train import generator

CASES = {
    "wiener_mean": Case(
        inputs=lambda g: (torch.randn(3, 4, generator=g), torch.randn(4, generator=g)),
        call=lambda y, m: wiener_mean(y, m, torch.eye(4).to(y), sigma=0.5),
    ),
    "empirical_mean": Case(
        inputs=lambda g: (torch.randn(3, 4, generator=g), torch.randn(5, 4, generator=g)),
        call=lambda y, x: empirical_mean(y, x, sigma=0.5),
    ),
    "two_level_mean": Case(
        inputs=lambda g: (torch.randn(3, 4, generator=g),),
        call=lambda y: two_level_mean(y, torch.tril(torch.ones(4, 4)).to(y), sigma=0.5),
    ),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def test_wiener_against_a_solve_and_against_other_linear_maps() -> None:
    """The formula, and no small change of the matrix has a smaller expected error."""
    root, mean, y = draw(4, 4), draw(4, seed=1), draw(3, 4, seed=2)
    cov, eye = root @ root.T, torch.eye(4, dtype=torch.float64)
    matrix = torch.linalg.solve(cov + 0.25 * eye, cov).T
    torch.testing.assert_close(wiener_mean(y, mean, cov, sigma=0.5), mean + (y - mean) @ matrix.T)

    def error(a: torch.Tensor) -> float:
        return ((eye - a) @ cov @ (eye - a).T + 0.25 * a @ a.T).trace().item()

    assert all(error(matrix) < error(matrix + 0.01 * draw(4, 4, seed=s)) for s in range(20))


def test_empirical_against_loops() -> None:
    """Weights from the definition; fails if sigma is not squared (tried)."""
    y, x = draw(3, 4), draw(5, 4, seed=1)
    for n in range(3):
        w = torch.stack([torch.exp(-(y[n] - v).square().sum() / (2 * 0.7**2)) for v in x])
        torch.testing.assert_close(empirical_mean(y, x, sigma=0.7)[n], w @ x / w.sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_empirical_stays_among_the_images(n: int, m: int, sigma: float) -> None:
    """Each pixel lies between the images' least and largest one; small noise picks the nearest."""
    y, x = draw(n, 5, seed=n), draw(m, 5, seed=10 + m)
    out = empirical_mean(y, x, sigma=sigma)
    assert (out >= x.amin(0) - 1e-9).all()
    assert (out <= x.amax(0) + 1e-9).all()
    nearest = x[torch.cdist(y, x).argmin(1)]
    torch.testing.assert_close(empirical_mean(y, x, sigma=1e-3), nearest)


def test_two_levels_against_an_integral() -> None:
    """The posterior over masks and gray values, summed on a wide grid of gray values.

    Fails without the factor one over the length (tried).
    """
    masks = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0.5, 1, 0, 0]], dtype=torch.float64)
    y, sigma = draw(2, 4), 0.8
    gray = torch.linspace(-9, 9, 361, dtype=torch.float64)
    a, b = (v.flatten() for v in torch.meshgrid(gray, gray, indexing="ij"))
    images = torch.cat([a[:, None] * m + b[:, None] * (1 - m) for m in masks])
    expected = empirical_mean(y, images, sigma=sigma)
    torch.testing.assert_close(
        two_level_mean(y, masks, sigma=sigma), expected, atol=1e-4, rtol=1e-4
    )


def test_two_levels_leaves_out_constant_masks() -> None:
    y, masks = draw(2, 4), torch.tensor([[0.0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(
        two_level_mean(y, masks, sigma=0.5), two_level_mean(y, masks[:1], sigma=0.5)
    )


def test_noise_matters() -> None:
    y, x, cov = draw(2, 4), draw(3, 4, seed=1), torch.eye(4, dtype=torch.float64)
    for call in (
        lambda s: wiener_mean(y, y[0], cov, sigma=s),
        lambda s: empirical_mean(y, x, sigma=s),
        lambda s: two_level_mean(y, x, sigma=s),
    ):
        assert not torch.allclose(call(0.5), call(1.0))


def test_bad_input() -> None:
    y = torch.ones(2, 4)
    with pytest.raises(ValueError, match="sigma"):
        empirical_mean(y, y, sigma=0.0)
    with pytest.raises(ValueError, match="images"):
        empirical_mean(y, y[:, :2], sigma=1.0)
    with pytest.raises(ValueError, match="square"):
        wiener_mean(y, torch.ones(4), torch.ones(3, 4), sigma=1.0)
    with pytest.raises(ValueError, match="not constant"):
        two_level_mean(y, y, sigma=1.0)
