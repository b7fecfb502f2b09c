"""Classical restoration of images, beside scikit-image and scipy."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.restoration import (
    best_setting,
    gaussian_blur,
    psnr,
    tikhonov,
    total_variation,
    tv_restore,
)

F64 = torch.float64


def noisy_square(seed=0):
    """A bright square on black, with noise, 10 x 8."""
    g = torch.Generator().manual_seed(seed)
    image = torch.zeros(10, 8, dtype=F64)
    image[3:7, 2:6] = 1.0
    return image.flatten(), (image.flatten() + 0.2 * torch.randn(80, generator=g, dtype=F64))[None]


def value(x, operator, measurement, weight, height, width):
    fit = (x @ operator.mT - measurement).square().sum(1) / 2
    return fit + weight * total_variation(x, height, width)


def test_blur_beside_scipy():
    """Fails if the kernel is not centered or rows and columns are swapped."""
    image = np.random.default_rng(0).random((7, 5))
    offsets = np.arange(-2, 3)
    kernel = np.exp(-(offsets**2) / (2 * 1.3**2))
    kernel /= kernel.sum()
    want = scipy.ndimage.convolve(image, np.outer(kernel, kernel), mode="constant")
    got = gaussian_blur(7, 5, 1.3, dtype=F64) @ torch.from_numpy(image).flatten()
    np.testing.assert_allclose(got.view(7, 5).numpy(), want, atol=1e-14)


def test_blur_is_symmetric_and_no_amplifier():
    a = gaussian_blur(6, 4, 0.8, kernel_size=3, dtype=F64)
    torch.testing.assert_close(a, a.mT)
    assert torch.linalg.matrix_norm(a, 2) <= 1
    assert not torch.allclose(a, gaussian_blur(6, 4, 0.9, kernel_size=3, dtype=F64))
    assert not torch.allclose(a, gaussian_blur(6, 4, 0.8, kernel_size=5, dtype=F64))


def test_tikhonov_is_least_squares_with_extra_rows():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 7, generator=g, dtype=F64)
    b = torch.randn(3, 5, generator=g, dtype=F64)
    tall = torch.cat([a, math.sqrt(0.3) * torch.eye(7, dtype=F64)])
    padded = torch.cat([b, torch.zeros(3, 7, dtype=F64)], 1)
    want = torch.linalg.lstsq(tall, padded.mT).solution.mT
    torch.testing.assert_close(tikhonov(a, b, weight=0.3), want)


def test_total_variation_by_loops():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, generator=g, dtype=F64)
    for row, found in zip(x.view(2, 3, 4), total_variation(x, 3, 4), strict=True):
        want = 0.0
        for i in range(3):
            for j in range(4):
                down = float(row[i + 1, j] - row[i, j]) if i < 2 else 0.0
                right = float(row[i, j + 1] - row[i, j]) if j < 3 else 0.0
                want += math.hypot(down, right)
        assert found.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("weight", [0.05, 0.2])
def test_denoising_beside_scikit_image(weight):
    """The same image as Chambolle's algorithm; fails if the two directions shrink separately."""
    restoration = pytest.importorskip("skimage.restoration")
    _, b = noisy_square()
    eye = torch.eye(80, dtype=F64)
    ours = tv_restore(eye, b, height=10, width=8, weight=weight, tol=1e-8, max_iter=20000)
    peer = restoration.denoise_tv_chambolle(
        b.view(10, 8).numpy(), weight=weight, eps=1e-12, max_num_iter=50000
    )
    peer = torch.from_numpy(peer).reshape(1, -1)
    assert ours.converged.all()
    mine, theirs = (value(x, eye, b, weight, 10, 8).item() for x in (ours.x, peer))
    assert mine <= theirs * (1 + 1e-6)
    assert (ours.x - peer).abs().max() < 5e-3


def test_no_direction_lowers_the_value():
    """A deblurring problem within bounds: random feasible steps never help."""
    truth, _ = noisy_square()
    g = torch.Generator().manual_seed(1)
    a = gaussian_blur(10, 8, 1.0, dtype=F64)
    b = (truth @ a.mT + 0.05 * torch.randn(80, generator=g, dtype=F64))[None]
    found = tv_restore(
        a, b, height=10, width=8, weight=0.01, low=0.0, high=1.0, tol=1e-8, max_iter=20000
    )
    assert found.converged.all()
    assert found.x.min() >= 0
    assert found.x.max() <= 1
    steps = torch.randn(200, 80, generator=g, dtype=F64) * torch.logspace(-4, -1, 200)[:, None]
    tried = (found.x + steps).clamp(0, 1)
    assert (value(tried, a, b, 0.01, 10, 8) >= value(found.x, a, b, 0.01, 10, 8) - 1e-9).all()
    other = tv_restore(
        a, b, height=10, width=8, weight=0.01, low=0.0, high=1.0, jump=0.3, tol=1e-8, max_iter=20000
    )
    torch.testing.assert_close(other.x, found.x, atol=1e-4, rtol=0)


def test_limits_of_the_weight():
    _, b = noisy_square()
    eye = torch.eye(80, dtype=F64)
    hardly = tv_restore(eye, b, height=10, width=8, weight=1e-6, tol=1e-6, max_iter=5000).x
    torch.testing.assert_close(hardly, b, atol=1e-4, rtol=0)
    flat = tv_restore(eye, b, height=10, width=8, weight=100.0, tol=1e-7, max_iter=20000).x
    torch.testing.assert_close(flat, b.mean().expand_as(b), atol=1e-4, rtol=0)


def test_an_early_stop_says_so():
    _, b = noisy_square()
    run = tv_restore(torch.eye(80, dtype=F64), b, height=10, width=8, weight=0.1, max_iter=2)
    assert run.num_iters == 2
    assert not run.converged.any()


def test_psnr_and_the_best_setting():
    target = torch.zeros(2, 4)
    x = torch.tensor([[0.1] * 4, [0.01] * 4])
    torch.testing.assert_close(psnr(x, target), torch.tensor([20.0, 40.0]))

    def gray(s):
        return torch.full((2, 4), s)

    assert best_setting(gray, [0.5, 0.2, 0.3], target) == 0.2
    assert best_setting(gray, [math.nan, 0.3], target) == 0.3
    assert best_setting(gray, [0.3, -2.0], target) == -2.0  # cut to black


def test_bad_input_is_refused():
    eye, b = torch.eye(4), torch.zeros(1, 4)
    tv = {"height": 2, "width": 2, "weight": 1.0}
    for change, message in [
        ({"height": 3}, r"height \* width must be 4, got 3 \* 2"),
        ({"weight": 0.0}, "weight must be positive and finite, got 0"),
        ({"low": 1.0, "high": 0.0}, "low must be below high"),
        ({"max_iter": 0}, "max_iter at least 1"),
        ({"tol": 0.0}, "tol positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            tv_restore(eye, b, **(tv | change))
    with pytest.raises(ValueError, match=r"measurement must have shape \(b, 4\), got \(1, 3\)"):
        tikhonov(eye, b[:, :3], weight=1.0)
    with pytest.raises(ValueError, match=r"operator must have shape \(m, d\)"):
        tikhonov(b[0], b, weight=1.0)
    with pytest.raises(ValueError, match="kernel_size odd"):
        gaussian_blur(3, 3, 1.0, kernel_size=2)
    with pytest.raises(ValueError, match=r"one shape \(b, d\)"):
        psnr(b, b[:, :2])
    with pytest.raises(ValueError, match=r"x must have shape \(b, 6\)"):
        total_variation(b, 2, 3)
    with pytest.raises(ValueError, match="settings must hold at least one"):
        best_setting(lambda s: b, [], b)


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    weight=st.sampled_from([1e-8, 1e-3, 1.0, 1e6]),
    scale=st.sampled_from([0.0, 1e-8, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_any_finite_problem_gives_a_finite_image_no_worse_than_the_mean(
    height, width, weight, scale, seed
):
    g = torch.Generator().manual_seed(seed)
    d = height * width
    b = scale * torch.randn(2, d, generator=g, dtype=F64)
    eye = torch.eye(d, dtype=F64)
    found = tv_restore(
        eye, b, height=height, width=width, weight=weight, jump=max(scale, 0.1), max_iter=300
    )
    assert found.x.isfinite().all()
    flat = b.mean(1, keepdim=True).expand_as(b)
    if found.converged.all():
        best = value(flat, eye, b, weight, height, width)
        mine = value(found.x, eye, b, weight, height, width)
        slack = 0.05 * max(scale, 0.1) * d * (weight + scale + 1)
        assert (mine <= best + slack).all()


def _problem(g):
    return torch.randn(5, 6, generator=g), torch.randn(3, 5, generator=g)


def _images(g):
    return torch.rand(2, 6, generator=g), torch.rand(2, 6, generator=g)


CASES = {
    "gaussian_blur": Case(
        inputs=lambda g: (torch.zeros(1),),
        call=lambda like: gaussian_blur(2, 3, 1.0, dtype=like.dtype, device=like.device),
    ),
    "tikhonov": Case(inputs=_problem, call=lambda a, b: tikhonov(a, b, weight=0.5)),
    "total_variation": Case(inputs=_images, call=lambda x, _: total_variation(x, 2, 3)),
    "tv_restore": Case(
        inputs=_problem,
        call=lambda a, b: tv_restore(a, b, height=2, width=3, weight=0.5, max_iter=20).x,
    ),
    "psnr": Case(inputs=_images, call=psnr),
    "best_setting": Case(
        inputs=_images, call=lambda x, t: best_setting(lambda s: x * s, [0.5, 1.0], t)
    ),
}
