"""Input-convex networks and their gradients."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.nets.convex import LPN, ConvLPN, StackedLPN
from wellposed.train import seeded

F64 = torch.float64


def lpn(*args, seed=0, **kwargs):
    with seeded(seed):
        return LPN(*args, **kwargs).double()


def conv(seed=0, **kwargs):
    with seeded(seed):
        return ConvLPN((1, 8, 8), channels=3, hidden_features=5, **kwargs).double()


def points(b, d, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(b, d, generator=g, dtype=F64)


def slow_potential(net, y):
    """One example, unit by unit, from the definition."""
    net = copy.deepcopy(net).requires_grad_(False)
    h, layers = len(net.out), len(net.core) + 1
    z = None
    for layer in range(layers):
        new = []
        for i in range(h):
            row = net.skip[layer * h + i]
            a = float(net.bias[layer * h + i]) + sum(
                float(r) * float(v) for r, v in zip(row, y, strict=True)
            )
            if z is not None:
                a += sum(float(w) * v for w, v in zip(net.core[layer - 1][i], z, strict=True))
            new.append(math.log1p(math.exp(net.beta * a)) / net.beta)
        z = new
    linear = sum(float(w) * v for w, v in zip(net.out, z, strict=True))
    linear += sum(float(w) * float(v) for w, v in zip(net.out_skip, y, strict=True))
    return linear + net.alpha / 2 * sum(float(v) ** 2 for v in y)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_potential_unit_by_unit(layers):
    """Fails if alpha is not halved, or a layer sees another layer's slice of the skip matrix."""
    net = lpn(3, 4, layers, beta=3.0, alpha=0.3)
    with torch.no_grad():
        net.out_skip.copy_(points(1, 3, seed=1)[0])
    y = points(5, 3)
    expected = torch.tensor([slow_potential(net, row) for row in y], dtype=F64)
    torch.testing.assert_close(net.potential(y), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_forward_is_the_gradient_by_autograd(layers):
    """Fails if one slope is missing, or the layers' deltas are joined in the wrong order."""
    net = lpn(3, 5, layers, alpha=0.2)
    y = points(6, 3, scale=2.0).requires_grad_()
    (gradient,) = torch.autograd.grad(net.potential(y).sum(), y)
    torch.testing.assert_close(net(y), gradient, atol=1e-12, rtol=0)


def test_conv_forward_is_the_gradient_by_differences():
    net, y = conv(alpha=0.1), points(1, 64)
    f, step = net(y), 1e-5
    for k in (0, 9, 63):
        shift = torch.zeros_like(y)
        shift[0, k] = step
        slope = (net.potential(y + shift) - net.potential(y - shift)) / (2 * step)
        assert f[0, k].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("make", [lambda: lpn(64, 6, 3, alpha=0.05), lambda: conv(alpha=0.05)])
def test_clamped_networks_are_convex_and_others_need_not_be(make):
    """Weights are pushed below zero first; fails if any of them is left out of the clamp."""
    net, y = make(), points(40, 64, scale=3.0)
    a, b = y[:20], y[20:]

    def gap():
        return ((net.potential(a) + net.potential(b)) / 2 - net.potential((a + b) / 2)).detach()

    strong = 0.05 / 8 * (a - b).square().sum(1)
    assert (gap() >= strong - 1e-9).all()
    cores = [*net.core, net.out] if isinstance(net, LPN) else [m.weight for m in net.core]
    for weight in cores:
        before = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(-5 * before.abs())
        broken = gap()
        net.clamp_weights()
        assert (gap() >= strong - 1e-9).all()
        assert weight.min() >= 0
        assert broken.isfinite().all()
        with torch.no_grad():
            weight.copy_(before)
    with torch.no_grad():
        cores[-1].copy_(-5 * cores[-1].abs() - 1)
    assert (gap() < strong - 1e-6).any()


@pytest.mark.parametrize("net", [lpn(4, 5, 2), conv()])
def test_training_differentiates_twice(net):
    """The gradient's derivative by the weights; fails without create_graph."""
    y = points(2, 4 if isinstance(net, LPN) else 64)
    net(y).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in net.named_parameters()
        if p.requires_grad and "bias" not in name
    )
    with torch.no_grad():
        assert not net(y).requires_grad


def test_gradcheck_through_the_gradient():
    net = lpn(2, 3, 2, beta=2.0)
    y = points(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(net, (y,))
    small = conv(beta=2.0)
    assert torch.autograd.gradcheck(small.potential, (points(1, 64).requires_grad_(),))


def test_stacked_networks_are_the_networks():
    """Fails if biases of the stack broadcast over networks instead of rows."""
    nets = [lpn(3, 4, 2, alpha=0.1, seed=s) for s in range(3)]
    stack, y = StackedLPN(nets), points(6, 3).view(3, 2, 3)
    for i, (net, back) in enumerate(zip(nets, stack.networks(), strict=True)):
        torch.testing.assert_close(stack(y)[i], net(y[i]))
        torch.testing.assert_close(stack.potential(y)[i], net.potential(y[i]))
        torch.testing.assert_close(back(y[i]), net(y[i]), atol=0, rtol=0)
    with torch.no_grad():
        stack.core[0].sub_(1.0)
        nets[0].out.add_(9.0)
    stack.clamp_weights()
    assert stack.core[0].min() == 0
    assert stack.out.max() < 9


@pytest.mark.parametrize(
    "change",
    [{"hidden_features": 5}, {"num_layers": 3}, {"beta": 4.0}, {"alpha": 0.5}],
)
def test_each_knob_matters(change):
    base = {"hidden_features": 4, "num_layers": 2, "beta": 10.0, "alpha": 0.0}
    y = points(2, 3)
    assert not torch.allclose(lpn(3, **base)(y), lpn(3, **(base | change))(y))


@pytest.mark.parametrize(
    ("shape", "change"),
    [((1, 8, 8), {"alpha": 1.0}), ((1, 8, 8), {"beta": 1.0}), ((1, 8, 8), {"channels": 2})],
)
def test_each_knob_of_the_convolutional_network_matters(shape, change):
    base = {"channels": 3, "hidden_features": 4}
    nets = []
    for options in (base, base | change, base | {"hidden_features": 5}):
        with seeded(0):
            nets.append(ConvLPN(shape, **options))
    outs = [net(torch.ones(1, 64)) for net in nets]
    assert not torch.allclose(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


def test_bad_input_is_refused():
    for args in ((0,), (3, 0), (3, 4, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got"):
            LPN(*args)
    for make in (lambda **k: LPN(3, **k), lambda **k: ConvLPN((1, 8, 8), 2, **k)):
        with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
            make(beta=0.0)
        with pytest.raises(ValueError, match="alpha must be finite and at least 0, got -1"):
            make(alpha=-1.0)
    with pytest.raises(ValueError, match=r"shape \(b, 3\), got \(3,\)"):
        LPN(3)(torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(b, 3\), got \(2, 4\)"):
        LPN(3).potential(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"shape \(s, b, 3\), got \(2, 3\)"):
        StackedLPN([LPN(3)])(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="all of one shape"):
        StackedLPN([LPN(3), LPN(4)])
    with pytest.raises(ValueError, match="at least one LPN"):
        StackedLPN([])
    with pytest.raises(ValueError, match="sides that 4 divides"):
        ConvLPN((1, 6, 8))
    with pytest.raises(ValueError, match=r"shape \(b, 64\), got \(2, 63\)"):
        ConvLPN((1, 8, 8), 2)(torch.zeros(2, 63))


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 5),
    h=st.integers(1, 6),
    layers=st.integers(1, 4),
    beta=st.floats(0.1, 200.0),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 9),
)
def test_every_network_is_monotone_and_finite(d, h, layers, beta, scale, seed):
    """A gradient of a convex function is monotone, and large inputs overflow nothing."""
    net = lpn(d, h, layers, beta=beta, seed=seed)
    y = points(6, d, seed=seed, scale=scale)
    f = net(y).detach()
    assert f.isfinite().all()
    assert net.potential(y).isfinite().all()
    for i, j in itertools.combinations(range(6), 2):
        assert ((f[i] - f[j]) @ (y[i] - y[j])).item() >= -1e-9 * (1 + scale)


def _made(like, make):
    with seeded(0):
        return make().to(like)


CASES = {
    "LPN": Case(
        inputs=lambda g: (torch.randn(4, 3, generator=g),),
        call=lambda y: _made(y, lambda: LPN(3, 4, 2, alpha=0.1))(y).detach(),
    ),
    "StackedLPN": Case(
        inputs=lambda g: (torch.randn(2, 4, 3, generator=g),),
        call=lambda y: _made(y, lambda: StackedLPN([LPN(3, 4), LPN(3, 4)]))(y).detach(),
    ),
    "ConvLPN": Case(
        inputs=lambda g: (torch.randn(2, 16, generator=g),),
        call=lambda y: _made(y, lambda: ConvLPN((1, 4, 4), 2, 3))(y).detach(),
    ),
}
