"""Best-response layers, alternating training, ridge gates, and networks side by side."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from contract import Case
from wellposed.methods.optimization import self_tuning as st
from wellposed.methods.optimization.self_tuning import (
    BestResponseConv2d,
    BestResponseLinear,
    dropout,
    from_interval,
    gaussian_entropy,
    make_task,
    perturb,
    ridge_best_response,
    ridge_gates,
    ridge_response_jacobian,
    self_tune,
    to_interval,
    train_fixed,
    train_self_tuning,
)
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def linear(inputs=5, out=4, num_hyper=3, bias=True):
    with seeded(1):
        return BestResponseLinear(inputs, out, num_hyper, bias).double()


# --- hyperparameters -------------------------------------------------------------------------


def test_perturbation_has_the_right_moments():
    """Fails if sigma is the raw scale, or if one noise serves all examples."""
    hyper, raw = torch.tensor([1.0, -2.0]), torch.tensor([0.3, -1.0])
    drawn = perturb(hyper, raw, 200_000, gen())
    torch.testing.assert_close(drawn.mean(0), hyper, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(0), F.softplus(raw), atol=0.01, rtol=0)
    assert perturb(torch.zeros(4, 2), torch.zeros(4, 2), 3).shape == (4, 3, 2)
    with pytest.raises(ValueError, match="one shape"):
        perturb(hyper, raw[:1], 3)
    with pytest.raises(ValueError, match="batch_size"):
        perturb(hyper, raw, 0)


def test_perturbation_and_entropy_are_differentiable():
    hyper, raw = rand(3).requires_grad_(), rand(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, s: perturb(h, s, 4, gen()), (hyper, raw))
    assert torch.autograd.gradcheck(gaussian_entropy, (raw,))


def test_entropy_against_torch():
    """Fails if the constant or the sum is dropped."""
    raw = rand(4, 3)
    reference = torch.distributions.Normal(0.0, F.softplus(raw)).entropy().sum(-1)
    torch.testing.assert_close(gaussian_entropy(raw), reference)
    assert gaussian_entropy(raw[0]).ndim == 0


# --- layers ----------------------------------------------------------------------------------


def formed(layer, lam):
    """Weight and bias of the formula, row by row."""
    scale = [sum(v * u for v, u in zip(row, lam)) for row in layer.weight_gate]
    weight = torch.stack([w + s * r for w, s, r in zip(layer.weight, scale, layer.weight_response)])
    return weight, layer.bias + (layer.bias_gate @ lam) * layer.bias_response


def test_linear_layer_against_the_formed_weights():
    """Fails if the gates act on inputs instead of outputs, or if a bias is not gated."""
    layer, x, hyper = linear(), rand(6, 5), 30 * rand(6, 3, seed=2)
    rows = [F.linear(x[i], *formed(layer, hyper[i])) for i in range(6)]
    torch.testing.assert_close(layer(x, hyper), torch.stack(rows))
    torch.testing.assert_close(layer(x, hyper[0]), F.linear(x, *formed(layer, hyper[0])))


def test_conv_layer_against_the_formed_weights():
    with seeded(2):
        layer = BestResponseConv2d(2, 3, 3, 2, stride=2, padding=1).double()
    x, hyper = rand(4, 2, 7, 7), 30 * rand(4, 2, seed=2)
    each = [F.conv2d(x[i : i + 1], *formed(layer, hyper[i]), stride=2, padding=1) for i in range(4)]
    torch.testing.assert_close(layer(x, hyper), torch.cat(each))


@pytest.mark.parametrize("conv", [False, True])
def test_squared_norm_against_the_formed_weights(conv):
    """Fails if the cross term between both weights is dropped."""
    with seeded(3):
        layer = BestResponseConv2d(2, 3, 3, 2) if conv else BestResponseLinear(5, 4, 2)
    layer, hyper = layer.double(), 30 * rand(6, 2)
    reference = torch.stack([formed(layer, lam)[0].square().sum() for lam in hyper])
    torch.testing.assert_close(layer.squared_norm(hyper), reference)


def test_layers_at_zero_are_plain_and_start_as_the_paper_says():
    layer, x = linear(200, 100, 3), rand(6, 200)
    plain = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, torch.zeros(3).double()), plain)
    for p in (layer.weight, layer.weight_response, layer.bias, layer.bias_response):
        assert p.abs().max() <= 200**-0.5
        assert p.std().item() == pytest.approx((3 * 200) ** -0.5, rel=0.15)
    for p in (layer.weight_gate, layer.bias_gate):
        assert p.std().item() == pytest.approx(0.01, rel=0.15)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 200 * 100 + 2 * 100 + 2 * 100 * 3
    bare = linear(bias=False)
    assert {n for n, _ in bare.named_parameters()} == {"weight", "weight_response", "weight_gate"}
    assert bare(rand(2, 5), torch.ones(3).double()).shape == (2, 4)


def test_layer_gradients():
    layer = linear()
    x, hyper = rand(2, 5).requires_grad_(), rand(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, h: layer(a, h), (x, hyper))
    assert torch.autograd.gradcheck(layer.squared_norm, (hyper,))


def test_layers_refuse():
    for hyper in (torch.zeros(2), torch.zeros(4, 3), torch.zeros(6, 2)):
        with pytest.raises(ValueError, match=r"hyper must have shape \(3,\) or \(6, 3\)"):
            linear()(rand(6, 5), hyper.double())
    with pytest.raises(ValueError, match="at least 1"):
        BestResponseLinear(3, 2, 0)
    with pytest.raises(ValueError, match="at least 1"):
        BestResponseConv2d(1, 0, 3, 1)


# --- ridge -----------------------------------------------------------------------------------


def test_ridge_against_scikit_learn():
    """Fails if the gates take d instead of its square."""
    X, t = rand(12, 5), rand(12, seed=1)
    for lam in (-3.0, 0.0, 4.0):
        peer = Ridge(alpha=math.exp(lam), fit_intercept=False, tol=1e-12).fit(X.numpy(), t.numpy())
        ours = ridge_best_response(X, t, lam)
        torch.testing.assert_close(ours, torch.from_numpy(peer.coef_), rtol=1e-8, atol=1e-10)


def test_ridge_limits_and_slope():
    X, t = rand(12, 5), rand(12, seed=1)
    least = torch.linalg.lstsq(X, t.unsqueeze(-1)).solution[:, 0]
    torch.testing.assert_close(ridge_best_response(X, t, -40.0), least)
    assert ridge_best_response(X, t, 40.0).abs().max() < 1e-10
    d = torch.linalg.svdvals(X)
    torch.testing.assert_close(ridge_gates(X, 0.7), d**2 / (d**2 + math.exp(0.7)))
    lam = torch.tensor(0.7, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda v: ridge_best_response(X, t, v), lam)
    torch.testing.assert_close(ridge_response_jacobian(X, t, lam), slope)
    A = X.T @ X + math.exp(0.7) * torch.eye(5).double()
    inverse = torch.linalg.inv(A)
    direct = -math.exp(0.7) * inverse @ inverse @ X.T @ t
    torch.testing.assert_close(ridge_response_jacobian(X, t, 0.7), direct)


def test_ridge_refuses():
    with pytest.raises(ValueError, match="inputs must have shape"):
        ridge_gates(torch.zeros(3), 0.0)
    for call in (ridge_best_response, ridge_response_jacobian):
        with pytest.raises(ValueError, match="targets must have shape"):
            call(torch.eye(3), torch.zeros(2), 0.0)


# --- alternation -----------------------------------------------------------------------------


def bilevel(**options):
    """Training wants w = hyper, validation wants w = 3; the answer is 3."""
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(1, dtype=torch.float64)
    settings = {"steps": 400, "hyper_lr": 0.03, "generator": gen()} | options
    result = self_tune(
        lambda h: (w[0] + w[1] * h - h).square().mean(),
        lambda h: (w[0] + w[1] * h - 3).square().mean(),
        [w], start, **settings,
    )  # fmt: skip
    assert torch.equal(start, torch.zeros(1).double())
    return result


def test_alternation_finds_the_bilevel_optimum():
    """Fails if the validation step follows the training loss, or its sign flips."""
    result = bilevel()
    assert result.hyper.item() == pytest.approx(3.0, abs=0.1)
    assert result.hyper_history.shape == (401, 1)
    assert result.hyper_history[0] == 0
    assert torch.equal(result.hyper_history[-1], result.hyper)


def test_alternation_against_torch_optimizers():
    """A loop with torch's Adam; fails if hyperparameters collect gradients in training steps."""
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    lam = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    raw = torch.full((1,), math.log(math.expm1(0.5)), dtype=torch.float64, requires_grad=True)
    inner = torch.optim.Adam([w], lr=0.02)
    outer = torch.optim.Adam([lam, raw], lr=0.03)
    g = gen(5)

    def noisy():
        return lam + F.softplus(raw) * torch.randn(8, 1, generator=g, dtype=torch.float64)

    for i in range(20):
        for _ in range(3):
            h = noisy().detach()
            inner.zero_grad()
            (w[0] + w[1] * h - h).square().mean().backward()
            inner.step()
        for _ in range(2 if i >= 4 else 0):
            outer.zero_grad()
            loss = (w[0] + w[1] * noisy() - 3).square().mean()
            (loss - 0.05 * gaussian_entropy(raw)).backward()
            outer.step()
    result = bilevel(
        steps=20, train_steps=3, valid_steps=2, warmup_steps=4, response_lr=0.02,
        entropy_weight=0.05, batch_size=8, generator=gen(5),
    )  # fmt: skip
    torch.testing.assert_close(result.hyper, lam.detach())
    torch.testing.assert_close(result.scale, F.softplus(raw).detach())


@pytest.mark.parametrize(
    "change",
    [{"train_steps": 1}, {"valid_steps": 2}, {"warmup_steps": 5}, {"response_lr": 0.05},
     {"hyper_lr": 0.1}, {"tune_scale": False}, {"init_scale": 1.0}, {"entropy_weight": 0.5},
     {"batch_size": 8}, {"generator": gen(3)}],
)  # fmt: skip
def test_every_setting_matters(change):
    short, other = bilevel(steps=20), bilevel(**({"steps": 20} | change))
    assert not torch.equal(short.hyper_history, other.hyper_history)


def test_width_settles_where_entropy_and_curvature_balance():
    """For a loss a/2 h^2 the best width is sqrt(tau / a); fails if the entropy is punished."""
    idle = torch.zeros(1, requires_grad=True)
    result = self_tune(
        lambda h: idle.sum() * h.sum(), lambda h: h.square().mean(), [idle], torch.zeros(1),
        steps=300, hyper_lr=0.02, entropy_weight=0.08, batch_size=256, generator=gen(),
    )  # fmt: skip
    assert result.scale.item() == pytest.approx(0.2, abs=0.03)


def test_runs_side_by_side_reach_their_own_optimum():
    w = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    goal = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)

    def respond(h):
        return (w[:, :1] + w[:, 1:] * h[..., 0] - h[..., 0]).square().mean(1)

    result = self_tune(
        respond, lambda h: (w[:, :1] + w[:, 1:] * h[..., 0] - goal).square().mean(1), [w],
        torch.zeros(3, 1).double(), steps=400, hyper_lr=0.03, generator=gen(),
    )  # fmt: skip
    torch.testing.assert_close(result.hyper, goal, atol=0.1, rtol=0)


def test_alternation_refuses():
    for name in ("steps", "train_steps", "valid_steps"):
        with pytest.raises(ValueError, match="must be at least 1"):
            bilevel(**{name: 0})
    with pytest.raises(ValueError, match="init_scale must be positive"):
        bilevel(init_scale=0.0)


# --- splits, shifts -----------------------------------------------------------------


def test_shifted_images_are_windows_of_the_padded_image():
    """Fails if rows and columns are swapped or the reach is not respected."""
    images = torch.rand(2, 4, 4, generator=gen())
    padded = F.pad(images, (2,) * 4)
    rows = torch.randint(2, (5, 300), generator=gen(1))
    reach = torch.linspace(0, 1.5, 5).unsqueeze(1).expand(5, 300)
    moved = st.task._pick_shifted(padded, rows, reach, 2, gen(2))
    used = set()
    for i in range(5):
        for j in range(300):
            source = padded[rows[i, j]]
            found = [
                (a - 2, b - 2) for a in range(5) for b in range(5)
                if torch.equal(moved[i, j], source[a : a + 4, b : b + 4])
            ]  # fmt: skip
            assert found
            assert max(map(abs, found[0])) <= math.ceil(float(reach[i, j]))
            used.add((i, found[0]))
    assert {offset for i, offset in used if i == 0} == {(0, 0)}
    assert len({offset for i, offset in used if i == 4}) >= 20
    sizes = [abs(a) for i, (a, _) in used if i == 2]
    assert max(sizes) == 1


def images(n=60, side=5, seed=0, dtype=torch.float64):
    g = gen(seed)
    y = torch.randint(3, (n,), generator=g)
    x = torch.randn(n, side, side, generator=g, dtype=dtype)
    x[torch.arange(n), 1, y] += 3
    return x, y


def task(seeds=(0, 1), **options):
    x, y = images(**options)
    return make_task(x, y, num_train=20, num_valid=15, num_test=20, seeds=list(seeds))


def test_splits_are_disjoint_and_follow_their_seed():
    split = task(seeds=(4, 5, 4))
    together = torch.cat([split.train, split.valid, split.test], 1)
    assert all(len(set(row.tolist())) == 55 for row in together)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    x, y = images()
    with pytest.raises(ValueError, match="must fit 60 rows"):
        make_task(x, y, num_train=60, num_valid=1, num_test=1, seeds=[0])
    with pytest.raises(ValueError, match="x must have shape"):
        make_task(x.flatten(1), y, num_train=1, num_valid=1, num_test=1, seeds=[0])


# --- networks side by side -------------------------------------------------------------------

LIGHT = [0.01, 0.01, -4.9, 0.001]


def raw(*settings, seeds=2, dtype=torch.float64):
    values = torch.tensor(settings, dtype=dtype)
    return from_interval(values, st.LOW, st.HIGH).unsqueeze(1).expand(-1, seeds, -1)


FAST = {"seeds": [0, 1], "steps": 40, "hidden": [6], "lr": 0.05, "batch_size": 10}


def fixed(schedule, where=None, **options):
    return train_fixed(where or task(), schedule, **(FAST | options))


def tuned(start, where=None, **options):
    return train_self_tuning(where or task(), start, **(FAST | {"hyper_lr": 0.05} | options))


@pytest.mark.parametrize("channels", [[], [3]])
@pytest.mark.parametrize("best_response", [False, True])
def test_stacked_networks_compute_what_each_computes_alone(channels, best_response):
    """Fails if a convolution mixes the channels of two runs."""
    hyper = raw(LIGHT, [0.3, 0.4, -2.0, 0.1])
    nets = st.networks._Networks(
        task(), hyper, [7, 8], best_response=best_response, channels=channels, hidden=[6],
        batch_size=4, seed=0,
    )  # fmt: skip
    flat, x = hyper.flatten(0, 1), images(4, seed=3)[0]
    batch = flat.unsqueeze(1).expand(-1, 4, -1)
    together = nets.logits(x.expand(4, -1, -1, -1), batch, None)
    for run, seed in enumerate((7, 8, 7, 8)):
        with seeded(seed):
            layers = [m.double() for m in nets._layers(best_response, channels, [6])]
        out = x.unsqueeze(1) if channels else x.flatten(1)
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Linear | BestResponseLinear):
                out = out.flatten(1)
            elif isinstance(layer, nn.Conv2d | BestResponseConv2d):
                layer.stride, layer.padding = (2, 1) if best_response else ((2, 2), (1, 1))
            out = layer(out, flat[run]) if best_response else layer(out)
            out = out.relu() if i < len(layers) - 1 else out
        torch.testing.assert_close(together[run], out)


def test_training_learns_and_regularization_matters():
    run = fixed(raw(LIGHT, [0.8, 0.8, -1.2, 0.25])[None])
    assert run.valid_loss[0].mean() < 0.9 < run.valid_loss[1].mean()
    assert run.test_loss.shape == run.test_error.shape == (2, 2)
    assert run.valid_curve.shape == (10, 2, 2)
    torch.testing.assert_close(run.valid_loss, run.valid_curve.amin(0))


@pytest.mark.parametrize("which", range(4))
def test_every_hyperparameter_reaches_the_loss(which):
    other = list(LIGHT)
    other[which] = (0.5, 0.5, -1.5, 0.2)[which]
    assert not torch.equal(fixed(raw(LIGHT)[None]).test_loss, fixed(raw(other)[None]).test_loss)


def test_weight_decay_is_half_the_squared_norm():
    """Without dropout and shift, the gradient of the decay on weights is 10^v W."""
    start = raw([1e-9, 1e-9, -1.5, 1e-9])
    nets = st.networks._Networks(
        task(), start, [0, 1], best_response=False, channels=[], hidden=[6], batch_size=4, seed=0
    )
    nets.task = copy.copy(nets.task)
    batch = start.flatten(0, 1).unsqueeze(1).expand(-1, 4, -1)
    nets.generator.manual_seed(0)
    with_decay = nets.train_loss(batch)
    light = raw([1e-9, 1e-9, -4.9999999, 1e-9]).flatten(0, 1).unsqueeze(1).expand(-1, 4, -1)
    nets.generator.manual_seed(0)
    difference = with_decay - nets.train_loss(light)
    norms = sum(w[0].square().flatten(1).sum(1) for w in nets.layers)
    expected = 0.5 * (10**-1.5 - 10**-4.9999999) * norms
    torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hidden", [[], [6], [7, 5]])
def test_gradients_by_hand_are_those_of_the_loss(hidden):
    """Fails if dropout, decay or the sum over examples is missing from a gradient."""
    start = raw([0.2, 0.4, -1.5, 0.1], [0.5, 0.1, -2.0, 0.2])
    nets = st.networks._Networks(
        task(), start, [0, 1], best_response=False, channels=[], hidden=hidden, batch_size=4, seed=0
    )
    batch = start.flatten(0, 1).unsqueeze(1).expand(-1, 4, -1)
    nets.generator.manual_seed(3)
    want = torch.autograd.grad(nets.train_loss(batch).sum(), nets.parameters)
    nets.generator.manual_seed(3)
    got = nets.plain_gradients(batch)
    torch.testing.assert_close(got, list(want))


def test_schedules_are_spread_over_the_steps():
    """A constant schedule is a constant; its two halves act in turn."""
    a, b = raw(LIGHT), raw([0.5, 0.5, -2.0, 0.2])
    one, same = fixed(a[None]), fixed(a.expand(40, -1, -1, -1))
    torch.testing.assert_close(one.test_loss, same.test_loss, rtol=0, atol=0)
    turn = fixed(torch.stack([a, b]))
    assert torch.equal(turn.valid_curve[4], one.valid_curve[4])
    assert not torch.equal(turn.valid_curve[5], one.valid_curve[5])


def test_self_tuning_moves_and_frozen_does_not():
    start = raw(LIGHT, LIGHT)
    run = tuned(start, hyper_lr=[0.05, 0.0])
    assert run.hyper_history.shape == (41, 2, 2, 4)
    assert (run.hyper_history[-1, 0] - start[0]).abs().min() > 1e-4
    torch.testing.assert_close(run.hyper_history[-1, 1], start[1], rtol=0, atol=0)
    torch.testing.assert_close(run.scale[1], torch.full((2, 4), 0.5).double())


def test_zero_gates_leave_the_hyperparameters_alone(monkeypatch):
    """No response, no gradient: only the width moves. Fails if the loss sees lambda directly."""
    monkeypatch.setattr(st.layers, "GATE_STD", 0.0)
    with seeded(0):
        layer = BestResponseLinear(5, 4, 3).double()
    hyper = rand(6, 3).requires_grad_()
    (grad,) = torch.autograd.grad(layer(rand(6, 5), hyper).square().sum(), hyper)
    assert torch.equal(grad, torch.zeros(6, 3).double())


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.02}, {"train_steps": 1}, {"warmup_steps": 10}, {"init_scale": 1.0}, {"seed": 1},
     {"entropy_weight": 0.1}, {"batch_size": 8}, {"hidden": [5]}, {"channels": [2]},
     {"hyper_lr": 0.01}],
)  # fmt: skip
def test_every_setting_of_networks_matters(change):
    base, other = tuned(raw(LIGHT)), tuned(raw(LIGHT), **change)
    assert not torch.equal(base.hyper_history[-1], other.hyper_history[-1])


def test_cost_of_a_self_tuning_run():
    """Two products for one, and no weight gradients in validation: about 8/3, and the gates."""
    count = {}
    trains = {
        "plain": lambda **o: fixed(raw(LIGHT)[None], **o),
        "tuned": lambda **o: tuned(raw(LIGHT), **o),
    }
    for name, train in trains.items():
        for n in (10, 20):
            with FlopCounterMode(display=False) as counter:
                train(steps=n, evaluations=1)
            count[name, n] = counter.get_total_flops()
    ratio = (count["tuned", 20] - count["tuned", 10]) / (count["plain", 20] - count["plain", 10])
    assert 2.2 < ratio < 3.5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fixed(raw(LIGHT)), "schedule must have shape"),
        (lambda: fixed(raw(LIGHT, seeds=3)[None]), "hyperparameters must have shape"),
        (lambda: fixed(raw(LIGHT)[None], seeds=[0]), "seeds 2 numbers"),
        (lambda: fixed(raw(LIGHT)[None], steps=0), "steps and evaluations"),
        (lambda: fixed(raw(LIGHT)[None], batch_size=0), "batch_size"),
        (lambda: tuned(raw(LIGHT), steps=0), "steps and evaluations"),
        (lambda: tuned(raw(LIGHT)[0]), "hyperparameters must have shape"),
        (lambda: tuned(raw(LIGHT), hyper_lr=[0.1, 0.1]), "one for each of 1 trials"),
    ],
)
def test_training_refuses(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# --- the contract ----------------------------------------------------------------------------


def _layer_case(layer, x):
    with seeded(0):
        module = layer().to(x)
    return module(x, torch.ones(2).to(x))


def _self_tune(start):
    w = torch.zeros(2, dtype=start.dtype, device=start.device, requires_grad=True)
    return self_tune(
        lambda h: (w[0] + w[1] * h - h).square().mean(), lambda h: (h - 3).square().mean(), [w],
        start, steps=3, generator=torch.Generator(start.device).manual_seed(0),
    )  # fmt: skip


def _small(x, y):
    return make_task(x, y, num_train=6, num_valid=4, num_test=4, seeds=[0])


TINY = {"seeds": [0], "steps": 3, "hidden": [3], "batch_size": 4}


def _pictures(g):
    return torch.randn(16, 4, 4, generator=g), torch.arange(16) % 3


CASES = {
    "BestResponseLinear": Case(
        inputs=lambda g: (torch.randn(3, 4, generator=g),),
        call=lambda x: _layer_case(lambda: BestResponseLinear(4, 2, 2), x),
    ),
    "BestResponseConv2d": Case(
        inputs=lambda g: (torch.randn(3, 1, 5, 5, generator=g),),
        call=lambda x: _layer_case(lambda: BestResponseConv2d(1, 2, 3, 2), x),
    ),
    "to_interval": Case(
        inputs=lambda g: (torch.randn(3, 2, generator=g),),
        call=lambda raw: to_interval(raw, [0.0, 1.0], [1.0, 3.0]),
    ),
    "from_interval": Case(
        inputs=lambda g: (torch.rand(3, 2, generator=g),),
        call=lambda value: from_interval(value, [-0.1, -0.1], [1.1, 1.1]),
    ),
    "perturb": Case(
        inputs=lambda g: (torch.randn(2, generator=g), torch.randn(2, generator=g)),
        call=lambda h, s: perturb(h, s, 4, torch.Generator(h.device).manual_seed(0)),
        on_device=False,
    ),
    "gaussian_entropy": Case(
        inputs=lambda g: (torch.randn(3, 2, generator=g),), call=gaussian_entropy
    ),
    "dropout": Case(
        inputs=lambda g: (torch.randn(3, 2, generator=g), torch.rand(3, generator=g)),
        call=lambda x, p: dropout(x, p, True, torch.Generator(x.device).manual_seed(0)),
        on_device=False,
    ),
    "ridge_gates": Case(inputs=lambda g: (torch.randn(5, 3, generator=g), 0.5), call=ridge_gates),
    "ridge_best_response": Case(
        inputs=lambda g: (torch.randn(5, 3, generator=g), torch.randn(5, generator=g), 0.5),
        call=ridge_best_response,
    ),
    "ridge_response_jacobian": Case(
        inputs=lambda g: (torch.randn(5, 3, generator=g), torch.randn(5, generator=g), 0.5),
        call=ridge_response_jacobian,
    ),
    "self_tune": Case(
        inputs=lambda g: (torch.randn(1, generator=g),), call=_self_tune, on_device=False
    ),
    "make_task": Case(inputs=_pictures, call=_small),
    "train_fixed": Case(
        inputs=_pictures,
        call=lambda x, y: train_fixed(_small(x, y), torch.zeros(1, 2, 1, 4).to(x), **TINY),
        on_device=False,
    ),
    "train_self_tuning": Case(
        inputs=_pictures,
        call=lambda x, y: train_self_tuning(_small(x, y), torch.zeros(2, 1, 4).to(x), **TINY),
        on_device=False,
    ),
}


def test_ridge_without_any_signal():
    """Fails if a gate of zero is divided by a singular value of zero."""
    x, t = torch.zeros(3, 2), torch.ones(3)
    assert ridge_best_response(x, t, 0.0).tolist() == [0.0, 0.0]
    assert ridge_response_jacobian(x, t, 0.0).tolist() == [0.0, 0.0]


def test_training_that_diverges_says_so():
    x, y = 1e12 * torch.rand(12, 4, 4), torch.arange(12) % 3
    task = make_task(x, y, num_train=6, num_valid=3, num_test=3, seeds=[0])
    with pytest.warns(RuntimeWarning, match="training diverged"):
        run = train_fixed(task, torch.zeros(1, 1, 1, 4), seeds=[0], steps=20, lr=1e10)
    assert run.valid_curve.isnan().any()
