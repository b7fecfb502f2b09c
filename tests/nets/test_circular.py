"""Tests of wellposed.nets.circular."""

import pytest
import torch
from torch import nn

from contract import Case
from wellposed.nets.circular import CircularConv, CircularNet
from wellposed.train import seeded

SHAPE = {"widths": [3, 4], "kernel_sizes": [3, 1], "strides": [2, 1]}


def test_against_plain_layers():
    """Fails if networks are mixed, padding is not circular, or features are flattened wrongly."""
    with seeded(0):
        net, x = CircularNet(2, 2, 6, 5, **SHAPE), torch.rand(2, 4, 2, 6, 6)
    out = net(x)
    for i in range(2):
        a, b = (
            nn.Conv2d(2, 3, 3, 2, 1, bias=False, padding_mode="circular"),
            nn.Conv2d(3, 4, 1, bias=False),
        )
        for conv, layer in zip((a, b), net.convolutions()):
            conv.weight.data = layer.kernel[i].detach()
        weight = net.convolutions()[2].kernel[i].flatten(1)
        expected = b(a(x[i]).relu()).relu().flatten(1) @ weight.T
        torch.testing.assert_close(out[i], expected)
    assert net.sizes == [3, 3, 1]


def test_start_keeps_the_scale():
    """Each output has about the variance of the input's mean square; fails with Xavier's 1/out."""
    with seeded(1):
        layer, x = CircularConv(3, 8, 64, 3, 1), torch.randn(20, 24, 8, 8)
    spread = layer(x).view(20, 3, -1).std((0, 2))
    assert ((spread - 1).abs() < 0.25).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: CircularConv(1, 1, 1, 2, 1), "kernel_size must be odd"),
        (lambda: CircularNet(2, 2, 6, 5, **SHAPE)(torch.zeros(1, 3, 2, 6, 6)), "x must have shape"),
        (lambda: CircularNet(2, 2, 6, 5, **SHAPE)(torch.zeros(2, 0, 2, 6, 6)), "x must have shape"),
        (lambda: CircularConv(0, 1, 1, 3, 1), "at least 1"),
        (lambda: CircularNet(1, 1, 7, 3, **SHAPE), "stride 2"),
        (
            lambda: CircularNet(1, 1, 8, 3, widths=[2], kernel_sizes=[3, 3], strides=[1]),
            "must match",
        ),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def convolved(x):
    with seeded(0):
        return CircularConv(2, 3, 4, 3, 2).to(x)(x)


def classified(x):
    with seeded(0):
        return CircularNet(2, 2, 6, 5, **SHAPE).to(x)(x)


CASES = {
    "CircularConv": Case(inputs=lambda g: (torch.rand(3, 6, 4, 4, generator=g),), call=convolved),
    "CircularNet": Case(
        inputs=lambda g: (torch.rand(2, 3, 2, 6, 6, generator=g),), call=classified
    ),
}
