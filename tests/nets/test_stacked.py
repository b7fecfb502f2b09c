"""Networks side by side: each is exactly what it would be alone."""

import copy

import pytest
import torch
from torch import nn

from contract import Case, sizes
from wellposed.nets import MLP, Stacked
from wellposed.train import seeded


def networks(n=3, batch_norm=False):
    found = []
    for s in range(n):
        with seeded(s):
            middle = [nn.BatchNorm1d(4)] if batch_norm else []
            found.append(nn.Sequential(nn.Linear(3, 4), *middle, nn.ReLU(), nn.Linear(4, 2)))
    return [net.double() for net in found]


def inputs(n=3, b=5):
    return torch.randn(n, b, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_forward_is_each_networks_own(batch_norm):
    """Fails if the slices of x and of the parameters are paired wrongly."""
    nets, x = networks(batch_norm=batch_norm), inputs()
    out = Stacked(nets).train()(x)
    for net, z, got in zip(nets, x, out):
        torch.testing.assert_close(got, net.train()(z))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_training_is_each_networks_own(batch_norm):
    """Three steps of momentum SGD together and apart; running statistics too. Fails if the losses
    are averaged over the networks instead of summed."""
    nets, x = networks(batch_norm=batch_norm), inputs()
    stack = Stacked(nets).train()
    together = torch.optim.SGD(stack.parameters(), lr=0.1, momentum=0.9)
    alone = [copy.deepcopy(net).train() for net in nets]
    apart = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in alone]
    for _ in range(3):
        together.zero_grad()
        stack(x).square().mean(dim=(1, 2)).sum().backward()
        together.step()
        for net, optimizer, z in zip(alone, apart, x):
            optimizer.zero_grad()
            net(z).square().mean().backward()
            optimizer.step()
    for net, other in zip(alone, stack.networks()):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value)


def test_networks_are_copied_both_ways():
    nets = networks()
    stack = Stacked(nets)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for net in nets for p in net.parameters())
    out = stack.networks()
    with torch.no_grad():
        out[0][0].weight.fill_(1.0)
    assert all((p == 0).all() for p in stack.parameters())


def test_names_and_mode():
    stack = Stacked(networks(batch_norm=True))
    assert set(stack.names().values()) == {name for name, _ in stack.named_parameters()}
    assert stack.eval().template.training is False
    assert stack.train().template.training is True
    assert stack.size == 3


def test_refuses_nothing_and_mixtures():
    with pytest.raises(ValueError, match="at least one module"):
        Stacked([])
    with pytest.raises(ValueError, match="same architecture"):
        Stacked([MLP((2, 3)), MLP((2, 4))])


def _stack(x):
    with seeded(0):
        nets = [MLP((x.shape[2], 4, 3)) for _ in x] or [MLP((1, 1))]
    return Stacked(nets).to(x)(x)


CASES = {"Stacked": Case(lambda g: (torch.randn(*sizes(g, 3), generator=g),), _stack)}
