"""Tests of wellposed.ops.dct."""

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.dct import dct_matrix, dct_shrinkage
from wellposed.train import generator

CASES = {
    "dct_matrix": Case(
        inputs=lambda g: (torch.randn(3, generator=g),),
        call=lambda x: dct_matrix(3, dtype=x.dtype, device=x.device),
    ),
    "dct_shrinkage": Case(
        inputs=lambda g: (torch.randn(3, 1, 4, 5, generator=g),),
        call=lambda y: dct_shrinkage(y, sigma=0.5),
    ),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_matrix_against_scipy(n: int) -> None:
    """Fails if the constant row is not scaled down (tried)."""
    x = draw(3, n)
    matrix = dct_matrix(n, dtype=torch.float64)
    expected = scipy.fft.dct(x.numpy(), norm="ortho")
    np.testing.assert_allclose((x @ matrix.T).numpy(), expected, atol=1e-12)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))


def test_shrinkage_against_scipy() -> None:
    """Images that are not square; fails if height and width change places."""
    y, sigma, factor = draw(4, 2, 6, 3), 0.4, 2.0
    waves = scipy.fft.dctn(y.numpy(), axes=(2, 3), norm="ortho")
    keep = np.abs(waves) > factor * sigma
    keep[:, :, 0, 0] = True
    expected = scipy.fft.idctn(waves * keep, axes=(2, 3), norm="ortho")
    found = dct_shrinkage(y, sigma=sigma, factor=factor)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_limits(height: int, width: int, sigma: float) -> None:
    """Nothing is cut at factor 0; at a huge one only the mean of each image is left."""
    y = draw(2, 1, height, width, seed=height)
    torch.testing.assert_close(dct_shrinkage(y, sigma=sigma, factor=0.0), y)
    flat = dct_shrinkage(y, sigma=sigma, factor=1e9)
    torch.testing.assert_close(flat, y.mean((2, 3), keepdim=True).expand_as(y))


def test_a_wave_survives_noise_that_pixels_do_not() -> None:
    """One cosine of the basis is found again almost exactly; the noise loses nearly all energy."""
    wave = dct_matrix(16, dtype=torch.float64)
    x = 5 * torch.outer(wave[2], wave[3])[None, None].expand(200, 1, 16, 16)
    noise = 0.3 * draw(200, 1, 16, 16)
    left = (dct_shrinkage(x + noise, sigma=0.3, factor=3.5) - x).square().sum((1, 2, 3)).mean()
    assert left < 0.05 * noise.square().sum((1, 2, 3)).mean()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": float("nan")}, "sigma must be positive"),
        ({"factor": -1.0}, "factor at least 0"),
        ({"y": torch.ones(4, 4)}, r"y must be floating-point images \(n, C, H, W\)"),
        ({"y": torch.ones(1, 1, 4, 4, dtype=torch.int64)}, "y must be floating-point"),
    ],
)
def test_bad_input(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dct_shrinkage(**{"y": torch.ones(1, 1, 4, 4), "sigma": 1.0, **change})
    with pytest.raises(ValueError, match="n must be at least 1"):
        dct_matrix(0)
