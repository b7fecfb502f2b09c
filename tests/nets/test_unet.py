"""Tests of wellposed.nets.unet."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contract import Case, sizes
from wellposed.nets.unet import BiasFreeUNet, StackedUNets, UNet
from wellposed.train import generator, seeded


def made(kind: type[UNet], like: Tensor) -> UNet:
    with seeded(0):
        return kind(3, 2).to(like)


CASES = {
    name: Case(
        inputs=lambda g: (torch.randn(sizes(g, 1)[0], 1, 4, 4, generator=g),),
        call=lambda y, kind=kind: made(kind, y)(y).detach(),
    )
    for name, kind in (("UNet", UNet), ("BiasFreeUNet", BiasFreeUNet))
} | {
    "StackedUNets": Case(
        inputs=lambda g: (torch.randn(2, sizes(g, 1)[0], 1, 4, 4, generator=g),),
        call=lambda y: StackedUNets([made(UNet, y), made(UNet, y)])(y).detach(),
    )
}


def shaken(net: UNet, seed: int) -> UNet:
    """The network in float64, with constants that are not zero."""
    g = generator(seed)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net


@pytest.mark.parametrize("biases", [True, False])
def test_three_resolutions_by_hand(biases: bool) -> None:
    """The layers written out; fails if skip and upsampled maps change places (tried)."""
    net = shaken(UNet(2, 3, 2, biases=biases), 1)
    y = torch.randn(3, 2, 8, 12, generator=generator(0), dtype=torch.float64)
    w, b = list(net.weights), list(net.biases) or [None] * 12
    conv = lambda v, i: F.conv2d(v, w[i], b[i], padding=1)  # noqa: E731
    fine = conv(conv(y, 0).relu(), 1).relu()
    middle = conv(conv(F.avg_pool2d(fine, 2), 2).relu(), 3).relu()
    coarse = conv(conv(F.avg_pool2d(middle, 2), 4).relu(), 5).relu()
    up = F.conv_transpose2d(coarse, w[6], b[6], stride=2)
    up = conv(conv(torch.cat([up, middle], 1), 7).relu(), 8).relu()
    up = F.conv_transpose2d(up, w[9], b[9], stride=2)
    out = conv(conv(torch.cat([up, fine], 1), 10).relu(), 11)
    assert len(w) == 12
    torch.testing.assert_close(net(y), y - out)


@pytest.mark.parametrize("c", [1e-3, 0.5, 40.0])
def test_without_constants_it_is_homogeneous(c: float) -> None:
    """And with constants it is not."""
    y = torch.randn(2, 1, 8, 8, generator=generator(0), dtype=torch.float64)
    net = shaken(BiasFreeUNet(4, 2), 2)
    torch.testing.assert_close(net(c * y), c * net(y))
    other = shaken(UNet(4, 2), 2)
    assert not torch.allclose(other(c * y), c * other(y))


@pytest.mark.parametrize("colors", [1, 3])
@pytest.mark.parametrize("biases", [True, False])
def test_side_by_side_is_one_by_one(colors: int, biases: bool) -> None:
    """Values and gradients, also through the sum of taps that replaces a narrow convolution."""
    nets = [shaken(UNet(3, 2, colors, biases=biases), s) for s in range(3)]
    stack = StackedUNets(nets)
    y = torch.randn(3, 2, colors, 4, 6, generator=generator(0), dtype=torch.float64)
    out = stack(y)
    for i, net in enumerate(nets):
        torch.testing.assert_close(out[i], net(y[i]))
        torch.testing.assert_close(stack.networks()[i](y[i]), out[i])
    out.square().sum().backward()
    nets[1](y[1]).square().sum().backward()
    for mine, theirs in zip(nets[1].parameters(), stack.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(theirs.grad[1], mine.grad)


def test_training_starts_near_the_identity() -> None:
    """The last layer starts small."""
    with seeded(0):
        net = BiasFreeUNet(16, 2)
    y = torch.randn(20, 1, 8, 8, generator=generator(0))
    assert (net(y) - y).norm() < 0.5 * y.norm()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="depth at least 2"):
        BiasFreeUNet(4, 1)
    with pytest.raises(ValueError, match="multiples of 4"):
        BiasFreeUNet(2, 3)(torch.zeros(1, 1, 6, 8))
    with pytest.raises(ValueError, match="at least one"):
        StackedUNets([])
    with pytest.raises(ValueError, match="same shape"):
        StackedUNets([UNet(2), UNet(3)])
    with pytest.raises(ValueError, match="2 slices"):
        StackedUNets([UNet(2), UNet(2)])(torch.zeros(1, 1, 1, 4, 4))
