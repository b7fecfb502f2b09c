"""The optimizers for networks side by side, against torch.optim on each network alone."""

import pytest
import torch

from wellposed.train import StackedAdam, StackedSGD

LRS, DECAYS = [0.1, 0.03, 0.2], [0.0, 0.1, 0.01]


def loss(w, b, target):
    """A bounded-curvature loss, summed over the leading axis where there is one."""
    return (w * target).tanh().sum() + w.square().sum() + (1 + b.square()).log().sum()


def start():
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(3, 4, 2), draw(3, 4, 1), draw(3, 4, 2)


def alone(make, factors):
    """Each network by itself with torch.optim."""
    w0, b0, target = start()
    ends = []
    for i in range(3):
        w, b = w0[i].clone().requires_grad_(), b0[i].clone().requires_grad_()
        optimizer = make([w, b], LRS[i], DECAYS[i])
        for factor in factors:
            optimizer.param_groups[0]["lr"] = LRS[i] * factor
            optimizer.zero_grad()
            loss(w, b, target[i]).backward()
            optimizer.step()
        ends.append((w.detach(), b.detach()))
    return [torch.stack(parts) for parts in zip(*ends)]


def together(make, factors):
    w, b, target = start()
    w.requires_grad_(), b.requires_grad_()
    optimizer = make([w, b])
    for factor in factors:
        loss(w, b, target).backward()
        optimizer.step(factor)
    return [w.detach(), b.detach()]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs_on_each_network(momentum, nesterov):
    """Fails if momentum, Nesterov's step or a network's own rate or decay is dropped (tried)."""
    factors = [1.0] * 5 + [0.1] * 3
    ours = together(
        lambda p: StackedSGD(p, lr=LRS, momentum=momentum, nesterov=nesterov, weight_decay=DECAYS),
        factors,
    )
    theirs = alone(
        lambda p, lr, wd: torch.optim.SGD(
            p, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=wd
        ),
        factors,
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_is_torchs_on_each_network(decoupled):
    """Fails if a bias correction or the place of the decay changes (tried)."""
    factors = [1.0] * 5 + [0.1] * 3
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    ours = together(
        lambda p: StackedAdam(p, lr=LRS, weight_decay=DECAYS, decoupled=decoupled), factors
    )
    theirs = alone(lambda p, lr, wd: kind(p, lr=lr, weight_decay=wd), factors)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_number_serves_all_networks():
    same = together(lambda p: StackedSGD(p, lr=0.1, momentum=0.5, weight_decay=0.2), [1.0] * 4)
    each = together(
        lambda p: StackedSGD(p, lr=[0.1] * 3, momentum=0.5, weight_decay=[0.2] * 3), [1.0] * 4
    )
    for a, b in zip(same, each):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_parameter_without_gradient_rests():
    w = torch.ones(2, 1, requires_grad=True)
    for optimizer in (StackedSGD([w], lr=0.1, weight_decay=1.0), StackedAdam([w])):
        optimizer.step()
    assert w.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("kind", [StackedSGD, StackedAdam])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be finite"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": [0.1, 0.2]}, "lr must be one number, or one for each network; got 2"),
        ({"lr": 0.1, "weight_decay": [0.1, -1.0, 0.0]}, "weight_decay must be finite"),
    ],
)
def test_bad_numbers_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind([torch.zeros(3, 2, requires_grad=True)], **options)


def test_other_bad_arguments_are_named():
    w = [torch.zeros(1, requires_grad=True)]
    with pytest.raises(ValueError, match="params must hold"):
        StackedSGD([], lr=0.1)
    with pytest.raises(ValueError, match="momentum must be"):
        StackedSGD(w, lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="betas must be"):
        StackedAdam(w, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="eps must be"):
        StackedAdam(w, eps=0.0)
