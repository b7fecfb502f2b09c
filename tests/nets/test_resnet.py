"""The small residual network: shapes, layers, and that it trains side by side."""

import pytest
import torch
from torch import nn

from contract import Case, sizes
from wellposed.nets import Stacked
from wellposed.nets.resnet import ResNet
from wellposed.train import seeded


def test_counts_its_layers():
    """Fails if a stage drops a block or a shortcut is convolved where none is needed."""
    net = ResNet(1, 10, width=4)
    kinds = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    shortcuts = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(kinds) == 13
    assert len(shortcuts) == 2
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_each_stage_halves_the_image_and_doubles_the_channels():
    net = ResNet(3, 5, width=4)
    assert net.stages(net.stem(torch.zeros(1, 3, 16, 16))).shape == (1, 16, 4, 4)


def test_side_by_side_as_alone():
    """Batch statistics, running averages and outputs are each network's own."""
    with seeded(0):
        nets = [ResNet(1, 3, width=2, blocks=(1, 1)).double() for _ in range(2)]
        x = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    stacked = Stacked(nets).train()
    together = stacked(x)
    alone = torch.stack([net.train()(part) for net, part in zip(nets, x)])
    torch.testing.assert_close(together, alone)
    for mine, other in zip(stacked.networks(), nets):
        for name, buffer in other.named_buffers():
            torch.testing.assert_close(mine.get_buffer(name), buffer)


def test_dropout_is_used_in_training_only():
    with seeded(0):
        net, x = ResNet(1, 3, width=2, blocks=(1,), dropout=0.5), torch.randn(4, 1, 8, 8)
        assert not torch.equal(net.train()(x), net(x))
        assert torch.equal(net.eval()(x), net(x))


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"blocks": ()}, {"blocks": (0,)}, {"dropout": 1.0}]
)
def test_refuses(wrong):
    with pytest.raises(ValueError, match=r"must be at least 1, dropout in \[0, 1\)"):
        ResNet(1, 10, **wrong)


def _resnet(x):
    with seeded(0):
        return ResNet(x.shape[1], 3, width=2, blocks=(1, 1)).to(x).eval()(x)


def _pictures(g):
    n, channels, side = sizes(g, 3, least=2)
    return (torch.randn(n, channels, side, side, generator=g),)


CASES = {"ResNet": Case(_pictures, _resnet)}
