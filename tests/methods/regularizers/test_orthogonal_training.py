"""Training with and without orthogonality: penalties, constraints, networks side by side."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from contract import Case
from wellposed.methods.regularizers import orthogonal_training as ot
from wellposed.methods.regularizers.orthogonal_convolution import LOrthRegularizer, lorth_each
from wellposed.nets.circular import CircularNet
from wellposed.train import generator, minibatches, seeded

SHAPE = {"widths": [3, 4], "kernel_sizes": [5, 3], "strides": [2, 1]}


def networks(n=2, seed=0):
    with seeded(seed):
        return CircularNet(n, 1, 6, 3, **SHAPE).double()


def task(n=14):
    g = generator(1)
    x = torch.rand(n, 1, 6, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=g)


def alone(net, index):
    """One network of a stack as plain layers."""
    first, second, last = net.convolutions()
    parts = [
        nn.Conv2d(1, 3, 5, 2, 2, bias=False, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, 1, 1, bias=False, padding_mode="circular"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Unflatten(1, (36, 1, 1)),
        nn.Conv2d(36, 3, 1, bias=False),
        nn.Flatten(),
    ]
    for part, layer in ((0, first), (2, second), (6, last)):
        parts[part].weight.data = layer.kernel[index].detach().clone()
    return nn.Sequential(*parts).double()


def options(**changes):
    defaults = {
        "penalty": lorth_each,
        "weight": [0.0, 0.3],
        "epochs": 2,
        "batch_size": 4,
        "lr": 0.01,
        "generators": [generator(5), generator(6)],
    }
    return defaults | changes


def test_fit_against_plain_layers_and_torch_optim():
    """Fails if penalties are averaged over layers, mixed between networks, or the rate is flat."""
    x, y = task()
    rows = torch.stack([torch.arange(10), torch.arange(4, 14)])
    net = networks()
    plain = [alone(net, i) for i in range(2)]
    losses = ot.fit(net, x, y, rows, **options())
    for i, (model, weight) in enumerate(zip(plain, (0.0, 0.3))):
        adam = torch.optim.Adam(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / 6)
        )
        regularizer, order = LOrthRegularizer(model, weight), generator(5 + i)
        for epoch in range(2):
            total = 0.0
            for batch in minibatches(10, 4, order):
                chosen = rows[i, batch]
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
                total += len(batch) * loss.item() / 10
                adam.zero_grad()
                (loss + regularizer()).backward()
                adam.step()
                schedule.step()
            assert losses[epoch, i].item() == pytest.approx(total, rel=1e-9)
        for part, layer in zip((0, 2, 6), net.convolutions()):
            torch.testing.assert_close(layer.kernel[i], model[part].weight)


def test_every_setting_matters():
    """Fails if a setting is ignored."""
    x, y = task()
    rows = torch.arange(12).repeat(2, 1)

    def end(**changes):
        net = networks()
        ot.fit(net, x, y, rows, **options(**changes))
        return net.convolutions()[1].kernel.detach()

    base = end()
    for changes in (
        {"penalty": ot.reshape_penalty},
        {"weight": [0.0, 0.9]},
        {"epochs": 3},
        {"batch_size": 5},
        {"lr": [0.01, 0.02]},
        {"generators": [generator(5), generator(7)]},
    ):
        other = end(**changes)
        assert not torch.allclose(other[1], base[1])
    torch.testing.assert_close(end(weight=[0.0, 0.9])[0], base[0])


def test_reshape_penalty_against_the_matrix():
    """Fails for tall matrices without the transpose; the penalty is blind to overlaps."""
    for m, c in ((3, 2), (20, 2)):
        kernels = torch.randn(2, m, c, 3, 3, generator=generator(2), dtype=torch.float64)
        for kernel, value in zip(kernels, ot.reshape_penalty(kernels)):
            singular = torch.linalg.svdvals(kernel.flatten(1))
            torch.testing.assert_close(value, (singular.square() - 1).square().sum())
    kernels = torch.linalg.qr(torch.randn(18, 3, generator=generator(3), dtype=torch.float64)).Q
    kernels = kernels.T.reshape(1, 3, 2, 3, 3)
    assert ot.reshape_penalty(kernels) < 1e-20
    assert lorth_each(kernels) > 0.1
    assert torch.autograd.gradcheck(ot.reshape_penalty, kernels.requires_grad_())


def test_spectral_norm_against_torch():
    """What torch's power iteration converges to. Fails with the Frobenius norm."""
    layer = nn.Conv2d(3, 4, 3).double()
    expected = layer.weight.detach().clone()
    weight = ot.SpectralNorm()(expected.flatten(1)[None])[0].view_as(expected)
    parametrizations.spectral_norm(layer, n_power_iterations=500)
    torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-8, atol=1e-10)
    assert ot.SpectralNorm()(torch.zeros(2, 3, 4)).abs().sum() == 0


@pytest.mark.parametrize(
    "constrain",
    [
        parametrizations.orthogonal,
        lambda layer: parametrize.register_parametrization(layer, "weight", ot.SpectralNorm()),
    ],
    ids=["orthogonal", "spectral"],
)
def test_constraints_hold_during_training(constrain):
    """Fails if the constraint acts on the k x k slices of a kernel instead of the reshaped one."""
    x, y = task()
    net = ot.constrained(networks(), constrain)
    before = net.convolutions()[1].kernel.detach().clone()
    ot.fit(net, x, y, torch.arange(14).repeat(2, 1), **options(weight=[0.0, 0.0]))
    for layer in net.convolutions():
        largest = torch.linalg.svdvals(layer.kernel.flatten(2))[:, 0]
        torch.testing.assert_close(largest, torch.ones_like(largest))
    assert not torch.allclose(net.convolutions()[1].kernel, before)


def test_repeated_networks_are_copies():
    """Fails if copies share parameters or come in another order."""
    net = networks()
    copies = ot.repeated(net, 3)
    x = task()[0]
    out, expected = copies(x.expand(6, *x.shape)), net(x.expand(2, *x.shape))
    torch.testing.assert_close(out, expected.repeat(3, 1, 1))
    copies.convolutions()[0].weight.data.zero_()
    torch.testing.assert_close(net(x.expand(2, *x.shape)), expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epochs": 0}, "epochs and batch_size"),
        ({"batch_size": 0}, "epochs and batch_size"),
        ({"weight": [0.1]}, "must have one entry"),
        ({"weight": [0.1, -0.1]}, "weight must be at least 0"),
        ({"generators": [generator(0)]}, "must have one entry"),
        ({"lr": -1.0}, "lr must be"),
    ],
)
def test_bad_settings(changes, text):
    x, y = task()
    with pytest.raises(ValueError, match=text):
        ot.fit(networks(), x, y, torch.arange(14).repeat(2, 1), **options(**changes))


def test_bad_data():
    x, y = task()
    with pytest.raises(ValueError, match="y and rows must match"):
        ot.fit(networks(), x, y, torch.arange(15).repeat(2, 1), **options())
    with pytest.raises(ValueError, match="times must be"):
        ot.repeated(networks(), 0)
    with pytest.raises(ValueError, match="kernels must have shape"):
        ot.reshape_penalty(torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="parametrization"):
        ot.constrained(networks(), lambda layer: None)


def trained(x, y):
    with seeded(0):
        net = CircularNet(2, 1, 6, 3, **SHAPE).to(x)
    rows = torch.arange(len(x), device=x.device).repeat(2, 1)
    return ot.fit(net, x, y, rows, **options())


def orthogonal_output(x):
    with seeded(0):
        net = CircularNet(2, 1, 6, 3, **SHAPE).to(x)
    return ot.constrained(net, parametrizations.orthogonal)(x)


CASES = {
    "SpectralNorm": Case(
        inputs=lambda g: (torch.randn(2, 3, 5, generator=g),), call=lambda w: ot.SpectralNorm()(w)
    ),
    "constrained": Case(
        inputs=lambda g: (torch.rand(2, 4, 1, 6, 6, generator=g),), call=orthogonal_output
    ),
    "fit": Case(
        inputs=lambda g: (
            torch.rand(9, 1, 6, 6, generator=g),
            torch.randint(0, 3, (9,), generator=g),
        ),
        call=trained,
    ),
    "repeated": Case(
        inputs=lambda g: (torch.rand(4, 3, 1, 6, 6, generator=g),),
        call=lambda x: ot.repeated(networks().to(x), 2)(x),
    ),
    "reshape_penalty": Case(
        inputs=lambda g: (torch.randn(2, 3, 2, 3, 3, generator=g),), call=ot.reshape_penalty
    ),
}
