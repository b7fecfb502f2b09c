"""Tests of wellposed.data.shapes."""

import pytest
import torch

from wellposed.data.shapes import CONTOUR_SPREAD, calpha_images, disk_images, disk_masks
from wellposed.train import generator


def test_a_mask_has_the_area_of_its_disk() -> None:
    row, column, radius = (
        torch.tensor([7.2, 8.0]),
        torch.tensor([8.1, 6.5]),
        torch.tensor([3.0, 5.0]),
    )
    area = disk_masks(row, column, radius, 16).sum((1, 2))
    torch.testing.assert_close(area, torch.pi * radius.square(), rtol=0.03, atol=0.0)


def test_disks_have_two_gray_values_and_a_border() -> None:
    """Most pixels have one of two values, and the images differ from draw to draw."""
    x = disk_images(50, 16, generator(0))
    assert x.shape == (50, 1, 16, 16)
    assert x.min() >= 0
    assert x.max() <= 1
    for image in x[:, 0]:
        values, counts = image.flatten().unique(return_counts=True)
        assert counts.sort(descending=True).values[:2].sum() > 180
        assert len(values) > 2
    torch.testing.assert_close(x, disk_images(50, 16, generator(0)))
    assert not torch.equal(x, disk_images(50, 16, generator(1)))


def test_smoother_regions_have_less_high_frequency() -> None:
    """The share of energy at high frequencies falls with alpha."""

    def rough(alpha: float) -> float:
        x = calpha_images(100, alpha, 32, generator(0))[:, 0, :3]  # rows above most borders
        power = torch.fft.fft(x - x.mean(-1, keepdim=True), dim=-1).abs().square().mean((0, 1))
        return (power[8:25].sum() / power.sum()).item()

    assert rough(4.0) < 0.5 * rough(2.0) < 0.25 * rough(1.0)


def test_one_region_begins_at_black_or_ends_at_white() -> None:
    x = calpha_images(200, 2.0, 16, generator(1))
    assert x.shape == (200, 1, 16, 16)
    assert x.min() >= 0
    assert x.max() <= 1
    assert ((x.amin((1, 2, 3)) < 0.02) | (x.amax((1, 2, 3)) > 0.98)).float().mean() > 0.75
    assert CONTOUR_SPREAD < 0.5


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="alpha"):
        calpha_images(1, -1.0, 8, generator(0))
    with pytest.raises(ValueError, match="size"):
        disk_images(1, 3, generator(0))
    with pytest.raises(ValueError, match="one shape"):
        disk_masks(torch.ones(1), torch.ones(2), torch.ones(1), 4)
