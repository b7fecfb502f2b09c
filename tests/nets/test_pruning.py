"""Which weights of a network survive pruning."""

import math

import pytest
import torch
from torch import nn

from contract import Case
from wellposed.nets.pruning import magnitude_mask, random_mask
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def classifier(seed=0, dtype=torch.float64):
    with seeded(seed):
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)


def _on(module, x):
    return module.to(x.device, x.dtype)


def _points(g):
    return (torch.randn(10, 2, generator=g),)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_magnitude_mask_against_sorting(sparsity):
    """Global over layers; fails if each layer is pruned for itself or biases take part."""
    net = classifier()
    with torch.no_grad():
        net[2].weight.mul_(10.0)  # hardly anything of the last layer may go
    masks = magnitude_mask(net, sparsity)
    assert set(masks) == {"0.weight", "2.weight"}
    everything = sorted(
        [*net[0].weight.abs().flatten().tolist(), *net[2].weight.abs().flatten().tolist()]
    )
    cut = math.floor(sparsity * len(everything))
    assert sum((~m).sum().item() for m in masks.values()) == cut
    for name, mask in masks.items():
        size = net.get_parameter(name).abs()
        assert (size[mask] >= everything[cut]).all()
        assert (size[~mask] < everything[cut]).all()


def test_masks_nest_and_random_masks_match_in_number():
    net = classifier()
    some, more = magnitude_mask(net, 0.5), magnitude_mask(net, 0.8)
    assert all((more[k] <= some[k]).all() for k in some)
    drawn, again = (random_mask(net, 0.5, generator=gen(s)) for s in (0, 1))
    assert all(drawn[k].sum() == some[k].sum() for k in some)
    assert any(not torch.equal(drawn[k], again[k]) for k in some)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        magnitude_mask(net, 1.0)
    with pytest.raises(ValueError, match="two axes"):
        magnitude_mask(nn.BatchNorm1d(3), 0.5)


CASES = {
    "magnitude_mask": Case(
        inputs=_points, call=lambda x: magnitude_mask(_on(classifier(), x), 0.5)
    ),
    "random_mask": Case(
        inputs=_points, call=lambda x: random_mask(_on(classifier(), x), 0.5, generator=gen())
    ),
}
