"""Tests of wellposed.nets.MLP."""

import pytest
import torch
from torch import nn

from contract import Case, sizes
from wellposed.nets import MLP
from wellposed.train import seeded


def test_it_computes_what_its_layers_say() -> None:
    """Against the same network written out; fails if an activation follows the last layer."""
    with seeded(0):
        net = MLP((6, 5, 4, 3)).double()
        x = 3 * torch.randn(7, 2, 3, dtype=torch.float64)
    layers = [m for m in net if isinstance(m, nn.Linear)]
    hidden = x.reshape(7, 6)
    for layer in layers[:-1]:
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(net(x), hidden @ layers[-1].weight.T + layers[-1].bias)
    assert (net(x) < 0).any(), "no activation after the last layer"


def test_without_bias_it_is_homogeneous() -> None:
    net = MLP((4, 8, 8, 2), bias=False).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(net(3 * x), 3 * net(x))
    assert all(p.ndim == 2 for p in net.parameters())


def test_the_activation_can_be_chosen() -> None:
    net = MLP((3, 4, 2), activation=nn.Tanh)
    assert sum(isinstance(m, nn.Tanh) for m in net) == 1
    assert not any(isinstance(m, nn.ReLU) for m in net)


@pytest.mark.parametrize("sizes", [(3,), (3, 0, 2), ()])
def test_bad_sizes_are_named(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sizes must be at least two positive widths"):
        MLP(sizes)


def _mlp(x):
    with seeded(0):
        return MLP((x.shape[1], 4, 3)).to(x)(x)


CASES = {"MLP": Case(lambda g: (torch.randn(*sizes(g, 2), generator=g),), _mlp)}
