"""Nested dropout and co-teaching: formulas against slow ones, each knob against its effect."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contract import Case
from wellposed.data.label_noise import NoisyTask
from wellposed.methods.noisy_labels.nested_dropout import (
    CompressedNetworks,
    CompressedRun,
    NestedDropout,
    bias_variance,
    co_teach,
    fit_regression,
    nested_distribution,
    select_truncation,
    small_loss_indices,
    train_compressed,
    truncate,
)
from wellposed.train import generator, seeded

F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def task(n=24, seed=0, dtype=torch.float32):
    """Three blobs; the first third of the training labels is wrong."""
    g = gen(seed)
    y = torch.arange(n) % 3
    x = 2 * F.one_hot(y, 4).to(dtype) + 0.3 * torch.randn(n, 4, generator=g, dtype=dtype)
    noisy = torch.where(torch.arange(n) < n // 3, (y + 1) % 3, y)
    return NoisyTask(x, noisy, y, x[:9], noisy[:9], x, y)


def network(compress=None, seed=0, width=6, dtype=torch.float32):
    with seeded(seed):
        features = nn.Sequential(nn.Linear(4, width), nn.ReLU())
        linear = nn.Linear(width, 3, bias=False)
    return nn.Sequential(features, compress or nn.Identity(), linear).to(dtype)


BUDGET = {"epochs": 3, "batch_size": 8, "lr": 0.1, "milestones": (2,)}


# --- the distribution and the mask -----------------------------------------------------------


@pytest.mark.parametrize(("std", "mean"), [(2.0, 0.0), (10.0, 0.0), (3.0, 4.0)])
def test_distribution_against_the_formula(std, mean):
    """Fails with a factor 1/2 in the exponent, or if k counts from zero."""
    slow = [math.exp(-(((k - mean) / std) ** 2)) for k in range(1, 8)]
    p = nested_distribution(7, std, mean)
    assert p.dtype == F64
    assert p.tolist() == pytest.approx([v / sum(slow) for v in slow], rel=1e-12)


def test_distribution_limits():
    """Tiny std: all mass on the channel nearest the mean. Huge std: uniform."""
    assert nested_distribution(5, 1e-3).tolist() == [1, 0, 0, 0, 0]
    assert nested_distribution(5, 1e-3, 3.0).tolist() == [0, 0, 1, 0, 0]
    assert nested_distribution(5, 1e9).tolist() == pytest.approx([0.2] * 5)


def test_masks_follow_the_distribution_and_nothing_is_rescaled():
    """Frequencies of 20,000 cut points, four standard errors; fails if kept features are scaled."""
    layer = NestedDropout(5, 2.0, per_sample=True)
    with seeded(0):
        out = layer(torch.full((20_000, 5), 3.0))
    assert set(out.unique().tolist()) == {0.0, 3.0}
    k = (out > 0).sum(1)
    assert torch.equal(out > 0, torch.arange(5) < k[:, None])  # a prefix, never a hole
    share = torch.bincount(k, minlength=6)[1:] / 20_000
    for got, p in zip(share.tolist(), nested_distribution(5, 2.0).tolist()):
        assert got == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))


def test_one_cut_point_a_batch_by_default():
    """Fails if the default drew a cut point an example."""
    layer, x = NestedDropout(8, 4.0), torch.ones(30, 8)
    with seeded(0):
        widths = [layer(x).sum(1).unique() for _ in range(20)]
    assert all(len(w) == 1 for w in widths)
    assert len(torch.cat(widths).unique()) > 2
    with seeded(0):
        assert len(NestedDropout(8, 4.0, per_sample=True)(x).sum(1).unique()) > 2


def test_evaluation_keeps_all_or_the_first_features():
    layer, x = NestedDropout(4, 1.0).eval(), torch.ones(2, 4)
    assert torch.equal(layer(x), x)
    layer.keep = 3
    assert torch.equal(layer(x), truncate(x, 3))
    assert layer.train()(x).shape == (2, 4)


@pytest.mark.parametrize("change", [{"std": 20.0}, {"mean": 7.0}])
def test_each_knob_of_the_mask_matters(change):
    settings = {"std": 1.0, "mean": 0.0}
    a, b = NestedDropout(8, **settings), NestedDropout(8, **{**settings, **change})
    x = torch.ones(5, 8)
    with seeded(0):
        one = torch.stack([a(x) for _ in range(20)]).sum()
    with seeded(0):
        two = torch.stack([b(x) for _ in range(20)]).sum()
    assert one < two


def test_gradient_reaches_the_kept_features_only():
    x = torch.randn(3, 4, generator=gen(), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: truncate(v, 2), (x,))
    (grad,) = torch.autograd.grad(truncate(x, 2).sum(), x)
    assert grad.tolist() == [[1, 1, 0, 0]] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nested_distribution(0, 1.0), "num_features must be at least 1, got 0"),
        (lambda: nested_distribution(3, 0.0), "std must be positive, got 0.0"),
        (lambda: NestedDropout(3, math.nan), "std must be positive, got nan"),
        (lambda: NestedDropout(3, 1.0)(torch.ones(2, 4)), r"x must have shape \(B, 3\), got"),
        (lambda: truncate(torch.ones(3), 0), r"k must lie in 1..3, got 0"),
        (lambda: truncate(torch.ones(3), 4), r"k must lie in 1..3, got 4"),
    ],
)
def test_masks_refuse_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the width -------------------------------------------------------------------------------


def test_selection_against_a_loop_over_truncations():
    """All D accuracies by masking; fails if the sum runs over the wrong axis or from the end."""
    g = gen()
    h, w = torch.randn(40, 6, generator=g, dtype=F64), torch.randn(3, 6, generator=g, dtype=F64)
    labels = (truncate(h, 4) @ w.T).argmax(1)
    k, accuracies = select_truncation(h, w, labels)
    slow = [((truncate(h, j) @ w.T).argmax(1) == labels).double().mean() for j in range(1, 7)]
    torch.testing.assert_close(accuracies.double(), torch.stack(slow))
    assert k == 4


def test_of_equal_widths_the_narrowest_wins():
    """Fails if the penalty's sign flips: channels 3 to 6 are zero and change nothing."""
    h = truncate(torch.randn(20, 6, generator=gen()), 2)
    w = torch.randn(3, 6, generator=gen(1))
    assert select_truncation(h, w, (h @ w.T).argmax(1))[0] == 2


def test_penalty_trades_accuracy_for_width():
    h, w = torch.tensor([[1.0, 5.0]]), torch.eye(2)
    assert select_truncation(h, w, torch.tensor([1]), penalty=0.5)[0] == 2
    assert select_truncation(h, w, torch.tensor([1]), penalty=2.0)[0] == 1


def test_selection_refuses_bad_input():
    h, w, y = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)
    for bad in ((h[:1], w, y), (h, w[:, :2], y), (h[:0], w, y[:0])):
        with pytest.raises(ValueError, match="features, weight and labels must have shapes"):
            select_truncation(*bad)
    with pytest.raises(ValueError, match="penalty must be at least 0"):
        select_truncation(h, w, y, penalty=-1.0)


# --- small losses ----------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 10), (0.25, 7), (0.3, 7), (0.9, 1), (0.99, 1)])
def test_kept_count(rate, kept):
    """floor((1 - r) B) without rounding trouble: (1 - 0.9) * 10 is 1, not 0."""
    losses = torch.rand(10, generator=gen())
    index = small_loss_indices(losses, rate)
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(range(10), key=losses.tolist().__getitem__)[:kept]


def test_leading_axes_are_batches():
    losses = torch.rand(2, 3, 8, generator=gen())
    index = small_loss_indices(losses, 0.5)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(index[i, j], small_loss_indices(losses[i, j], 0.5))


def test_small_losses_refuse_bad_input():
    for rate in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"forget_rate must lie in \[0, 1\)"):
            small_loss_indices(torch.ones(3), rate)
    with pytest.raises(ValueError, match="losses must have shape"):
        small_loss_indices(torch.ones(0), 0.5)


# --- networks side by side -------------------------------------------------------------------


def test_networks_and_their_truncations_against_one_by_one():
    layers = [nn.Identity(), nn.Dropout(0.5), NestedDropout(6, 2.0)]
    parts = [network(layer, seed, dtype=F64) for seed, layer in enumerate(layers)]
    nets = CompressedNetworks(parts).eval()
    x = torch.randn(3, 5, 4, generator=gen(), dtype=F64)
    widths = nets.by_width(x)
    assert widths.shape == (3, 6, 5, 3)
    for i, net in enumerate(parts):
        net.eval()
        torch.testing.assert_close(nets(x)[i], net(x[i]))
        for k in range(1, 7):
            slow = truncate(net[0](x[i]), k) @ net[2].weight.T
            torch.testing.assert_close(widths[i, k - 1], slow)


def test_a_subset_computes_the_same_and_shares_nothing():
    nets = CompressedNetworks([network(NestedDropout(6, 2.0), seed=s) for s in range(3)]).eval()
    nets.compress[2].keep = 2
    some, x = nets.subset([2, 0]).eval(), torch.randn(3, 5, 4, generator=gen())
    torch.testing.assert_close(some(x[[2, 0]]), nets(x)[[2, 0]])
    with torch.no_grad():
        some.weight.zero_()
    assert nets.weight.abs().min(2).values.any()


def test_neighbors_of_one_kind_share_a_call_and_nothing_else():
    """Two dropout, two nested and a plain network: in evaluation each keeps its own width.

    In training each network of a group draws its own masks; fails if a group shared one draw.
    """
    layers = [nn.Dropout(0.5), nn.Dropout(0.5), nn.Identity()]
    layers += [NestedDropout(64, 20.0, per_sample=True) for _ in range(2)]
    nets = CompressedNetworks([network(layer, width=64) for layer in layers])
    assert [len(members) for members in nets._groups] == [2, 1, 2]
    x = torch.randn(1, 40, 4, generator=gen()).expand(5, -1, -1)
    nets.compress[3].keep, nets.compress[4].keep = 5, 60
    out = nets.eval()(x)
    for one, single in zip(out, nets.networks()):
        torch.testing.assert_close(one, single.eval()(x[0]))
    with seeded(0):
        out = nets.train()(x)
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out[3], out[4])
    torch.testing.assert_close(out[2], nets.networks()[2](x[0]))


def test_one_cut_point_a_batch_is_drawn_for_each_network():
    """Fails if networks whose cut point holds for a batch are treated as one batch."""
    layers = [NestedDropout(64, 20.0) for _ in range(3)]
    nets = CompressedNetworks([network(layer, width=64) for layer in layers])
    assert [len(members) for members in nets._groups] == [1, 1, 1]


def test_networks_of_another_form_are_refused():
    for bad in (nn.Sequential(nn.Linear(2, 2)), nn.Sequential(*[nn.Linear(2, 2)] * 3)):
        with pytest.raises(ValueError, match=r"networks must each be nn\.Sequential"):
            CompressedNetworks([bad])


def test_stage_one_is_momentum_sgd_on_each_network():
    """Against a hand-written loop, two networks of two seeds; fails if losses are averaged."""
    parts, tasks = [network(seed=s) for s in (3, 4)], [task(seed=s) for s in (3, 4)]
    nets = CompressedNetworks(parts)
    run = train_compressed(nets, tasks, seeds=[3, 4], momentum=0.5, weight_decay=0.01, **BUDGET)
    assert all(curve.shape == (2, 3) for curve in vars(run).values())
    for i, (net, t, s) in enumerate(zip(parts, tasks, (3, 4))):
        velocity = [torch.zeros_like(p) for p in net.parameters()]
        for epoch in range(3):
            order = torch.randperm(24, generator=generator(s + epoch))
            for index in order.split(8):
                loss = F.cross_entropy(net(t.x[index]), t.noisy[index])
                grads = torch.autograd.grad(loss, list(net.parameters()))
                with torch.no_grad():
                    for p, v, grad in zip(net.parameters(), velocity, grads):
                        v.mul_(0.5).add_(grad + 0.01 * p)
                        p -= (0.1 if epoch < 2 else 0.01) * v
        torch.testing.assert_close(nets.weight[i], net[2].weight)
        pred = net(t.x).argmax(1)
        wrong = t.noisy != t.clean
        assert run.memorized[i, -1] == (pred == t.noisy)[wrong].float().mean()
        assert run.correct[i, -1] == (pred == t.clean)[wrong].float().mean()
        assert run.test_accuracy[i, -1] == (pred == t.clean).float().mean()


def test_measuring_less_often_changes_no_stage_one_weight():
    """Epochs 2 and 3 of 3 are measured; the networks are the same."""
    few, all_ = CompressedNetworks([network()]), CompressedNetworks([network()])
    a = train_compressed(few, [task()], seeds=[0], measure_every=2, **BUDGET)
    b = train_compressed(all_, [task()], seeds=[0], **BUDGET)
    assert torch.equal(few.weight, all_.weight)
    assert torch.equal(a.test_accuracy, b.test_accuracy[:, 1:])
    assert _pair(measure_every=2)[1].purity.shape == (1, 2)


def test_the_measured_width_is_the_one_validation_chooses():
    """The record's ``keep`` and accuracies belong to the network that comes out."""
    nets, t = CompressedNetworks([network(NestedDropout(6, 2.0), width=6)]), task()
    run = train_compressed(nets, [t], seeds=[0], **BUDGET)
    k, accuracies = select_truncation(nets.features(t.x_val[None])[0], nets.weight[0], t.noisy_val)
    assert run.keep[0, -1] == k == nets.compress[0].keep
    assert run.val_accuracy[0, -1] == accuracies[k - 1]


def test_early_stopping_reads_validation_never_test():
    """First of the best validation epochs; fails if the test curve were used."""
    zeros = torch.zeros(1, 4)
    val, test = torch.tensor([[0.1, 0.5, 0.5, 0.2]]), torch.tensor([[0.6, 0.25, 0.75, 0.9]])
    assert CompressedRun(zeros, zeros, val, test, zeros).early_stopped.tolist() == [0.25]


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 2},
        {"batch_size": 5},
        {"lr": 0.2},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"milestones": ()},
        {"seeds": [1]},
    ],
)
def test_each_knob_of_stage_one_matters(change):
    def weights(**settings):
        nets = CompressedNetworks([network()])
        train_compressed(nets, [task()], **{"seeds": [0], **BUDGET, **settings})
        return nets.weight

    assert not torch.equal(weights(), weights(**change))


def test_compression_memorizes_less():
    """The method's effect on a toy problem; fails if the mask is applied in evaluation only."""
    t = task(60)
    spread = torch.randn(60, 60, generator=gen(1))  # coordinates to memorize by
    t = replace(
        t,
        **{
            name: torch.cat([getattr(t, name), spread[: len(getattr(t, name))]], 1)
            for name in ("x", "x_val", "x_test")
        },
    )
    nets = []
    for compress in (nn.Identity(), NestedDropout(64, 2.0, per_sample=True)):
        net = network(compress, width=64)
        with seeded(0):
            net[0][0] = nn.Linear(64, 64)
        nets.append(net)
    run = train_compressed(
        CompressedNetworks(nets), [t, t], seeds=[0, 0], **{**BUDGET, "epochs": 15, "milestones": ()}
    )
    assert run.memorized[0, -1] > run.memorized[1, -1] + 0.2


# --- co-teaching -----------------------------------------------------------------------------


def _pair(**settings):
    nets = [CompressedNetworks([network(seed=s)]) for s in (1, 2)]
    run = co_teach(*nets, [task()], **{"seeds": [0], "forget_rate": 0.5, **BUDGET, **settings})
    return nets, run


def test_co_teaching_against_a_slow_loop():
    """Ranking and exchange spelled out; fails if a network learns from its own selection."""
    nets, run = _pair(momentum=0.0, weight_decay=0.0, milestones=())
    slow, t = [network(seed=1), network(seed=2)], task()
    for epoch in range(3):
        for index in torch.randperm(24, generator=generator(epoch)).split(8):
            halves, picks = (index[:4], index[4:]), []
            for net, half in zip(slow, halves):
                loss = F.cross_entropy(net(t.x[half]), t.noisy[half], reduction="none")
                picks.append(half[loss.argsort()[:2]])
            for net, pick in zip(slow, picks[::-1]):
                loss = F.cross_entropy(net(t.x[pick]), t.noisy[pick])
                grads = torch.autograd.grad(loss, list(net.parameters()))
                with torch.no_grad():
                    for p, grad in zip(net.parameters(), grads):
                        p -= 0.1 * grad
    for fast, net in zip(nets, slow):
        torch.testing.assert_close(fast.weight[0], net[2].weight)
    both = (slow[0](t.x_test) + slow[1](t.x_test)) / 2
    assert run.test_accuracy[0, -1] == (both.argmax(1) == t.y_test).float().mean()


def test_pairs_side_by_side_keep_their_own_share():
    """Two pairs with different rates in one call, against one after the other.

    Fails if the smaller share of one pair cuts the other's, or if left-out examples keep a weight.
    """
    rates = [0.25, 0.5]
    sides = [[CompressedNetworks([network(seed=s)]) for s in (i, i + 5)] for i in (1, 2)]
    both = [CompressedNetworks([network(seed=s) for s in pair]) for pair in ((1, 2), (6, 7))]
    run = co_teach(*both, [task(), task()], forget_rate=rates, seeds=[0, 3], **BUDGET)
    for i, (pair, rate) in enumerate(zip(sides, rates)):
        alone = co_teach(*pair, [task()], forget_rate=rate, seeds=[[0, 3][i]], **BUDGET)
        for nets, single in zip(both, pair):
            torch.testing.assert_close(nets.weight[i], single.weight[0])
        torch.testing.assert_close(run.purity[i], alone.purity[0])
    with pytest.raises(ValueError, match="one number or 2 of them"):
        co_teach(*both, [task(), task()], forget_rate=[0.1], seeds=[0, 3])


@pytest.mark.parametrize(
    "change",
    [
        {"forget_rate": 0.25},
        {"epochs": 2},
        {"batch_size": 6},
        {"lr": 0.2},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"milestones": (1,)},
        {"ramp_epochs": 3},
        {"exchange": False},
        {"seeds": [1]},
    ],
)
def test_each_knob_of_co_teaching_matters(change):
    assert not torch.equal(_pair()[0][0].weight, _pair(**change)[0][0].weight)


def test_selection_finds_the_correct_labels():
    """Networks that know the classes select pure batches; fails if large losses were kept."""
    nets = [CompressedNetworks([network(seed=s, width=32)]) for s in (1, 2)]
    clean = replace(task(60), noisy=task(60).clean)
    clean.noisy[0] = 1 - clean.noisy[0].clamp(max=1)  # one wrong label keeps the shares defined
    for n in nets:
        train_compressed(n, [clean], seeds=[0], **{**BUDGET, "epochs": 40, "milestones": ()})
    run = co_teach(*nets, [task(60)], forget_rate=0.5, seeds=[0], **{**BUDGET, "lr": 1e-3})
    assert run.purity.min() > 0.9


def test_co_teaching_ranks_without_masks_and_learns_with_them():
    """The first channel speaks for wrong labels, all together for the right ones.

    Masks leave the first channel only, and validation chooses all. Fails if the ranking sees
    masks, or if what is learned from the selection does not.
    """
    t = task()
    one_hot = 2 * F.one_hot(t.clean, 3).float()
    x = torch.cat([one_hot[:, :1], one_hot], dim=1)
    t = NoisyTask(x, t.noisy, t.clean, x[:9], t.clean[:9], x, t.clean)
    start = torch.cat([torch.tensor([[0.0], [5.0], [0.0]]), 20 * torch.eye(3)], dim=1)
    linear = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(start)
    net = nn.Sequential(nn.Identity(), NestedDropout(4, std=0.1), linear)
    pair = [CompressedNetworks([net]) for _ in range(2)]
    budget = {"epochs": 2, "batch_size": 12, "momentum": 0.0, "weight_decay": 0.0}
    run = co_teach(*pair, [t], forget_rate=0.6, seeds=[0], lr=0.01, ramp_epochs=0, **budget)
    assert run.purity.min() == 1
    for nets in pair:
        moved = (nets.weight[0] - start).abs().amax(0)
        assert moved[0] > 0
        assert moved[1:].max() == 0


def test_training_refuses_bad_input():
    one, two = CompressedNetworks([network()]), CompressedNetworks([network(), network()])
    t = task()
    with pytest.raises(ValueError, match="tasks must hold one task for each of 2 networks"):
        train_compressed(two, [t], seeds=[0, 0])
    with pytest.raises(ValueError, match="seeds must hold one seed for each of 2 networks"):
        train_compressed(two, [t, t], seeds=[0])
    for change in ({"epochs": 0}, {"batch_size": 1}):
        with pytest.raises(ValueError, match="epochs and batch_size must be at least 1 and 2"):
            train_compressed(one, [t], seeds=[0], **change)
    with pytest.raises(ValueError, match="measure_every must be at least 1, got 0"):
        train_compressed(one, [t], seeds=[0], measure_every=0)
    with pytest.raises(ValueError, match="second must hold 1 networks, got 2"):
        co_teach(one, two, [t], forget_rate=0.1, seeds=[0])
    with pytest.raises(ValueError, match=r"forget_rate must lie in \[0, 1\), one number or 1"):
        co_teach(one, one, [t], forget_rate=1.0, seeds=[0])


# --- the toy ---------------------------------------------------------------------------------


def _line(seed=0, **settings):
    x = torch.linspace(-1, 1, 12)[None, :, None]
    net = network(NestedDropout(6, 3.0))
    net[0][0], net[2] = nn.Linear(1, 6), nn.Linear(6, 1, bias=False)
    for i, p in enumerate(net.parameters()):
        nn.init.normal_(p, generator=gen(i))
    nets = CompressedNetworks([net])
    error = fit_regression(nets, x, x[..., 0].abs(), seed=seed, **{"steps": 30, **settings})
    return nets, error


def test_regression_learns_and_each_knob_matters():
    base, error = _line()
    assert _line(steps=400, lr=0.01)[1] < error
    for change in ({"steps": 31}, {"lr": 0.01}, {"seed": 1}):
        assert not torch.equal(base.weight, _line(**change)[0].weight)
    with pytest.raises(ValueError, match="x and y must have shapes"):
        fit_regression(base, torch.ones(1, 3, 1), torch.ones(1, 4), seed=0)


# --- one small case a public name, for the contract sweep ------------------------------------


def _inputs(g):
    return (2 * torch.randn(24, 4, generator=g),)


def _given(x):
    place = torch.arange(len(x), device=x.device)
    y = place % 3
    noisy = torch.where(place < 8, (y + 1) % 3, y)
    return NoisyTask(x, noisy, y, x, noisy, x, y)


def _nets(x, seed=0):
    nets = CompressedNetworks([network(NestedDropout(6, 1e-3, 4.0), seed).to(x)])
    return nets


def _stage_one(x):
    nets = _nets(x)
    return train_compressed(nets, [_given(x)], seeds=[0], **BUDGET), nets.weight.detach()


def _stage_two(x):
    one, two = _nets(x, 1), _nets(x, 2)
    run = co_teach(one, two, [_given(x)], forget_rate=0.4, seeds=[0], **BUDGET)
    return run, one.weight.detach()


CASES = {
    "nested_distribution": Case(
        inputs=lambda g: (),
        call=lambda: nested_distribution(5, 2.0),
        keeps_dtype=False,  # float64 by design
    ),
    "truncate": Case(
        inputs=_inputs,
        call=lambda x: truncate(x, 2),
        dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    "NestedDropout": Case(
        inputs=_inputs,
        # All mass on one cut point: random draws differ between devices.
        call=lambda x: NestedDropout(4, 1e-3, 2.0).to(x.device)(x),
        dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    "select_truncation": Case(
        inputs=lambda g: (
            torch.randn(9, 4, generator=g),
            torch.randn(3, 4, generator=g),
            torch.randint(3, (9,), generator=g),
        ),
        call=select_truncation,
        keeps_dtype=False,  # accuracies are float32
    ),
    "small_loss_indices": Case(
        inputs=lambda g: (torch.rand(9, generator=g),), call=lambda v: small_loss_indices(v, 0.4)
    ),
    "bias_variance": Case(
        inputs=lambda g: (
            torch.randn(4, 5, 3, generator=g).log_softmax(-1),
            torch.randn(5, 3, generator=g).softmax(-1),
        ),
        call=bias_variance,
    ),
    "CompressedNetworks": Case(
        inputs=_inputs, call=lambda x: (_nets(x)(x[None]).detach(), _nets(x).by_width(x[None]))
    ),
    "train_compressed": Case(inputs=_inputs, call=_stage_one, keeps_dtype=False),
    "co_teach": Case(inputs=_inputs, call=_stage_two, keeps_dtype=False),
    "fit_regression": Case(
        inputs=_inputs,
        call=lambda x: fit_regression(
            CompressedNetworks(
                [nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(1, 1, bias=False).to(x))]
            ),
            x[None, :, :1],
            x[None, :, 1],
            seed=0,
            steps=3,
        ),
    ),
}


def test_tasks_that_do_not_pair_up_are_refused():
    bad = replace(task(), noisy=task().noisy[:5])
    with pytest.raises(ValueError, match="one length"):
        train_compressed(CompressedNetworks([network()]), [bad], seeds=[0], **BUDGET)
    one = NoisyTask(*(v[:1] for v in vars(task()).values()))
    pair = [CompressedNetworks([network()]) for _ in range(2)]
    with pytest.raises(ValueError, match="at least two training examples"):
        co_teach(*pair, [one], forget_rate=0.2, seeds=[0], **BUDGET)


def test_training_that_diverges_says_so():
    huge = {**BUDGET, "lr": 1e30}
    alone, *pair = (CompressedNetworks([network()]) for _ in range(3))
    with pytest.warns(RuntimeWarning, match="train_compressed diverged"):
        train_compressed(alone, [task()], seeds=[0], **huge)
    with pytest.warns(RuntimeWarning, match="co_teach diverged"):
        co_teach(*pair, [task()], forget_rate=0.2, seeds=[0], **huge)
    for networks in (alone, *pair):
        assert any(p.isnan().any() for p in networks.parameters())
