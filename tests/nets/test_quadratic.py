"""Tests of wellposed.nets.quadratic."""

import math

import pytest
import torch
from torch import nn

from contract import Case
from wellposed.nets.quadratic import (
    QuadraticMLP,
    analytic_mlp,
    one_hot_columns,
    stacked_logits,
    table_logits,
)


def _net(like, p=5, width=6, **kind):
    net = QuadraticMLP(p, width, generator=torch.Generator().manual_seed(0), **kind)
    return net.to(device=like.device, dtype=like.dtype)


def _pairs(g, p=5, n=7):
    return torch.randint(0, p, (n, 2), generator=g)


def _stacked(like, pairs):
    nets = [_net(like), _net(like)]
    state = {name: torch.stack([m.state_dict()[name] for m in nets]) for name in ("U", "V", "W")}
    x = one_hot_columns(torch.stack([pairs, pairs.flip(1)]), 5, dtype=like.dtype)
    return stacked_logits(state, x)


CASES = {
    "QuadraticMLP": Case(
        inputs=lambda g: (_pairs(g), torch.ones(1)), call=lambda pairs, like: _net(like)(pairs)
    ),
    "analytic_mlp": Case(
        inputs=lambda g: (_pairs(g),),
        call=lambda pairs: analytic_mlp(5, 8, torch.Generator().manual_seed(0))(pairs),
        keeps_dtype=False,
        on_device=False,
    ),
    "one_hot_columns": Case(
        inputs=lambda g: (_pairs(g),),
        call=lambda pairs: one_hot_columns(pairs, 5),
        keeps_dtype=False,
    ),
    "stacked_logits": Case(
        inputs=lambda g: (torch.ones(1), _pairs(g)), call=lambda like, pairs: _stacked(like, pairs)
    ),
    "table_logits": Case(
        inputs=lambda g: (torch.ones(1),),
        call=lambda like: table_logits({n: w[None] for n, w in _net(like).state_dict().items()}),
    ),
}


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("activation", [torch.square, torch.relu])
def test_the_whole_table_holds_the_answer_to_each_pair(g, activation):
    """Fails if the pair (m, n) stands where (n, m) belongs, or if networks are mixed up."""
    nets = [QuadraticMLP(4, 3, generator=g, activation=activation) for _ in range(2)]
    state = {name: torch.stack([m.state_dict()[name] for m in nets]) for name in ("U", "V", "W")}
    table = table_logits(state, activation=activation).unflatten(2, (4, 4))
    for i, net in enumerate(nets):
        for m in range(4):
            for n in range(4):
                torch.testing.assert_close(table[i, :, m, n], net(torch.tensor([[m, n]]))[0])
    with pytest.raises(ValueError, match="without BatchNorm"):
        table_logits({"norm.weight": torch.ones(1, 3), **state})


@pytest.mark.parametrize("activation", [torch.square, torch.relu])
def test_scores_are_the_definition_entry_by_entry(g, activation):
    """Fails if U and V are swapped, if the square comes before the sum, or if W is transposed."""
    net = QuadraticMLP(4, 3, generator=g, activation=activation).double()
    for m in range(4):
        for n in range(4):
            got = net(torch.tensor([[m, n]]))[0]
            for q in range(4):
                hidden = [activation(net.U[k, m] + net.V[k, n]) for k in range(3)]
                want = sum(net.W[q, k] * hidden[k] for k in range(3))
                assert got[q].item() == pytest.approx(want.item(), abs=1e-14)


def test_the_start_has_the_authors_scale():
    """Fails if the exponent is -1/2."""
    net = QuadraticMLP(50, 400, generator=torch.Generator().manual_seed(0))
    for weight in net.parameters():
        assert weight.std().item() == pytest.approx(0.5 * 800 ** (-1 / 3), rel=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_stands_between_the_square_and_w(g, training):
    """Against PyTorch's module. Fails if it comes before the square, or is left out in training."""
    net = QuadraticMLP(5, 6, batch_norm=True, generator=g).double().train(training)
    peer = nn.BatchNorm1d(6).double().train(training)
    with torch.no_grad():
        for module in (net.norm, peer):
            module.weight.copy_(torch.linspace(0.5, 2, 6))
            module.bias.copy_(torch.linspace(-1, 1, 6))
            module.running_var.fill_(2.0)
    pairs = _pairs(g, n=9)
    hidden = (net.U[:, pairs[:, 0]] + net.V[:, pairs[:, 1]]).square().T
    torch.testing.assert_close(net(pairs), peer(hidden) @ net.W.T)
    torch.testing.assert_close(net.norm.running_mean, peer.running_mean)
    torch.testing.assert_close(net.norm.running_var, peer.running_var)


def test_dropout_keeps_the_mean_of_the_pre_activations_and_is_off_in_evaluation(g):
    """With one neuron and W = 1: either 0 or (h / keep) squared. Fails after the square."""
    net = QuadraticMLP(3, 1, dropout=0.75, generator=g)
    nn.init.ones_(net.W)
    pairs = torch.tensor([[1, 2]]).expand(4000, 2)
    h = (net.U[0, 1] + net.V[0, 2]).item()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = net(pairs)[:, 0].detach()
    kept = values > 0
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(values[kept], torch.full_like(values[kept], (h / 0.25) ** 2))
    torch.testing.assert_close(net.eval()(pairs)[0, 0].item(), h * h)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_side_by_side_is_one_by_one(g, batch_norm):
    """Fails if the statistics of BatchNorm are shared between networks."""
    nets = [QuadraticMLP(5, 6, batch_norm=batch_norm, generator=g).double() for _ in range(3)]
    pairs = torch.stack([_pairs(g) for _ in nets])
    names = [n for n in nets[0].state_dict() if "tracked" not in n]
    state = {n: torch.stack([m.state_dict()[n] for m in nets]) for n in names}
    x = one_hot_columns(pairs, 5, dtype=torch.float64)
    together = stacked_logits(state, x, batch_statistics=True)
    for i, net in enumerate(nets):
        torch.testing.assert_close(together[i].T, net(pairs[i]))
        if batch_norm:
            torch.testing.assert_close(state["norm.running_mean"][i], net.norm.running_mean)


def test_a_mask_multiplies_the_pre_activations(g):
    net = QuadraticMLP(5, 6, generator=g).double()
    state = {n: v[None] for n, v in net.state_dict().items()}
    x = one_hot_columns(_pairs(g)[None], 5, dtype=torch.float64)
    doubled = stacked_logits(state, x, mask=torch.full((1, 6, 7), 2.0, dtype=torch.float64))
    torch.testing.assert_close(doubled, 4 * stacked_logits(state, x))


def test_one_hot_columns(g):
    """Fails if the residues are in the other order."""
    pairs = _pairs(g)
    x = one_hot_columns(pairs, 5)
    for b, (m, n) in enumerate(pairs.tolist()):
        assert x[:, b].nonzero().flatten().tolist() == [m, 5 + n]


def test_the_network_of_waves_adds():
    """Fails if W has the phase of one factor only, or if a frequency is zero."""
    p = 23
    net = analytic_mlp(p, 400, torch.Generator().manual_seed(0))
    residues = torch.arange(p)
    pairs = torch.cartesian_prod(residues, residues)
    assert torch.equal(net(pairs).argmax(1), pairs.sum(1) % p)
    k, n = 3, 5  # frequency 4
    phase = math.acos(net.U[k, 0].item())
    turns = [math.cos(s * phase + 2 * math.pi * 4 * n / p) for s in (1, -1)]
    assert min(abs(net.U[k, n].item() - t) for t in turns) < 1e-4


def test_bad_input():
    with pytest.raises(ValueError, match="p must be >= 3"):
        QuadraticMLP(2, 4)
    with pytest.raises(ValueError, match="width >= 1, got p=5, width=0"):
        analytic_mlp(5, 0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        QuadraticMLP(5, 4, dropout=1.0)
    for pairs in (torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match="pairs must be int64 of shape"):
            one_hot_columns(pairs, 5)
    with pytest.raises(ValueError, match=r"pairs must have shape \(B, 2\)"):
        QuadraticMLP(5, 4)(torch.zeros(1, 3, 2, dtype=torch.int64))
