"""Noise mask: formulas against loops, the score function against calculus, each knob's effect."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Beta

from contract import Case
from wellposed.methods.regularizers import noise_mask
from wellposed.methods.regularizers.noise_mask import (
    MaskPolicy,
    blend_concentrations,
    compose_quadrants,
    fit,
    heat,
    policy_loss,
    render_mask,
    sample_cells,
    update_base,
)
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


# --- concentrations and base -----------------------------------------------------------------


def test_blend_against_loops():
    """Fails if alpha and beta swap, or if decay weighs the policy instead of the base."""
    base_a, base_b, u, v = draw(1, 3), draw(1, 3, seed=1), draw(4, 3, seed=2), draw(4, 3, seed=3)
    alpha, beta = blend_concentrations(base_a, base_b, u, v, decay=0.7)
    for i in range(4):
        for j in range(3):
            assert alpha[i, j].item() == pytest.approx(
                math.exp(0.7 * base_a[0, j].item() + 0.3 * u[i, j].item())
            )
            assert beta[i, j].item() == pytest.approx(
                math.exp(0.7 * base_b[0, j].item() + 0.3 * v[i, j].item())
            )


def test_blend_limits():
    """decay=1 ignores the policy, decay=0 ignores the base."""
    base, u = draw(1, 3), draw(4, 3, seed=1)
    assert torch.equal(blend_concentrations(base, base, u, u, 1.0)[0], base.exp().expand(4, 3))
    torch.testing.assert_close(blend_concentrations(base, base, u, u, 0.0)[1], u.exp())


def test_base_forgets_at_the_rate_of_its_momentum():
    """After k equal steps the distance is m^k; fails if the weights swap. No gradient remains."""
    base, delta = draw(1, 3), draw(5, 3, seed=1).requires_grad_()
    moved = base
    for _ in range(4):
        moved = update_base(moved, delta, momentum=0.8)
    goal = delta.detach().mean(0, keepdim=True)
    torch.testing.assert_close(moved - goal, 0.8**4 * (base - goal))
    assert not moved.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blend_concentrations(*[torch.ones(2, 3)] * 4), "base_alpha and base_beta must"),
        (
            lambda: blend_concentrations(*[torch.ones(1, 3)] * 2, *[torch.ones(4, 2)] * 2),
            "delta_alpha and delta_beta must both have shape",
        ),
        (lambda: blend_concentrations(*[torch.ones(1, 3)] * 4, decay=1.1), "decay must lie in"),
        (lambda: update_base(torch.ones(3), torch.ones(2, 3)), "base must have shape"),
        (lambda: update_base(torch.ones(1, 3), torch.ones(0, 3)), "N >= 1"),
        (lambda: update_base(torch.ones(1, 3), torch.ones(2, 2)), "base has 3 cells"),
        (lambda: update_base(torch.ones(1, 3), torch.ones(2, 3), -0.1), "momentum must lie in"),
        (lambda: render_mask(torch.ones(2, 5), (8, 8)), "J a square"),
        (lambda: render_mask(torch.ones(2, 4), (8, 8), 4, 1.0), "kernel_size must be odd"),
        (lambda: render_mask(torch.ones(2, 4), (8, 8), 17, 1.0), "kernel_size must be odd"),
        (lambda: render_mask(torch.ones(2, 4), (8, 8), 3), "go together"),
        (lambda: render_mask(torch.ones(2, 4), (8, 8), 3, 0.0), "sigma must be positive"),
        (lambda: policy_loss(torch.ones(2, 3), torch.ones(3)), "log_prob must have shape"),
        (lambda: policy_loss(torch.ones(0, 3), torch.ones(0)), "log_prob must have shape"),
        (lambda: policy_loss(torch.ones(2, 3), torch.ones(2), mode="other"), "mode must be"),
        (lambda: MaskPolicy(nn.Identity(), 0, 2), "feature_dim and grid"),
        (lambda: MaskPolicy(nn.Identity(), 2, 2, decay=2.0), "decay must lie in"),
        (lambda: MaskPolicy(nn.Identity(), 2, 2, momentum=-1.0), "momentum must lie in"),
        (lambda: warm_up(epochs=0), "epochs must be at least 1"),
        (lambda: warm_up(x=torch.ones(4, 16)), "x 4-D"),
        (
            lambda: fit(nn.Linear(1, 2), torch.ones(2, 1), torch.ones(2), optimizer=None, seed=0,
                        epochs=0),
            "epochs must be at least 1",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- rendering -------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "size"), [(2, (4, 6)), (3, (7, 5)), (4, (3, 9)), (1, (2, 2))])
def test_enlarging_against_torch(grid, size):
    """The peer is torch's own nearest-neighbor interpolation; fails if rows and columns swap."""
    cells = torch.rand(5, grid * grid, generator=gen(), dtype=torch.float64)
    peer = F.interpolate(cells.view(5, 1, grid, grid), size=size, mode="nearest")
    torch.testing.assert_close(render_mask(cells, size), peer, rtol=0, atol=0)


def test_blur_against_loops():
    """A two-dimensional Gaussian with mirrored borders; fails with zero padding."""
    cells = torch.rand(1, 9, generator=gen(), dtype=torch.float64)
    sharp, blurred = render_mask(cells, (6, 5)), render_mask(cells, (6, 5), 3, 0.8)

    def mirror(i, n):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    for r in range(6):
        for c in range(5):
            total = weight = 0.0
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    w = math.exp(-(dr * dr + dc * dc) / (2 * 0.8**2))
                    total += w * sharp[0, 0, mirror(r + dr, 6), mirror(c + dc, 5)].item()
                    weight += w
            assert blurred[0, 0, r, c].item() == pytest.approx(total / weight, rel=1e-12)


def test_blur_keeps_constants_and_depends_on_both_knobs():
    flat = torch.full((2, 4), 0.3, dtype=torch.float64)
    torch.testing.assert_close(render_mask(flat, (8, 8), 5, 2.0), flat.new_full((2, 1, 8, 8), 0.3))
    cells = torch.rand(2, 4, generator=gen())
    images = [render_mask(cells, (8, 8), k, s) for k, s in [(5, 2.0), (3, 2.0), (5, 0.5)]]
    assert not torch.allclose(images[0], images[1])
    assert not torch.allclose(images[0], images[2])
    assert render_mask(cells, (8, 8), 5, 1e-3).allclose(render_mask(cells, (8, 8)))


# --- the loss --------------------------------------------------------------------------------


def score_estimates(mode, baseline, n=40_000):
    """Per-sample gradients in log alpha for the cost sum_j w_j s_j, and the true gradient."""
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    log_a = torch.tensor([0.3, -0.2, 0.6], dtype=torch.float64).expand(n, 3).clone()
    log_a.requires_grad_()
    alpha, beta = log_a.exp(), torch.tensor([1.2, 0.8, 2.0], dtype=torch.float64).expand(n, 3)
    dist = Beta(alpha, beta)
    with seeded(3):
        cells = sample_cells(dist)
    policy_loss(dist.log_prob(cells), cells @ weights, mode, baseline).backward()
    a, b = alpha[0].detach(), beta[0]
    return n * log_a.grad, weights * a * b / (a + b) ** 2


@pytest.mark.parametrize("baseline", [True, False])
def test_reinforce_is_unbiased(baseline):
    """Within 5 standard errors of calculus; fails with the sign flipped or the sum a mean."""
    estimates, truth = score_estimates("reinforce", baseline)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - truth).abs() < 5 * error).all()
    assert (truth.abs() > 10 * error).all()  # the test can tell zero from the truth


def test_released_is_another_gradient():
    estimates, truth = score_estimates("released", True)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - truth).abs() > 20 * error).any()


def test_baseline_reduces_the_variance():
    """With a cost far from zero; fails if the baseline is added."""
    log_prob, cost = draw(50, 4).requires_grad_(), 10.0 + draw(50, seed=1)
    (with_it,) = torch.autograd.grad(policy_loss(log_prob, cost), log_prob)
    (without,) = torch.autograd.grad(policy_loss(log_prob, cost, baseline=False), log_prob)
    assert with_it.square().sum() < 0.05 * without.square().sum()


def test_reinforce_loops_and_gradients():
    """Value from loops; no gradient reaches the cost. Fails without the detach."""
    log_prob, cost = draw(5, 3).requires_grad_(), draw(5, seed=1).requires_grad_()
    loss = policy_loss(log_prob, cost)
    c, lp = cost.tolist(), log_prob.tolist()
    slow = sum((ci - sum(c) / 5) * sum(row) for ci, row in zip(c, lp)) / 5
    assert loss.item() == pytest.approx(slow)
    loss.backward()
    assert cost.grad is None
    assert torch.autograd.gradcheck(lambda z: policy_loss(z, cost.detach()), (log_prob,))


def test_released_loops_and_gradients():
    """The cost's gradient is multiplied by the mean logsumexp, whatever its sign."""
    log_prob, cost = draw(5, 3).requires_grad_(), draw(5, seed=1).requires_grad_()
    loss = policy_loss(log_prob, cost, "released")
    inner = [math.log(sum(math.exp(v) for v in row)) for row in log_prob.tolist()]
    assert loss.item() == pytest.approx(sum(inner) / 5 * sum(cost.tolist()) / 5)
    loss.backward()
    torch.testing.assert_close(cost.grad, cost.new_full((5,), sum(inner) / 25))
    assert torch.autograd.gradcheck(
        lambda z, c: policy_loss(z, c, "released"), (log_prob, cost)
    )  # fmt: skip


# --- the policy ------------------------------------------------------------------------------


def test_cells_stay_inside():
    """Fails without the clamp: such a Beta puts nearly all its mass next to 0 and 1."""
    dist = Beta(torch.full((100, 4), 1e-3), torch.full((100, 4), 1e-3))
    with seeded(0):
        cells = sample_cells(dist)
    assert cells.min() == torch.tensor(1e-6)
    assert cells.max() == torch.tensor(1 - 1e-6)
    assert dist.log_prob(cells).isfinite().all()
    assert not cells.requires_grad


def small_policy(grid=2, **knobs):
    with seeded(1):
        return MaskPolicy(nn.Flatten(), 16, grid, **knobs)


def test_base_moves_after_its_use_and_only_in_training():
    """Fails if the update comes first, or also in eval mode."""
    x, policy = draw(6, 1, 4, 4).float(), small_policy()
    before, twin = policy.base_alpha.clone(), copy.deepcopy(policy)
    dist = policy(x)
    u = twin.alpha(x.flatten(1))
    v = twin.beta(x.flatten(1))
    alpha, beta = blend_concentrations(before, twin.base_beta, u, v)
    torch.testing.assert_close(dist.concentration1, alpha)
    torch.testing.assert_close(dist.concentration0, beta)
    torch.testing.assert_close(policy.base_alpha, update_base(before, u))
    torch.testing.assert_close(policy.base_beta, update_base(twin.base_beta, v))
    after = policy.base_alpha.clone()
    policy.eval()(x)
    assert torch.equal(policy.base_alpha, after)
    assert {"base_alpha", "base_beta"} <= policy.state_dict().keys()


def test_policy_knobs():
    x = draw(6, 1, 4, 4).float()
    means = [small_policy(decay=d).eval()(x).mean for d in (0.9, 0.5, 1.0)]
    assert means[0].std(0).mean() < means[1].std(0).mean()
    assert means[2].std(0).max() == 0  # a base alone is the same for all images
    slow, fast = small_policy(momentum=0.99), small_policy(momentum=0.0)
    slow(x), fast(x)
    assert not torch.allclose(slow.base_alpha, fast.base_alpha)
    assert small_policy(grid=3)(x).mean.shape == (6, 9)


# --- training --------------------------------------------------------------------------------


def warm_up(x=None, lrs=(0.1, 0.1), seed=0, epochs=2, batch_size=4, **knobs):
    """A short run on images whose label hides in the first pixel."""
    if x is None:
        x = draw(16, 1, 4, 4, dtype=torch.float32)
    y = torch.arange(len(x)) % 2
    with seeded(2):
        net, policy = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), small_policy()
    start = copy.deepcopy([net.state_dict(), policy.alpha.state_dict()])
    sgd = [torch.optim.SGD(m.parameters(), lr=lr) for m, lr in zip((net, policy), lrs)]
    run = heat(
        net, policy, x, y, classifier_optimizer=sgd[0], policy_optimizer=sgd[1], seed=seed,
        epochs=epochs, batch_size=batch_size, **knobs,
    )  # fmt: skip
    end = [net.state_dict(), policy.alpha.state_dict()]
    moved = [not torch.equal(a["0.weight" if i else "1.weight"], b["0.weight" if i else "1.weight"])
             for i, (a, b) in enumerate(zip(start, end))]  # fmt: skip
    return run, moved, net


def test_heat_moves_what_its_optimizers_move():
    """lr=0 freezes one network and not the other; fails if one optimizer gets both."""
    assert warm_up()[1] == [True, True]
    assert warm_up(lrs=(0.0, 0.1))[1] == [False, True]
    assert warm_up(lrs=(0.1, 0.0))[1] == [True, False]
    unlearned = warm_up(objective=lambda log_prob, cost: cost.mean())
    assert unlearned[1] == [True, False]


def test_heat_is_reproducible_and_every_knob_counts():
    base = warm_up()[0]
    assert torch.equal(base.cost, warm_up()[0].cost)
    assert base.mean_mask.shape == (3, 4)
    assert base.spread.shape == (3,)
    changes = [
        {"seed": 1}, {"batch_size": 8}, {"kernel_size": 3, "sigma": 1.0}, {"lrs": (0.2, 0.1)},
        {"lrs": (0.1, 5.0)}, {"objective": partial(policy_loss, mode="released")},
    ]  # fmt: skip
    for change in changes:
        assert not torch.equal(warm_up(**change)[0].cost, base.cost), change
    assert len(warm_up(epochs=5)[0].cost) == 5


def test_heat_by_hand():
    """One full-batch step equals the same step written out; fails if the mask is not used."""
    x, y = torch.rand(6, 1, 4, 4, generator=gen()), torch.arange(6) % 2
    with seeded(2):
        net, policy = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), small_policy()
    twin_net, twin_policy = copy.deepcopy(net), copy.deepcopy(policy)
    sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, policy)]
    run = heat(
        net, policy, x, y, classifier_optimizer=sgd[0], policy_optimizer=sgd[1], seed=5, epochs=1,
        batch_size=6,
    )  # fmt: skip
    order = torch.randperm(6, generator=gen(5))
    with seeded(5):
        dist = twin_policy(x[order])
        cells = dist.sample().clamp(1e-6, 1 - 1e-6)
    mask = F.interpolate(cells.view(6, 1, 2, 2), size=(4, 4), mode="nearest")
    cost = F.cross_entropy(twin_net(x[order] * mask), y[order], reduction="none")
    surrogate = ((cost - cost.mean()).detach() * dist.log_prob(cells).sum(1)).mean()
    for twin, trained, loss in [(twin_net, net, cost.mean()), (twin_policy, policy, surrogate)]:
        gradients = torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True)
        for old, g, new in zip(twin.parameters(), gradients, trained.parameters()):
            torch.testing.assert_close(old - 0.1 * g, new)
    torch.testing.assert_close(run.cost[0], cost.mean().detach())
    assert torch.equal(run.spread[1], policy.eval()(x).mean.std(0).mean())


def test_reinforce_finds_the_only_pixel_that_matters():
    """A classifier reads one cell; the policy opens it. Fails if the objective's sign flips."""
    x = 0.5 + torch.rand(64, 1, 2, 2, generator=gen())
    y = torch.ones(64, dtype=torch.int64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data = torch.tensor([[0.0] * 4, [4.0, 0, 0, 0]])
    with seeded(0):
        policy = MaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(4, 16)), 16, 2)
    sgd = [
        torch.optim.SGD(m.parameters(), lr=r, momentum=0.9) for m, r in ((net, 0), (policy, 0.1))
    ]
    run = heat(
        net, policy, x, y, classifier_optimizer=sgd[0], policy_optimizer=sgd[1], seed=0, epochs=100,
        batch_size=64,
    )  # fmt: skip
    moved = run.mean_mask[-1] - run.mean_mask[0]
    assert moved[0] > 0.1
    assert moved[0] > 2 * moved[1:].abs().max()
    assert run.cost[-1] < run.cost[0]


def test_fit_by_hand_and_its_knobs():
    """One full-batch step is a plain gradient step; noise, order and sizes change the result."""
    x, y = draw(6, 3, dtype=torch.float32), torch.arange(6) % 2

    def make():
        return nn.Linear(3, 2)

    def trained(**knobs):
        with seeded(0):
            net = make()
        sgd = torch.optim.SGD(net.parameters(), lr=0.5)
        arguments = {"seed": 0, "epochs": 1, "batch_size": 6} | knobs
        return fit(net, x, y, optimizer=sgd, **arguments), net.weight.detach()

    with seeded(0):
        net = make()
    loss = F.cross_entropy(net(x), y)
    (g,) = torch.autograd.grad(loss, [net.weight])
    cost, weight = trained()
    torch.testing.assert_close(weight, net.weight.detach() - 0.5 * g)
    torch.testing.assert_close(cost[0], loss.detach())

    def noisy(x):
        return x + torch.randn_like(x)

    assert not torch.equal(trained(corrupt=noisy)[1], weight)
    assert not torch.equal(trained(corrupt=noisy)[1], trained(corrupt=noisy, seed=1)[1])
    assert torch.equal(trained(corrupt=noisy)[1], trained(corrupt=noisy)[1])
    assert not torch.equal(trained(batch_size=2)[1], trained(batch_size=2, seed=1)[1])
    assert len(trained(epochs=3)[0]) == 3


def _heat_case(x):
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).to(x)
        policy = MaskPolicy(nn.Flatten(), 16, 2).to(x)
    sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, policy)]
    y = torch.arange(len(x), device=x.device) % 2
    return heat(
        net, policy, x, y, classifier_optimizer=sgd[0], policy_optimizer=sgd[1], seed=0, epochs=1,
        batch_size=4,
    )  # fmt: skip


def _fit_case(x):
    with seeded(0):
        net = nn.Linear(3, 2).to(x)
    y = torch.arange(len(x), device=x.device) % 2
    return fit(net, x, y, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), seed=0, epochs=2)


def _policy_case(x):
    with seeded(0):
        policy = MaskPolicy(nn.Flatten(), 16, 2).to(x)
    dist = policy(x)
    return dist.concentration1, dist.concentration0, policy.base_alpha


def _sample_case(a, b):
    with seeded(0):
        return sample_cells(Beta(a, b, validate_args=False))


CASES = {
    "blend_concentrations": Case(
        lambda g: tuple(torch.randn(n, 4, generator=g) for n in (1, 1, 3, 3)),
        blend_concentrations,
    ),
    "update_base": Case(
        lambda g: (torch.randn(1, 4, generator=g), torch.randn(3, 4, generator=g)), update_base
    ),
    "render_mask": Case(
        lambda g: (torch.rand(2, 9, generator=g),), lambda c: render_mask(c, (7, 6), 3, 1.0)
    ),
    "policy_loss": Case(
        lambda g: (torch.randn(5, 4, generator=g), torch.randn(5, generator=g)), policy_loss
    ),
    # Random draws differ between devices.
    "sample_cells": Case(
        lambda g: (torch.rand(3, 4, 2, generator=g) + 0.5,),
        lambda both: _sample_case(*both.unbind(-1)),
        on_device=False,
        nan_means="both concentrations are zero: no draw is possible",
    ),
    "MaskPolicy": Case(lambda g: (torch.randn(6, 1, 4, 4, generator=g),), _policy_case),
    "compose_quadrants": Case(
        lambda g: (torch.rand(5, 1, 3, 3, generator=g), torch.arange(5)),
        lambda x, y: compose_quadrants(x, y, generator=gen()),
    ),
    "heat": Case(lambda g: (torch.rand(8, 1, 4, 4, generator=g),), _heat_case, on_device=False),
    "fit": Case(lambda g: (torch.randn(8, 3, generator=g),), _fit_case),
}


def test_module_lists_its_names():
    assert set(noise_mask.__all__) == CASES.keys() | {"HeatRun"}


def test_heating_that_diverges_says_so():
    with pytest.warns(RuntimeWarning, match="heat diverged"):
        _heat_case(1e30 * torch.rand(8, 1, 4, 4))
    with pytest.raises(ValueError, match="two images or more"):
        _heat_case(torch.rand(1, 1, 4, 4))
