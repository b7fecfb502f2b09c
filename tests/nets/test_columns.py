"""The fast forward pass of networks side by side, against the plain one."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from contract import Case, sizes
from wellposed.nets import MLP, Stacked
from wellposed.nets.columns import columns, stacked_forward
from wellposed.train import seeded


def _normed():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3)
    )


class _Doubled(nn.Module):
    """A module of a method that brings its own way."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 2)

    def forward(self, x):
        return 2 * self.inner(x.flatten(1))

    def columns(self, own, x, prefix):
        return 2 * columns(self.inner, own, x, f"{prefix}inner.")


def _stack(build):
    with seeded(0):
        return Stacked([nn.Sequential(build(), nn.Identity()).double() for _ in range(3)])


BUILDS = {
    "normed": _normed,
    "mlp": lambda: MLP((6, 5, 4), activation=nn.Tanh),
    "special": lambda: nn.Sequential(_Doubled(), nn.ReLU()),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 1), nn.Flatten()),
}


@pytest.mark.parametrize("name", BUILDS)
def test_outputs_gradients_and_statistics_are_those_of_the_stack(name):
    """Fails if networks share statistics, or an unbiased variance normalizes."""
    plain, fast = _stack(BUILDS[name]), _stack(BUILDS[name])
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):  # running statistics move
        one, two = plain(x), stacked_forward(fast, x)
        torch.testing.assert_close(two, one)
    one.sin().sum().backward()
    two.sin().sum().backward()
    for p, q in zip(plain.parameters(), fast.parameters()):
        torch.testing.assert_close(q.grad, p.grad)
    for p, q in zip(plain.buffers(), fast.buffers()):
        torch.testing.assert_close(q, p)
    torch.testing.assert_close(stacked_forward(fast.eval(), x), plain.eval()(x))


def _halved():
    layer = nn.Linear(6, 2)
    return parametrize.register_parametrization(layer, "weight", _Half())


class _Half(nn.Module):
    def forward(self, v):
        return v / 2


@pytest.mark.parametrize("given", [True, False])
def test_parametrized_weights_are_given_or_the_plain_way_is_gone(given):
    """Fails if the free parameter is taken for the weight."""
    stack, x = _stack(_halved), torch.randn(3, 7, 6, dtype=torch.float64)
    free = stack.get_parameter(stack.names()["0.parametrizations.weight.original"])
    weights = {"0.weight": free / 2} if given else None
    torch.testing.assert_close(stacked_forward(stack, x, weights), stack(x))


def test_dropout_differs_from_network_to_network():
    with seeded(0):
        stack = Stacked([nn.Sequential(nn.Dropout(0.5), nn.ReLU()) for _ in range(2)])
        out = stacked_forward(stack, torch.ones(2, 30, 6))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(out[0], out[1])


def test_images_are_flattened():
    stack = _stack(_normed)
    x = torch.randn(3, 7, 1, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(stacked_forward(stack, x), stacked_forward(stack, x.flatten(2)))


def test_batch_normalization_without_statistics_goes_the_plain_way():
    def build():
        return nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2, track_running_stats=False))

    stack, x = _stack(build), torch.randn(3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(stacked_forward(stack, x), stack(x))


def _pair(x):
    with seeded(0):
        nets = [nn.Sequential(nn.Linear(x.shape[-1], 3), nn.ReLU()) for _ in range(2)]
    return Stacked(nets).to(x)


def _columns(x):
    stack = _pair(x)
    own = {name: stack.get_parameter(own) for name, own in stack.names().items()}
    return columns(stack.template, own, x.mT)


def _slices(g):
    return (torch.randn(2, *sizes(g, 2), generator=g),)


CASES = {
    "columns": Case(_slices, _columns),
    "stacked_forward": Case(_slices, lambda x: stacked_forward(_pair(x), x)),
}


def test_slices_of_other_networks_are_refused():
    with pytest.raises(ValueError, match="2 slices"):
        stacked_forward(_pair(torch.zeros(2, 3, 4)), torch.zeros(3, 3, 4))
