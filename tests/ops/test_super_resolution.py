"""Pairs of images: the same place in both, and interpolation that keeps what it must keep."""

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.super_resolution import enlarge, psnr, random_pairs, shrink, to_gray


def test_a_plane_survives_shrinking_and_enlarging():
    """Away from the border; fails if pixel centers are shifted."""
    line = torch.arange(16, dtype=torch.float64)
    plane = (line[:, None] + 2 * line[None, :]).view(1, 1, 16, 16)
    small = shrink(plane, 2)
    torch.testing.assert_close(small[0, 0, 3, 3], plane[0, 0, 6:8, 6:8].mean())
    error = enlarge(small, 2)[0, 0, 5:11, 5:11] - plane[0, 0, 5:11, 5:11]
    assert error.abs().max() < 0.4  # torch's bicubic kernel bends a plane; a shift makes it 1.5


def test_random_pairs_are_the_same_place():
    """Each small pixel holds the place of its large ones; fails if rows and columns are mixed."""
    large = torch.arange(3 * 16 * 12, dtype=torch.float64).view(3, 1, 16, 12)
    small = large[:, :, ::2, ::2]
    a, b = random_pairs(small, large, crop=4, count=50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a, b[:, :, ::2, ::2])
    assert len(a[:, 0, 0, 0].unique()) > 20


def test_random_pairs_reach_every_place():
    small = torch.arange(9.0).view(1, 1, 3, 3)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    g = torch.Generator().manual_seed(0)
    a, _ = random_pairs(small, large, crop=1, count=300, generator=g)
    assert a.unique().tolist() == list(range(9))


def test_gray_and_psnr():
    assert to_gray(torch.eye(3).view(3, 3, 1, 1)).flatten().tolist() == pytest.approx(
        [0.299, 0.587, 0.114]
    )
    assert psnr(torch.tensor([0.1, 0.0])).tolist() == pytest.approx([10.0, float("inf")])


def test_bad_input():
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="three channels"):
        to_gray(x[:, :1])
    with pytest.raises(ValueError, match="scale must be >= 1 and divide"):
        shrink(x, 3)
    with pytest.raises(ValueError, match="scale must be at least 1"):
        enlarge(x, 0)
    g = torch.Generator()
    with pytest.raises(ValueError, match="crop must be from 1 to 8"):
        random_pairs(x, enlarge(x, 2), crop=9, count=1, generator=g)
    with pytest.raises(ValueError, match="large must match small"):
        random_pairs(x, torch.rand(2, 3, 16, 17), crop=4, count=1, generator=g)
    with pytest.raises(ValueError, match="images must be floating images"):
        shrink(torch.ones(8, 8), 2)


def _images(g, *, colors=1):
    n, h, w = sizes(g, 3)
    return (torch.rand(n, colors, 2 * h, 2 * w, generator=g),)


CASES = {
    "to_gray": Case(inputs=lambda g: _images(g, colors=3), call=to_gray),
    "shrink": Case(inputs=_images, call=lambda x: shrink(x, 2)),
    "enlarge": Case(inputs=_images, call=lambda x: enlarge(x, 3)),
    "random_pairs": Case(
        inputs=lambda g: (torch.rand(3, 1, 4, 4, generator=g), torch.rand(3, 1, 8, 8, generator=g)),
        call=lambda a, b: random_pairs(
            a, b, crop=2, count=4, generator=torch.Generator().manual_seed(0)
        ),
    ),
    "psnr": Case(inputs=lambda g: (torch.rand(sizes(g, 1), generator=g),), call=psnr),
}
