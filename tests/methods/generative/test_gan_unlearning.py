"""Tests of wellposed.methods.generative.gan_unlearning."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from contract import Case
from wellposed.methods.generative import gan_unlearning as paper
from wellposed.methods.generative.gan_unlearning import (
    GanSettings,
    Repulsion,
    adapt,
    diagonal_fisher,
    ewc_penalty,
    extrapolate,
    flat,
    parameter_distance,
    percentage_unlearned,
    repulsion_loss,
    stages,
    unlearn,
)
from wellposed.nets.gan import conv_pair, mlp_pair
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(seed=0, dtype=torch.float64):
    with seeded(seed):
        return [net.to(dtype) for net in mlp_pair(2, 4, widths=(5,))]


def some(seed=0, dtype=torch.float64):
    g = gen(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in ((3, 2), (4,))]


IMAGES = torch.rand(20, 4, generator=gen(8), dtype=torch.float64) * 2 - 1
ONE = GanSettings(steps=1, batch_size=5, lr=0.01, ema_decay=0.0)


# --- parameter space ---------------------------------------------------------------------------


def test_distance_and_losses_by_loops():
    """Explicit loops; fails with a mean over entries, or a sum over anchors."""
    params, anchors = some(0), [some(1), some(2), some(3)]
    total = 0.0
    for anchor in anchors:
        for p, a in zip(params, anchor):
            for u, v in zip(p.flatten().tolist(), a.flatten().tolist()):
                total += (u - v) ** 2
    d = total / 3
    assert parameter_distance(params, anchors).item() == pytest.approx(d)
    assert repulsion_loss(params, anchors, "il2").item() == pytest.approx(1 / d)
    assert repulsion_loss(params, anchors, "nl2").item() == pytest.approx(-d)
    assert repulsion_loss(params, anchors, "el2", 0.1).item() == pytest.approx(math.exp(-0.1 * d))
    assert repulsion_loss(params, anchors, "el2", 0.2).item() == pytest.approx(math.exp(-0.2 * d))


@pytest.mark.parametrize("kind", ["il2", "nl2", "el2"])
def test_repulsion_points_away(kind):
    """A step against the gradient gets farther; anchors get none. Fails on a flipped sign."""
    params = [p.requires_grad_() for p in some(0)]
    anchors = [[a.requires_grad_() for a in some(1)]]
    loss = repulsion_loss(params, anchors, kind, 0.1)
    slopes = torch.autograd.grad(loss, params)
    moved = [p - 1e-3 * s for p, s in zip(params, slopes)]
    assert parameter_distance(moved, anchors) > parameter_distance(params, anchors)
    repulsion_loss(params, anchors, kind, 0.1).backward()
    assert anchors[0][0].grad is None

    def call(a, b):
        return repulsion_loss([a, b], anchors, kind, 0.1)

    assert torch.autograd.gradcheck(call, params)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.floats(-3, 3), st.integers(0, 1000))
def test_extrapolation_moves_along_the_line(count, gamma, seed):
    """The distance from the anchors' mean grows by the factor |1 + gamma|; -1 is the mean."""
    params = some(seed)
    anchors = [some(seed + 1 + k) for k in range(count)]
    center = flat([torch.stack(column).mean(0) for column in zip(*anchors)])
    moved = flat(extrapolate(params, anchors, gamma))
    torch.testing.assert_close(moved - center, (1 + gamma) * (flat(params) - center))
    torch.testing.assert_close(flat(extrapolate(params, anchors, -1.0)), center)
    torch.testing.assert_close(flat(extrapolate(params, anchors, 0.0)), flat(params))


@pytest.mark.parametrize("build", [pair, lambda: conv_pair(2, 4, channels=2)])
def test_fisher_against_a_loop(build):
    """One backward pass a sample; fails if the mean gradient is squared. Both ways of computing it:
    own weights for each sample of a fully connected network, vmap for others."""
    with seeded(1):
        g, d = (net.double() for net in build())
    z = torch.randn(7, 2, generator=gen(), dtype=torch.float64)
    expected = [torch.zeros_like(p) for p in g.parameters()]
    for row in z:
        slopes = torch.autograd.grad(d(g(row[None])).sum(), list(g.parameters()))
        expected = [e + s.square() / 7 for e, s in zip(expected, slopes)]
    fisher = diagonal_fisher(g, d, z)
    for f, e in zip(fisher, expected):
        torch.testing.assert_close(f, e)
    assert all(p.grad is None for p in [*g.parameters(), *d.parameters()])
    mean = torch.autograd.grad(d(g(z)).mean(), list(g.parameters()))
    assert flat(fisher).sum() > flat(mean).square().sum()
    with torch.no_grad():
        torch.testing.assert_close(diagonal_fisher(g, d, z)[0], expected[0])


def test_ewc_is_half_a_weighted_square():
    """By a loop and by its gradient; fails without the one half."""
    params, reference = [p.requires_grad_() for p in some(0)], some(1)
    fisher = [f.square() for f in some(2)]
    loop = sum(
        f * (p - r) ** 2
        for p, r, f in zip(flat(params).tolist(), flat(reference).tolist(), flat(fisher).tolist())
    )
    loss = ewc_penalty(params, reference, fisher, 3.0)
    assert loss.item() == pytest.approx(1.5 * loop)
    slope = torch.autograd.grad(loss, params)[1]
    torch.testing.assert_close(slope, (3 * fisher[1] * (params[1] - reference[1])).detach())
    assert ewc_penalty(reference, reference, fisher, 3.0) == 0


def test_percentage():
    assert percentage_unlearned(200, 50) == 75.0
    assert percentage_unlearned(1, 2) == -100.0
    for before, after in ((0.0, 1.0), (math.inf, 1.0), (1.0, -1.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="must be"):
            percentage_unlearned(before, after)


# --- stages ------------------------------------------------------------------------------------


def first_step(g, d, images, seed, penalty):
    """Parameters of the generator after one step of torch's Adam, with a penalty by autograd."""
    rng = gen(seed)
    rows = torch.randint(2**40, (5,), generator=rng) % len(images)
    z = torch.randn(5, 2, generator=rng, dtype=images.dtype)
    real = images[rows].clone().requires_grad_()
    critic = {k: p.detach().clone().requires_grad_() for k, p in d.named_parameters()}
    scores = functional_call(d, critic, (real,))
    loss = paper.discriminator_loss(scores, functional_call(d, critic, (g(z).detach(),)))
    loss = loss + ONE.r1_every * ONE.r1_weight / 2 * paper.r1_penalty(scores.squeeze(1), real)
    loss.backward()
    torch.optim.Adam(critic.values(), lr=ONE.lr, betas=ONE.betas).step()
    params = {k: p.detach().clone().requires_grad_() for k, p in g.named_parameters()}
    images = functional_call(g, params, (z,))
    loss = paper.generator_loss(functional_call(d, critic, (images,)))
    (loss + penalty([*params.values()])).backward()
    torch.optim.Adam(params.values(), lr=ONE.lr, betas=ONE.betas).step()
    return flat([*params.values()])


@pytest.mark.parametrize("kind", ["il2", "nl2", "el2"])
def test_unlearn_agrees_with_the_repulsion_loss(kind):
    """The stacked force against autograd through the public loss in units of the start's distance;
    two networks with different numbers of anchors. Fails without the spread of the anchors."""
    g, d = pair()
    start = [p.detach() for p in g.parameters()]
    homes = [
        [[p + 0.3 * torch.randn(p.shape, generator=gen(k)) for p in start] for k in ks]
        for ks in ((1, 2, 3), (4,))
    ]
    how = Repulsion(kind, 2.0, 0.7)
    run = unlearn(
        [g, g], [d, d], [IMAGES] * 2, homes, seeds=[3, 5], repulsions=[how] * 2, settings=ONE
    )
    for k, anchors in enumerate(homes):
        unit = parameter_distance(start, anchors).item()

        def penalty(params, anchors=anchors, unit=unit):
            scale = unit**0.5
            small = [[a / scale for a in anchor] for anchor in anchors]
            return how.weight * repulsion_loss([p / scale for p in params], small, kind, how.alpha)

        expected = first_step(g, d, IMAGES, 3 + 2 * k, penalty)
        found = flat([*run.generators[k].parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            run.distance[-1, k],
            parameter_distance([*run.generators[k].parameters()], anchors).detach(),
        )


@pytest.mark.parametrize("kind", ["il2", "nl2", "el2"])
def test_the_push_far_from_the_start(kind, monkeypatch):
    """Where d is no longer its unit; fails if IL2 fades like 1/d instead of 1/d**2."""
    g, d = pair()
    start = [p.detach() for p in g.parameters()]
    anchors = [[p + 0.3 * torch.randn(p.shape, generator=gen(k)) for p in start] for k in (1, 2)]
    how, found = Repulsion(kind, 2.0, 0.7), {}
    monkeypatch.setattr(stages, "play", lambda *networks, force, **rest: found.update(force=force))
    unlearn([g], [d], [IMAGES], [anchors], seeds=[3], repulsions=[how], settings=ONE)
    theta = [(p + torch.randn(p.shape, generator=gen(9))).requires_grad_() for p in start]
    scale = parameter_distance(start, anchors).item() ** 0.5
    small = [[a / scale for a in anchor] for anchor in anchors]
    loss = how.weight * repulsion_loss([p / scale for p in theta], small, kind, how.alpha)
    slope = flat(torch.autograd.grad(loss, theta))
    torch.testing.assert_close(found["force"](flat(theta)[None])[0], slope, rtol=1e-6, atol=1e-9)


def test_adapt_agrees_with_the_ewc_penalty():
    """Two steps, because the penalty has no slope at the start; a strong spring holds, none does
    not. Fails if the Fisher diagonal is that of another network."""
    g, d = pair()
    two = GanSettings(steps=40, batch_size=5, lr=0.01, ema_decay=0.0)
    run = adapt(
        [g] * 3, [d] * 3, [IMAGES] * 3, seeds=[3] * 3, ewc_weights=[0.0, 1.0, 1e9], settings=two
    )
    assert run.distance[-1, 0] > run.distance[-1, 2]
    assert not torch.equal(run.distance[-1, 0], run.distance[-1, 1])
    fisher = diagonal_fisher(g, d, torch.randn(128, 2, generator=gen(3), dtype=torch.float64))
    moved = [
        (flat([*net.parameters()]) - flat([*g.parameters()])).square() for net in run.generators
    ]
    stiff = flat(fisher) > flat(fisher).median()
    held = [m[stiff].mean() for m in moved]
    assert held[2] < held[0] / 3
    few = adapt([g], [d], [IMAGES], seeds=[3], ewc_weights=[1.0], fisher_latents=2, settings=two)
    assert not torch.equal(few.distance[-1, 0], run.distance[-1, 1])


def test_weight_zero_is_positives_only():
    """The same as training without anchors."""
    g, d = pair()
    anchors = [[p.detach() + 1 for p in g.parameters()]]
    run = unlearn(
        [g], [d], [IMAGES], [anchors], seeds=[1], repulsions=[Repulsion(weight=0.0)], settings=ONE
    )
    plain = paper.train_gan([g], [d], [IMAGES], seeds=[1], settings=ONE)
    one, two = (flat([*r.generators[0].parameters()]) for r in (run, plain))
    assert torch.equal(one, two)


def test_bad_input():
    params, g, d = some(), *pair()
    with pytest.raises(ValueError, match="kind must be 'il2', 'nl2' or 'el2', got 'l1'"):
        repulsion_loss(params, [params], "l1")
    with pytest.raises(ValueError, match="alpha must be positive"):
        repulsion_loss(params, [params], "el2", 0.0)
    with pytest.raises(ValueError, match="at least one entry"):
        parameter_distance(params, [])
    with pytest.raises(ValueError, match="anchors must have the shapes of params"):
        parameter_distance(params, [params[:1]])
    with pytest.raises(ValueError, match="gamma must be finite"):
        extrapolate(params, [params], math.nan)
    with pytest.raises(ValueError, match="weight must be finite"):
        ewc_penalty(params, params, params, -1.0)
    with pytest.raises(ValueError, match="latents must have shape"):
        diagonal_fisher(g, d, torch.zeros(0, 2))
    with pytest.raises(ValueError, match="weight must be finite"):
        Repulsion(weight=-1.0)
    own = [p.detach() for p in g.parameters()]
    with pytest.raises(ValueError, match="differ from the generator"):
        unlearn([g], [d], [IMAGES], [[own]], seeds=[0], repulsions=[Repulsion()])
    with pytest.raises(ValueError, match="anchors and repulsions must be one a network"):
        unlearn([g], [d], [IMAGES], [[own]], seeds=[0], repulsions=[])
    with pytest.raises(ValueError, match="ewc_weights must be one number"):
        adapt([g], [d], [IMAGES], seeds=[0], ewc_weights=[-1.0])
    with pytest.raises(ValueError, match="fisher_latents must be at least 1"):
        adapt([g], [d], [IMAGES], seeds=[0], ewc_weights=[1.0], fisher_latents=0)
    with pytest.raises(ValueError, match="seeds must be one a network"):
        adapt([g], [d], [IMAGES], seeds=[], ewc_weights=[1.0])


# --- one small case a public name, for the contract sweep ------------------------------------


def _vectors(g):
    return torch.randn(4, generator=g), torch.randn(4, generator=g), torch.randn(4, generator=g)


def _penalized(x):
    v = x.detach().clone().requires_grad_()
    return paper.r1_penalty(v.square().sum(1), v)


def _staged(x, stage):
    g, d = (net.to(x.device) for net in pair(dtype=x.dtype))
    few = GanSettings(steps=2, batch_size=3)
    if stage is unlearn:
        away = [[p.detach() + 1 for p in g.parameters()]]
        run = unlearn([g], [d], [x], [away], seeds=[0], repulsions=[Repulsion()], settings=few)
    elif stage is adapt:
        run = adapt([g], [d], [x], seeds=[0], ewc_weights=[1.0], fisher_latents=3, settings=few)
    else:
        run = paper.train_gan([g], [d], [x], seeds=[0], settings=few)
    return flat([*run.generators[0].parameters()]), run.distance


def _images(g):
    return (torch.rand(6, 4, generator=g) * 2 - 1,)


def _fisher(z):
    with seeded(0):
        g, d = nn.Linear(2, 3).to(z), nn.Linear(3, 1).to(z)
    return diagonal_fisher(g, d, z)


def _argmax():
    return nn.Sequential(nn.Identity(), nn.Identity())


def _labels(x):
    return torch.arange(len(x), device=x.device) % 3


def _copied(x):
    net = nn.Linear(3, 2, bias=False).to(x)
    return paper.with_parameters(net, [x[:2]])(x)


def _fitted(x):
    return paper.fit_classifiers([x], [_labels(x)], 3, seeds=[0], width=4, steps=2)[0](x)


def _rows(g):
    return (torch.rand(6, 3, generator=g),)


CASES = {
    "score": Case(
        inputs=_rows, call=lambda x: paper.score(x[None], [_argmax()], x, _labels(x), target=2)
    ),
    "sample": Case(inputs=_rows, call=lambda x: paper.sample([nn.Identity(), nn.Identity()], x)),
    "fit_classifiers": Case(inputs=_rows, call=_fitted, on_device=False),
    "with_parameters": Case(inputs=_rows, call=_copied),
    "random_anchors": Case(
        inputs=_rows,
        call=lambda x: paper.random_anchors([x], [[x + 1]], gen()),
        on_device=False,
    ),
    "flat": Case(inputs=_images, call=lambda x: flat([x, 2 * x])),
    "play": Case(inputs=_images, call=lambda x: _staged(x, paper.play), on_device=False),
    "parameter_distance": Case(
        inputs=_vectors, call=lambda p, a, b: parameter_distance([p], [[a], [b]])
    ),
    "repulsion_loss": Case(
        inputs=_vectors,
        call=lambda p, a, b: [repulsion_loss([p], [[a], [b]], k) for k in ("il2", "nl2", "el2")],
    ),
    "diagonal_fisher": Case(inputs=lambda g: (torch.randn(5, 2, generator=g),), call=_fisher),
    "ewc_penalty": Case(
        inputs=_vectors, call=lambda p, a, b: ewc_penalty([p], [a], [b.square()], 2.0)
    ),
    "extrapolate": Case(inputs=_vectors, call=lambda p, a, b: extrapolate([p], [[a], [b]], 0.5)),
    "percentage_unlearned": Case(inputs=lambda g: (), call=lambda: percentage_unlearned(2, 1)),
    "discriminator_loss": Case(
        inputs=_vectors, call=lambda p, a, b: paper.discriminator_loss(p, a)
    ),
    "generator_loss": Case(inputs=_vectors, call=lambda p, a, b: paper.generator_loss(p)),
    "r1_penalty": Case(inputs=_images, call=_penalized),
    "train_gan": Case(inputs=_images, call=lambda x: _staged(x, None), on_device=False),
    "adapt": Case(inputs=_images, call=lambda x: _staged(x, adapt), on_device=False),
    "unlearn": Case(inputs=_images, call=lambda x: _staged(x, unlearn), on_device=False),
}
