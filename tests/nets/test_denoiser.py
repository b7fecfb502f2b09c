"""Plain denoisers."""

import pytest
import torch
from torch import nn

from contract import Case
from wellposed.nets import MLP
from wellposed.nets.convex import LPN
from wellposed.nets.denoiser import Residual, SideBySide, StackedDenoisers, residual_cnn
from wellposed.train import seeded


def test_residual_adds_its_input():
    body = nn.Linear(3, 3)
    y = torch.randn(2, 3)
    torch.testing.assert_close(Residual(body)(y) - body(y), y)


def test_cnn_is_local_and_has_the_layers_it_was_asked_for():
    """Three 3 x 3 convolutions reach three pixels far; fails if rows of pixels are transposed."""
    net = residual_cnn((1, 9, 7), 4, 3)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 3
    y = torch.zeros(2, 63)
    y[1, 4 * 7 + 3] = 1.0
    out = net(y).detach()
    changed = (out[0] != out[1]).view(9, 7).nonzero()
    assert changed.amin(0).tolist() == [1, 0]
    assert changed.amax(0).tolist() == [7, 6]
    assert residual_cnn((1, 9, 7), 5, 3)(y).shape == y.shape
    with pytest.raises(ValueError, match="num_layers must be at least 2"):
        residual_cnn((1, 4, 4), 4, 1)


def test_stacked_denoisers_are_the_networks():
    """Fails if the input is added to the wrong ones."""
    with seeded(0):
        bodies = [MLP((3, 4, 3)) for _ in range(3)]
    stack = StackedDenoisers(bodies, [True, False, True])
    y = torch.randn(3, 5, 3)
    for i, net in enumerate(stack.networks()):
        own = bodies[i](y[i]) + (y[i] if i != 1 else 0)
        torch.testing.assert_close(stack(y)[i], own)
        torch.testing.assert_close(net(y[i]), own)
    with pytest.raises(ValueError, match="residual must hold 3 values, got 1"):
        StackedDenoisers(bodies, [True])


def test_side_by_side_calls_each_on_its_rows_and_clamps():
    with seeded(0):
        nets = [LPN(2, 3, 2), Residual(nn.Linear(2, 2))]
    both, y = SideBySide(nets), torch.randn(2, 4, 2)
    for i, net in enumerate(nets):
        torch.testing.assert_close(both(y)[i], net(y[i]))
    with torch.no_grad():
        nets[0].out.fill_(-1.0)
    both.clamp_weights()
    assert nets[0].out.min() == 0
    assert both.networks() == nets
    with pytest.raises(ValueError, match=r"shape \(2, b, d\), got \(1, 4, 2\)"):
        both(y[:1])
    with pytest.raises(ValueError, match="at least one module"):
        SideBySide([])


def _made(like, make):
    with seeded(0):
        return make().to(like)


def _rows(g):
    return (torch.randn(2, 16, generator=g),)


def _stacks(g):
    return (torch.randn(2, 4, 3, generator=g),)


CASES = {
    "Residual": Case(
        inputs=_rows, call=lambda y: _made(y, lambda: Residual(nn.Linear(16, 16)))(y).detach()
    ),
    "residual_cnn": Case(
        inputs=_rows, call=lambda y: _made(y, lambda: residual_cnn((1, 4, 4), 2, 3))(y).detach()
    ),
    "StackedDenoisers": Case(
        inputs=_stacks,
        call=lambda y: _made(
            y, lambda: StackedDenoisers([MLP((3, 3)), MLP((3, 3))], [True, False])
        )(y).detach(),
    ),
    "SideBySide": Case(
        inputs=_stacks,
        call=lambda y: _made(y, lambda: SideBySide([nn.Linear(3, 3), nn.Linear(3, 3)]))(y).detach(),
    ),
}
