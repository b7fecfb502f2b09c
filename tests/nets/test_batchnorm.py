"""Batch normalization whose statistics are taken again."""

import copy

import pytest
import torch
from torch import nn

from contract import Case
from wellposed.nets import Stacked
from wellposed.nets.batchnorm import recalibrate_batchnorm, recalibrate_batchnorm_
from wellposed.train import seeded


def network():
    with seeded(0):
        sizes = ((4, 6), (6, 6))
        layers = [[nn.Linear(*s), nn.BatchNorm1d(s[1]), nn.ReLU()] for s in sizes]
        return nn.Sequential(*layers[0], *layers[1]).double()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def _on(module, x):
    return module.to(x.device, x.dtype)


def _images(g):
    return (torch.randn(10, 4, generator=g),)


def test_recalibration_standardizes_every_layer():
    """Fails if the old running statistics leak in, or if the module itself is changed."""
    net, x = network(), 5 + 3 * randn(50, 4)
    before = copy.deepcopy(net.state_dict())
    ready = recalibrate_batchnorm(net, x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    z = x
    for layer in ready:
        if isinstance(layer, nn.BatchNorm1d):
            torch.testing.assert_close(layer.running_mean, z.mean(0))
            torch.testing.assert_close(layer.running_var, z.var(0))
            assert layer.momentum == 0.1
            z = (z - z.mean(0)) / (z.var(0, correction=0) + layer.eps).sqrt()
        else:
            z = layer(z)
    assert not ready.training
    with pytest.raises(ValueError, match="at least two examples"):
        recalibrate_batchnorm(net, x[:1])


def test_in_place_and_side_by_side():
    """Fails if networks share statistics, or if the outputs are not those of the batch itself."""
    a, b = network(), network()
    with torch.no_grad():
        b[0].weight.mul_(3.0)
    x = torch.stack([5 + 3 * randn(50, 4), randn(50, 4, seed=1)])
    stack = Stacked([a, b])
    out = recalibrate_batchnorm_(stack, x)
    for net, own, inputs, ours in zip((a, b), stack.networks(), x, out):
        torch.testing.assert_close(ours, copy.deepcopy(net).train()(inputs))
        torch.testing.assert_close(own(inputs), recalibrate_batchnorm(net, inputs)(inputs))
    assert not stack.training


CASES = {
    "recalibrate_batchnorm": Case(
        inputs=_images, call=lambda x: recalibrate_batchnorm(_on(network(), x), x)(x)
    ),
    "recalibrate_batchnorm_": Case(
        inputs=_images, call=lambda x: recalibrate_batchnorm_(_on(network(), x), x)
    ),
}
