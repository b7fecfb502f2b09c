"""Tests of wellposed.nets.gan."""

import pytest
import torch

from contract import Case
from wellposed.nets.gan import conv_pair, mlp_pair
from wellposed.train import seeded


@pytest.mark.parametrize("build", [lambda: mlp_pair(3, 64), lambda: conv_pair(3, 8, channels=2)])
def test_images_are_flat_and_bounded(build):
    """Fails without the hyperbolic tangent at the end of the generator."""
    with seeded(0):
        generator, discriminator = build()
        images = generator(100 * torch.randn(5, 3))
    assert images.shape == (5, 64)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (5, 1)


def test_sizes_count():
    """Number of weights by hand; fails if the discriminator is not reversed."""
    generator, discriminator = mlp_pair(2, 9, widths=(5, 3))
    count = [sum(p.numel() for p in net.parameters()) for net in (generator, discriminator)]
    assert count == [2 * 5 + 5 + 5 * 3 + 3 + 3 * 9 + 9, 9 * 3 + 3 + 3 * 5 + 5 + 5 + 1]
    wide, _ = conv_pair(2, 8, channels=4)
    slim, _ = conv_pair(2, 8, channels=2)
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in slim.parameters())


def test_bad_sizes():
    with pytest.raises(ValueError, match="side must be a multiple of 4, got 10"):
        conv_pair(2, 10)
    with pytest.raises(ValueError, match="pixels must be at least 1, got 0"):
        mlp_pair(2, 0)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        conv_pair(2, 8, channels=0)


def _both(pair, z):
    generator, discriminator = (net.to(z) for net in pair)
    return generator(z), discriminator(generator(z))


def _run(build, z):
    with seeded(1):
        return _both(build(), z)


CASES = {
    "mlp_pair": Case(
        inputs=lambda g: (torch.randn(4, 3, generator=g),),
        call=lambda z: _run(lambda: mlp_pair(3, 16, widths=(5,)), z),
    ),
    "conv_pair": Case(
        inputs=lambda g: (torch.randn(4, 3, generator=g),),
        call=lambda z: _run(lambda: conv_pair(3, 8, channels=2), z),
    ),
}
