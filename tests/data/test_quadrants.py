"""Four images in one, of which only one belongs to the label."""

import pytest
import torch

from wellposed.data.quadrants import compose_quadrants


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def test_quadrants():
    """Top left is the image itself; fails if a distractor takes its place."""
    x, y = draw(7, 1, 3, 2), torch.arange(7)
    big, label = compose_quadrants(x, y, generator=gen())
    assert big.shape == (7, 1, 6, 4)
    assert torch.equal(big[..., :3, :2], x)
    assert label is y
    known = {tuple(v) for v in x.flatten(1).tolist()}
    for part in (big[..., :3, 2:], big[..., 3:, :2], big[..., 3:, 2:]):
        assert {tuple(v) for v in part.flatten(1).tolist()} <= known
        assert not torch.equal(part, x)
    other, _ = compose_quadrants(x, y, generator=gen(1))
    assert not torch.equal(big, other)


def test_quadrants_refuse_bad_input():
    with pytest.raises(ValueError, match="x must have shape"):
        compose_quadrants(torch.ones(3, 2), torch.ones(3), generator=gen())
    with pytest.raises(ValueError, match="and y"):
        compose_quadrants(torch.ones(3, 1, 2, 2), torch.ones(2), generator=gen())
