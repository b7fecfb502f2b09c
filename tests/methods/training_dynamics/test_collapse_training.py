"""Tests of wellposed.methods.training_dynamics.collapse_training."""

import pytest
import torch
from torch import nn

from contract import Case
from wellposed.methods.training_dynamics.collapse_training import (
    ReLUNetworks,
    grow_layers,
    train_networks,
)

F64 = torch.float64
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _nets(x, sizes=(4, 6, 5, 3), seeds=(0, 1), copies=1):
    return ReLUNetworks(sizes, seeds=seeds, copies=copies).to(x.device, x.dtype)


def _all(hidden, out):
    return torch.cat([*hidden, out], -1)


def _trained(x, decays=None, nets=None, **settings):
    nets = _nets(x) if nets is None else nets
    if decays is None:
        decays = torch.zeros(len(nets.weights[0]), 3)
    settings = {"epochs": 4, "batch_size": 3, "generator": _generator(5)} | settings
    labels = LABELS.to(x.device)
    seen = train_networks(
        nets,
        x,
        labels,
        decays=decays,
        observe=_all,
        observe_at=[0, 2, settings["epochs"]],
        **settings,
    )
    return seen, nets


def _inputs(g):
    return (torch.randn(2, 8, 4, generator=g),)


CASES = {
    "ReLUNetworks": Case(inputs=_inputs, call=lambda x: _nets(x)(x)),
    "train_networks": Case(inputs=_inputs, call=lambda x: _trained(x)[0].observed.detach()),
    "grow_layers": Case(
        inputs=_inputs,
        call=lambda x: grow_layers(
            x,
            LABELS.to(x.device),
            width=6,
            depth=2,
            seeds=[0, 1],
            epochs=2,
            batch_size=3,
            generator=_generator(5),
        ),
    ),
}


def _x(seed=1, sets=2):
    return torch.randn(sets, 8, 4, generator=_generator(seed), dtype=F64)


def test_forward_is_that_of_modules():
    """Fails if the head gets a bias, or the ReLU is forgotten."""
    x = _x()
    nets = _nets(x)
    hidden, out = nets(x)
    for i in range(2):
        value = x[i]
        for weight, bias, seen in zip(nets.weights, nets.biases, hidden):
            layer = nn.Linear(*weight[i].shape, dtype=F64)
            layer.weight.data, layer.bias.data = weight[i].T, bias[i, 0]
            value = layer(value).relu()
            torch.testing.assert_close(seen[i], value)
        torch.testing.assert_close(out[i], value @ nets.weights[-1][i])


def test_divergence_is_told():
    with pytest.warns(RuntimeWarning, match="train_networks diverged"):
        _, networks = _trained(1e100 * _x())
    assert any(p.isnan().any() for p in networks.parameters())


def test_training_is_that_of_torch_alone():
    """torch.optim on one network, batch by batch; fails if the loss is averaged over networks,
    if a decay goes to another layer, or if the rate is not dropped."""
    x = _x()
    decays = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.5, 0.0]], dtype=F64)
    seen, nets = _trained(x, decays, lr=0.03, momentum=0.8)
    order = _generator(5)
    epochs = [torch.rand(2, 8, generator=order).argsort(1) for _ in range(4)]
    for i in range(2):
        own = _nets(x)
        layers = [own.layer(j) for j in range(3)]
        groups = [{"params": p, "weight_decay": decays[i, j].item()} for j, p in enumerate(layers)]
        sgd = torch.optim.SGD(groups, lr=0.03, momentum=0.8)
        target = nn.functional.one_hot(LABELS, 3).to(F64)
        for epoch in range(4):
            for group in sgd.param_groups:
                group["lr"] = 0.03 * (1, 1, 0.1, 0.01)[epoch]
            for batch in epochs[epoch][i].split(3):
                sgd.zero_grad()
                out = own(x[i, batch].expand(2, -1, -1))[1][i]
                ((out - target[batch]) ** 2).sum(1).mean().backward()
                sgd.step()
        for mine, other in zip(nets.weights, own.weights):
            torch.testing.assert_close(mine[i], other[i])
    assert seen.epochs == [0, 2, 4]
    assert seen.observed.shape == (3, 2, 8, 14)


def test_arms_of_a_seed_start_alike_and_see_the_same_batches():
    """Fails if copies are drawn anew: equal decays must give equal networks."""
    x = _x()
    decays = torch.tensor([[0.0] * 3, [0.0] * 3, [0.1] * 3, [0.0] * 3])
    _, nets = _trained(x, decays, _nets(x, copies=2))
    weight = nets.weights[0]
    torch.testing.assert_close(weight[0], weight[1], rtol=0, atol=0)
    assert not torch.allclose(weight[2], weight[3], rtol=1e-3)
    assert not torch.allclose(weight[0], weight[2], rtol=1e-3)


@pytest.mark.parametrize(
    "change", [{"lr": 0.01}, {"momentum": 0.1}, {"batch_size": 8}, {"epochs": 6}]
)
def test_settings_matter(change):
    """Each changes the outcome."""
    x = _x()
    base, other = (_trained(x, **s)[0].observed[-1] for s in ({}, change))
    assert not torch.allclose(base, other, rtol=1e-3)


def test_grown_layers_are_trained_one_at_a_time():
    """The first layer does not depend on the depth; fails if it is not frozen. Its features are
    those of a network with one hidden layer trained on the inputs."""
    x = _x()
    settings = {"width": 6, "seeds": [0, 1], "epochs": 3, "batch_size": 3, "decay": 0.01}
    one, three = (
        grow_layers(x, LABELS, depth=d, generator=_generator(5), **settings) for d in (1, 3)
    )
    torch.testing.assert_close(one.features[0], three.features[0])
    assert three.accuracy.shape == (3, 2)
    nets = ReLUNetworks((4, 6, 3), seeds=[0, 1]).to(F64)
    _trained(x, torch.full((2, 2), 0.01), nets, epochs=3)
    torch.testing.assert_close(one.features[0], nets(x)[0][0])
    settings["decay"] = 0.5
    other = grow_layers(x, LABELS, depth=1, generator=_generator(5), **settings)
    assert not torch.allclose(one.features[0], other.features[0], rtol=1e-3)


X = torch.zeros(1, 4, 2)
Y = torch.tensor([0, 1, 0, 1])


def _train(x=X, y=Y, decays=None, **settings):
    nets = ReLUNetworks((2, 3, 2), seeds=[0])
    decays = torch.zeros(1, 2) if decays is None else decays
    return train_networks(nets, x, y, decays=decays, **({"epochs": 1} | settings))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReLUNetworks((2, 3), seeds=[0]), "sizes must be at least three"),
        (lambda: ReLUNetworks((2, 3, 2), seeds=[]), "seeds must not be empty"),
        (lambda: _train(X[..., :1]), "inputs must be"),
        (lambda: _train(y=Y[:2]), "labels must be int64"),
        (lambda: _train(y=Y + 1), "labels must lie in"),
        (lambda: _train(decays=torch.zeros(1, 3)), "decays must have shape"),
        (lambda: _train(decays=-torch.ones(1, 2)), "weight_decay must be finite"),
        (lambda: _train(epochs=0), "epochs, batch_size and lr"),
        (lambda: grow_layers(X, Y, width=0, depth=1, seeds=[0], epochs=1), "depth and width"),
        (lambda: grow_layers(X, Y, width=1, depth=1, seeds=[0, 1], epochs=1), "seeds must be one"),
    ],
)
def test_bad_input(call, message):
    """The text names the argument."""
    with pytest.raises(ValueError, match=message):
        call()
