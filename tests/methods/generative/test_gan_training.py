"""Tests of wellposed.methods.generative.gan_unlearning: the game."""

import copy
import math

import pytest
import torch
from torch import nn

from wellposed.methods.generative.gan_unlearning import (
    GanSettings,
    discriminator_loss,
    flat,
    generator_loss,
    play,
    r1_penalty,
    train_gan,
)
from wellposed.nets.gan import conv_pair, mlp_pair
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(seed=0, dtype=torch.float64):
    with seeded(seed):
        return [net.to(dtype) for net in mlp_pair(2, 4, widths=(5,))]


def data(seed=0, n=20, dtype=torch.float64):
    return torch.rand(n, 4, generator=gen(seed), dtype=dtype) * 2 - 1


SHORT = GanSettings(steps=6, batch_size=5, lr=0.01, r1_every=2, checks=3)


def test_losses_by_hand():
    """From sigmoid and log; fails if real and fake are exchanged."""
    real, fake = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5]).double()
    sigmoid = lambda t: 1 / (1 + math.exp(-t))  # noqa: E731
    expected = -(math.log(sigmoid(1)) + math.log(sigmoid(-2))) / 2 - math.log(1 - sigmoid(0.5))
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert generator_loss(fake).item() == pytest.approx(-math.log(sigmoid(0.5)))


def test_r1_is_the_mean_squared_slope():
    """By one gradient an image; fails if the batch's gradient is squared."""
    _, d = pair()
    x = data(n=3).requires_grad_()
    slopes = [torch.autograd.grad(d(x[k : k + 1]).sum(), x)[0][k] for k in range(3)]
    expected = sum(s.square().sum() for s in slopes) / 3
    penalty = r1_penalty(d(x).squeeze(1), x)
    torch.testing.assert_close(penalty, expected)
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(penalty, d[1].weight))
    assert torch.autograd.gradcheck(lambda v: r1_penalty(d(v).squeeze(1), v), (x,))


def by_hand(g, d, images, settings, seed):
    """One GAN with torch's optimizer and the public losses, in the order of the paper's code."""
    g, d = copy.deepcopy(g), copy.deepcopy(d)
    average = copy.deepcopy(g)
    opts = [
        torch.optim.Adam(net.parameters(), lr=settings.lr, betas=settings.betas) for net in (g, d)
    ]
    rng = gen(seed)
    for step in range(settings.steps):
        rows = torch.randint(2**40, (settings.batch_size,), generator=rng) % len(images)
        z = torch.randn(settings.batch_size, 2, generator=rng, dtype=images.dtype)
        real = images[rows].clone().requires_grad_()
        loss = discriminator_loss(d(real), d(g(z).detach()))
        if step % settings.r1_every == 0:
            factor = settings.r1_every * settings.r1_weight / 2
            loss = loss + factor * r1_penalty(d(real).squeeze(1), real)
        opts[1].zero_grad()
        loss.backward()
        opts[1].step()
        opts[0].zero_grad()
        generator_loss(d(g(z))).backward()
        opts[0].step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), g.parameters()):
                a.mul_(settings.ema_decay).add_((1 - settings.ema_decay) * p)
    return average, d


def test_side_by_side_is_alone():
    """Two networks with different data against a plain loop each; fails if losses are averaged over
    the networks, or if the penalty is not multiplied by its interval."""
    nets = [pair(0), pair(1)]
    images = [data(0), data(1, n=9)]
    run = train_gan(*zip(*nets), images, seeds=[3, 4], settings=SHORT)
    for k, (g, d) in enumerate(nets):
        average, critic = by_hand(g, d, images[k], SHORT, 3 + k)
        torch.testing.assert_close(
            flat([*run.generators[k].parameters()]), flat([*average.parameters()])
        )
        torch.testing.assert_close(
            flat([*run.discriminators[k].parameters()]), flat([*critic.parameters()])
        )
        moved = flat([*average.parameters()]) - flat([*g.parameters()])
        torch.testing.assert_close(run.distance[-1, k], moved.square().sum())
    assert run.steps == [2, 4, 6]
    assert len(run.snapshots) == 3
    assert run.discriminator_loss.shape == (3, 2)


def test_inputs_are_not_changed_and_convolutions_work():
    with seeded(0):
        nets = conv_pair(2, 4, channels=2)
    before = [flat([*net.parameters()]) for net in nets]
    x = torch.rand(6, 16, generator=gen())
    run = train_gan([nets[0]], [nets[1]], [x], seeds=[0], settings=GanSettings(steps=2))
    for net, old in zip(nets, before):
        assert torch.equal(flat([*net.parameters()]), old)
    assert run.generators[0](torch.zeros(1, 2)).shape == (1, 16)
    assert not torch.equal(flat([*run.discriminators[0].parameters()]), before[1])


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 7},
        {"batch_size": 4},
        {"lr": 0.02},
        {"betas": (0.5, 0.99)},
        {"r1_weight": 5.0},
        {"r1_every": 3},
        {"ema_decay": 0.5},
    ],
)
def test_each_setting_matters(change):
    g, d = pair()
    one = train_gan([g], [d], [data()], seeds=[0], settings=SHORT)
    other = GanSettings(**({**SHORT.__dict__, **change}))
    two = train_gan([g], [d], [data()], seeds=[0], settings=other)
    assert not torch.equal(*(flat([*run.generators[0].parameters()]) for run in (one, two)))


def test_force_is_the_gradient_of_a_penalty():
    """Against the loss plus the penalty in one step; fails if the force is subtracted."""
    g, d = pair()
    settings = GanSettings(steps=1, batch_size=5, lr=0.01, ema_decay=0.0)
    run = play([g], [d], [data()], seeds=[0], settings=settings, force=lambda v: 1e9 + 0 * v)
    moved = flat([*run.generators[0].parameters()]) - flat([*g.parameters()])
    torch.testing.assert_close(moved, torch.full_like(moved, -0.01), rtol=1e-5, atol=0)
    anchor = [p.detach() + 1 for p in g.parameters()]
    away = play([g], [d], [data()], seeds=[0], settings=settings, anchors=[[anchor]])
    assert away.distance[-1, 0] > 0.9 * len(moved)


def test_divergence_is_said():
    """Of two networks one goes astray: the warning comes, and the NaN stands in its row alone."""
    g, d = pair()
    astray = torch.tensor([[0.0], [math.nan]], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="diverged"):
        run = play(
            [g] * 2, [d] * 2, [data()] * 2, seeds=[0, 0], settings=SHORT, force=lambda v: v * astray
        )
    for found in (run.distance, run.generator_loss):
        assert found[-1].isnan().tolist() == [False, True]


def test_bad_input():
    g, d = pair()
    with pytest.raises(ValueError, match=r"one a network, got lengths \[1, 1, 1, 2\]"):
        train_gan([g], [d], [data()], seeds=[0, 1])
    with pytest.raises(ValueError, match=r"images must be \(n, p\)"):
        train_gan([g], [d], [data()[:0]], seeds=[0])
    with pytest.raises(ValueError, match="begin with a linear layer"):
        train_gan([nn.PReLU()], [d], [data()], seeds=[0])
    with pytest.raises(ValueError, match="real_logits must not be empty"):
        discriminator_loss(torch.zeros(0), torch.zeros(1))
    with pytest.raises(ValueError, match="fake_logits must not be empty"):
        generator_loss(torch.zeros(0))
    with pytest.raises(ValueError, match="must require a gradient"):
        r1_penalty(torch.zeros(1), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="one entry an image"):
        r1_penalty(torch.zeros(2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least one tensor"):
        flat([])
    for change, message in [
        ({"steps": 0}, "steps must be at least 1"),
        ({"checks": 11, "steps": 10}, "checks must be at most steps"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"r1_weight": -1.0}, "r1_weight must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            GanSettings(**change)
