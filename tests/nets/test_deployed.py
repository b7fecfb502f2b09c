"""Cases for the sweeps; the tests are in test_convnet.py, beside those of the network."""

import torch
from torch import nn

from contract import Case, sizes
from wellposed.nets.convnet import ConvNet
from wellposed.nets.deployed import Deployed, MaskPredictor, fastest_seconds
from wellposed.train import seeded


def _pictures(g):
    n, channels, side = sizes(g, 3, least=2)
    return (torch.randn(n, channels, side, side, generator=g),)


def _deployed(x):
    with seeded(0):
        net = ConvNet(x.shape[1], [4, 6], 3, strides=[2, 1]).to(x).eval()
        heads = [MaskPredictor(*pair).to(x) for pair in ((x.shape[1], 4), (4, 6))]
    fast = Deployed(list(zip(net.convs, net.norms)), net.classifier, heads)
    return fast.dense(x), fast.masked(x), fast.skipping(x)


def _predicted(x):
    with seeded(0):
        return nn.Sequential(MaskPredictor(x.shape[1], 4)).to(x)(x)


CASES = {
    "Deployed": Case(_pictures, _deployed),
    "MaskPredictor": Case(_pictures, _predicted),
    "fastest_seconds": Case(
        lambda g: (), lambda: torch.tensor(fastest_seconds([list], repeats=1)) >= 0
    ),
}


def test_cases_know_every_name():
    """The sweeps find what is missing; this file alone must say it, too."""
    assert set(CASES) == {"Deployed", "MaskPredictor", "fastest_seconds"}
