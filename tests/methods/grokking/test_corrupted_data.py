"""Tests of wellposed.methods.grokking.corrupted_data."""

import math

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.methods.grokking.corrupted_data import (
    PHASES,
    History,
    QuadraticMLP,
    analytic_mlp,
    evaluate,
    evaluate_side_by_side,
    inverse_participation_ratio,
    modular_addition_data,
    neuron_ipr,
    neuron_magnitude,
    prune_neurons,
    train,
    train_side_by_side,
    train_transformers,
    training_phase,
    two_stages,
)


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


def _net(p=7, width=12, seed=0, **kind):
    return QuadraticMLP(p, width, generator=_gen(seed), **kind)


def _as(net, like):
    return net.to(device=like.device, dtype=like.dtype)


def _data(p=7, fraction=0.8, corruption=0.25, seed=0):
    return modular_addition_data(p, fraction, corruption, _gen(seed))


def _one():
    return lambda g: (torch.ones(1),)


def _trained(like):
    net = _as(_net(), like)
    run = train(net, _data().to(like.device), steps=3, log_every=2)
    return run.train, net.U.detach()


def _trained_together(like):
    nets = [_as(_net(seed=s), like) for s in (0, 1)]
    run = train_side_by_side(nets, [_data().to(like.device)] * 2, steps=3, weight_decay=[0, 5])
    return run.test, nets[1].W.detach()


CASES = {
    "QuadraticMLP": Case(
        inputs=lambda g: (torch.randint(0, 7, (5, 2), generator=g), torch.ones(1)),
        call=lambda pairs, like: _as(_net(), like)(pairs),
    ),
    "analytic_mlp": Case(
        inputs=lambda g: (torch.randint(0, 7, (5, 2), generator=g),),
        call=lambda pairs: analytic_mlp(7, 9, _gen())(pairs),
        keeps_dtype=False,
        on_device=False,
    ),
    "evaluate": Case(
        inputs=_one(),
        call=lambda like: torch.tensor(
            evaluate(_as(_net(), like), _data().to(like.device)).test, dtype=torch.float64
        ),
        keeps_dtype=False,
        on_device=False,
    ),
    "evaluate_side_by_side": Case(
        inputs=_one(),
        call=lambda like: evaluate_side_by_side(
            [_as(_net(), like)] * 2, [_data().to(like.device)] * 2
        ),
    ),
    "inverse_participation_ratio": Case(
        inputs=lambda g: (torch.randn(3, 7, generator=g),), call=inverse_participation_ratio
    ),
    "modular_addition_data": Case(
        inputs=lambda g: (7, 0.6, 0.3, g),
        call=lambda *arguments: modular_addition_data(*arguments).train_labels,
        on_device=False,
    ),
    "neuron_ipr": Case(inputs=_one(), call=lambda like: neuron_ipr(_as(_net(), like))),
    "neuron_magnitude": Case(inputs=_one(), call=lambda like: neuron_magnitude(_as(_net(), like))),
    "prune_neurons": Case(
        inputs=_one(), call=lambda like: prune_neurons(_as(_net(), like), 0.5).U.detach()
    ),
    "train": Case(inputs=_one(), call=_trained),
    "train_side_by_side": Case(inputs=_one(), call=_trained_together),
    "train_transformers": Case(
        inputs=_one(),
        call=lambda like: train_transformers(
            [_data().to(like.device)], seeds=[0], steps=2, width=8, heads=2
        )[1],
        keeps_dtype=False,
        on_device=False,
    ),
    "training_phase": Case(
        inputs=lambda g: (torch.rand(9, generator=g), torch.rand(9, generator=g)),
        call=training_phase,
    ),
    "two_stages": Case(
        inputs=lambda g: (torch.rand(3, 5, generator=g), torch.rand(3, 5, generator=g)),
        call=lambda a, b: two_stages(History(torch.arange(5), a, a, a, b)),
        keeps_dtype=False,
    ),
}


# --- scores of neurons ----------------------------------------------------------------------------


def test_a_score_is_the_mean_over_the_three_vectors_of_a_neuron():
    """Fails if rows of W are taken in place of columns."""
    net = _net(p=5, width=4)
    for k in range(4):
        vectors = torch.stack([net.U[k], net.V[k], net.W[:, k]]).detach()
        want = inverse_participation_ratio(vectors, 3).mean()
        torch.testing.assert_close(neuron_ipr(net, 3)[k], want)
        product = vectors.norm(dim=1).prod()
        torch.testing.assert_close(neuron_magnitude(net)[k], product)


# --- pruning and measuring ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["low", "high"])
def test_pruning_takes_the_right_neurons(order):
    """Fails if the order is turned around, or if the model itself is changed."""
    net = _net()
    before = net.U.detach().clone()
    ranked = sorted(range(12), key=neuron_ipr(net).tolist().__getitem__, reverse=order == "high")
    pruned = prune_neurons(net, 0.45, order)
    gone = ranked[: int(0.45 * 12)]
    for k in range(12):
        empty = [bool((w == 0).all()) for w in (pruned.U[k], pruned.V[k], pruned.W[:, k])]
        assert empty == [k in gone] * 3
    assert torch.equal(net.U, before)


def test_scores_add_up_over_neurons():
    """What the two halves answer sums to what the network answers."""
    net, pairs = _net().double(), torch.cartesian_prod(torch.arange(7), torch.arange(7))
    halves = [prune_neurons(net, 0.5, order)(pairs) for order in ("low", "high")]
    torch.testing.assert_close(halves[0] + halves[1], net(pairs))


def test_pruning_at_random_and_by_another_score():
    net = _net()
    first = prune_neurons(net, 0.5, "random", _gen(1)).U
    assert torch.equal(first, prune_neurons(net, 0.5, "random", _gen(1)).U)
    assert not torch.equal(first, prune_neurons(net, 0.5, "random", _gen(2)).U)
    gone = prune_neurons(net, 0.5, score=torch.arange(12.0)).U.abs().sum(1) == 0
    assert gone.tolist() == [True] * 6 + [False] * 6
    assert torch.equal(prune_neurons(net, 0.0).U, net.U)
    assert not prune_neurons(net, 1.0).W.any()


def test_evaluation_of_a_network_that_always_gives_true_sums():
    """Corrupted accuracy is measured against the wrong label; fails against the true one."""
    data = _data(p=11, corruption=0.3)
    net = analytic_mlp(11, 800, _gen()).train()
    got = evaluate(net, data)
    lucky = (data.train_labels == data.clean_labels)[data.corrupted].float().mean().item()
    assert got.test == got.uncorrupted == 1.0
    assert got.corrupted == pytest.approx(lucky)
    assert got.train == pytest.approx((data.train_labels == data.clean_labels).float().mean())
    assert net.training
    assert math.isnan(evaluate(net, _data(p=11, corruption=0.0)).corrupted)


def test_evaluation_switches_dropout_off():
    net = analytic_mlp(7, 400, _gen())
    net.dropout = 0.9
    assert evaluate(net.train(), _data()).test == 1.0


def test_evaluation_side_by_side_is_one_by_one():
    """Fails if the answer to (m, n) is read at (n, m), or if padding is counted."""
    nets = [_net(seed=s) for s in (0, 1)]
    sets = [_data(fraction=0.8), _data(fraction=0.5, seed=1)]
    for net, data in zip(nets, sets, strict=True):
        train(net, data, steps=12)
    got = evaluate_side_by_side(nets, sets)
    for i in range(2):
        alone = evaluate(nets[i], sets[i])
        want = [alone.train, alone.corrupted, alone.uncorrupted, alone.test]
        assert got[:, i].tolist() == pytest.approx(want)
    assert 0.1 < got[1, 1].item() < 0.95


def test_phases_and_their_thresholds():
    grid = torch.tensor([0.0, 0.15, 0.5, 0.85, 1.0])
    codes = training_phase(grid.expand(5, 5), grid[:, None].expand(5, 5))
    names = [[PHASES[c] for c in row] for row in codes.tolist()]
    assert names[0] == ["forgetting"] * 4 + ["memorization"]
    assert names[4] == ["full inversion", *["partial inversion"] * 3, "coexistence"]
    wider = training_phase(grid.expand(5, 5), grid[:, None].expand(5, 5), low=0.2, high=0.8)
    assert PHASES[wider[4, 1]] == "full inversion"
    assert PHASES[wider[3, 3]] == "coexistence"


def test_two_stages_by_hand():
    """Fails if a low accuracy before the peak counts as unlearning."""
    corrupted = torch.tensor([[0.1, 0.9, 1.0, 0.4, 0.2], [0.1, 0.9, 0.9, 0.9, 0.8]])
    test = torch.tensor([[0.0, 0.1, 0.6, 0.9, 1.0], [0.0, 0.1, 0.2, 0.2, 0.3]])
    run = History(torch.tensor([0, 5, 10, 15, 20]), test, corrupted, test, test)
    grokked, unlearned = two_stages(run)
    assert grokked.tolist() == [10.0, math.inf]
    assert unlearned.tolist() == [15.0, math.inf]
    assert two_stages(run, level=0.3)[1].tolist() == [20.0, math.inf]


# --- training -------------------------------------------------------------------------------------


def _adamw(net, data, steps, lr, decay):
    """The authors' loop: torch's AdamW on torch's mean squared error."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=decay, betas=(0.9, 0.98))
    target = F.one_hot(data.train_labels, net.p).to(net.U.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(data.train_pairs), target).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [{}, {"batch_norm": True}, {"activation": torch.relu}])
def test_training_is_adamw_on_the_mean_squared_error(kind):
    """Fails if the error is summed over outputs, or if the decay joins the gradient."""
    ours, theirs = _net(**kind).double(), _net(**kind).double()
    data = _data()
    train(ours, data, steps=6, lr=0.02, weight_decay=5.0)
    _adamw(theirs, data, 6, 0.02, 5.0)
    for name, weight in theirs.state_dict().items():
        if "tracked" not in name:
            torch.testing.assert_close(ours.state_dict()[name], weight)


def test_side_by_side_with_other_sizes_and_decays_is_one_by_one():
    """Fails if padding enters a loss, or if losses are averaged over networks."""
    sets = [_data(fraction=0.8), _data(fraction=0.5, seed=1)]
    together = [_net(seed=s).double() for s in (3, 4)]
    alone = [_net(seed=s).double() for s in (3, 4)]
    run = train_side_by_side(together, sets, steps=7, weight_decay=[0.0, 8.0], log_every=3)
    assert run.steps.tolist() == [0, 3, 6, 7]
    for i, decay in enumerate((0.0, 8.0)):
        single = train(alone[i], sets[i], steps=7, weight_decay=decay, log_every=3)
        torch.testing.assert_close(together[i].W, alone[i].W)
        torch.testing.assert_close(run.corrupted[i], single.corrupted)
    last = evaluate(together[1], sets[1])
    assert run.test[1, -1].item() == pytest.approx(last.test)
    assert run.uncorrupted[1, -1].item() == pytest.approx(last.uncorrupted)


def test_minibatches_are_an_epoch_without_its_short_end():
    """One full-size batch is a full batch in another order; fails with draws that repeat pairs."""
    data = _data()
    n = len(data.train_labels)
    one, other = _net().double(), _net().double()
    train(one, data, steps=3, batch_size=n, generator=_gen())
    train(other, data, steps=3)
    torch.testing.assert_close(one.U, other.U)
    small, again = _net().double(), _net().double()
    train(small, data, steps=9, batch_size=8, generator=_gen(1))
    train(again, data, steps=9, batch_size=8, generator=_gen(2))
    assert not torch.allclose(small.U, again.U)


def test_dropout_acts_in_training_and_follows_the_generator():
    runs = []
    for seed, rate in ((1, 0.5), (1, 0.5), (2, 0.5), (1, 0.0)):
        net = _net(dropout=rate)
        train(net, _data(), steps=3, generator=_gen(seed))
        runs.append(net.U.detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])


def test_gradients_by_hand_are_those_of_the_graph():
    """Another name for the square takes the general path; fails if dropout is left out of one."""
    data = _data()
    for rate, batch in ((0.5, None), (0.0, 8), (0.5, 8), (0.0, None)):
        slopes = []
        for activation in (torch.square, lambda h: h * h):
            net = _net(dropout=rate, activation=activation).double()
            train(net, data, steps=9, batch_size=batch, generator=_gen())
            slopes.append(net.state_dict())
        for name, weight in slopes[0].items():
            torch.testing.assert_close(weight, slopes[1][name])


def test_decay_makes_a_small_network_give_up_corrupted_labels():
    """The paper's effect in small: fails if the sign of the decay flips."""
    data = modular_addition_data(23, 0.9, 0.15, _gen())
    kept = []
    for decay in (0.0, 8.0):
        net = QuadraticMLP(23, 80, generator=_gen())
        train(net, data, steps=150, weight_decay=decay, log_every=150)
        kept.append(evaluate(net, data))
    assert kept[0].corrupted > 0.9
    assert kept[1].corrupted < kept[0].corrupted - 0.3
    assert kept[1].uncorrupted > 0.95


def test_transformers_are_trained_as_if_alone():
    """Fails if a network sees the data of another, or losses are averaged over networks."""
    sets = [_data(), _data(fraction=0.6, seed=1)]
    small = {"steps": 5, "width": 8, "heads": 2, "log_every": 5}
    both, run = train_transformers(sets, seeds=[0, 1], weight_decay=[0.0, 4.0], **small)
    for i, decay in enumerate((0.0, 4.0)):
        alone, single = train_transformers([sets[i]], seeds=[i], weight_decay=decay, **small)
        torch.testing.assert_close(both.head[i], alone.head[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(run.train[i], single.train[0], atol=0.06, rtol=0)


def test_transformers_are_measured_by_what_they_answer():
    """Fails if the layer is computed in another way than the transformer does."""
    sets = [_data(), _data(seed=1)]
    nets, run = train_transformers(
        sets, seeds=[0, 1], steps=8, lr=0.003, width=8, heads=2, embed_std=0.5
    )
    pairs = torch.stack([data.train_pairs for data in sets])
    labels = torch.stack([data.train_labels for data in sets])
    right = (nets(pairs)[:, :, -1].argmax(-1) == labels).float().mean(1)
    assert right.min() > 0.1
    assert right.max() < 0.95
    torch.testing.assert_close(run.train[:, -1], right)


@pytest.mark.parametrize(
    "change", [{"lr": 0.001}, {"weight_decay": 9.0}, {"batch_size": 5}, {"embed_std": 0.1}]
)
def test_every_knob_of_the_transformer_changes_it(change):
    small = {"seeds": [0], "steps": 3, "width": 8, "heads": 2}
    plain, _ = train_transformers([_data()], **small)
    other, _ = train_transformers([_data()], **small, generator=_gen(), **change)
    assert not torch.allclose(plain.head, other.head)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neuron_ipr(_net(), 0), "r must be at least 1"),
        (lambda: prune_neurons(_net(), 1.5), r"fraction must be in \[0, 1\]"),
        (lambda: prune_neurons(_net(), 0.5, "worst"), "order must be 'low', 'high' or 'random'"),
        (lambda: prune_neurons(_net(), 0.5, score=torch.ones(3)), "score must have shape"),
        (lambda: training_phase(torch.ones(2), torch.ones(3)), "must have one shape"),
        (lambda: training_phase(torch.ones(2), torch.ones(2), low=0.9), "thresholds must satisfy"),
        (lambda: two_stages(History(*[torch.ones(2, 3)] * 5), level=1.0), "level must be in"),
        (lambda: two_stages(History(*[torch.ones(3)] * 5)), "history must hold curves"),
        (lambda: train(_net(), _data(), steps=0), "steps and log_every must be at least 1"),
        (lambda: train(_net(), _data(p=5), steps=1), "must all have one modulus"),
        (lambda: train(_net(), _data(), steps=1, batch_size=1000), "batch_size must be in"),
        (lambda: evaluate_side_by_side([_net()], []), "need one data set a network"),
        (lambda: train_side_by_side([_net()], [], steps=1), "need one data set a network"),
        (
            lambda: train_side_by_side([_net(), _net(dropout=0.1)], [_data()] * 2, steps=1),
            "models one kind",
        ),
        (lambda: train_transformers([_data()], seeds=[], steps=1), "need one data set a network"),
        (
            lambda: train_transformers([_data(), _data(p=5)], seeds=[0, 1], steps=1),
            "one modulus",
        ),
        (
            lambda: train_transformers([_data()], seeds=[0], steps=1, width=8, batch_size=0),
            "batch_size must be at least 1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
