"""A routed layer of experts, from loops."""

import pytest
import torch

from contract import Case, sizes
from wellposed.nets import RoutedExperts
from wellposed.ops.dispatch import Dispatch, expert_choice, token_choice


def _net(s=2, seed=0):
    return RoutedExperts(s, 3, 4, 5, 6, 7, generator=torch.Generator().manual_seed(seed)).double()


def test_forward_from_loops():
    """Fails if the gate of another expert weighs the answer, or the shortcut is missing."""
    net, x = _net(), torch.randn(2, 9, 3, dtype=torch.float64)
    with torch.no_grad():
        for name, bias in net.named_parameters():
            if name.endswith("bias"):
                bias.copy_(torch.randn_like(bias))
    logits, gates, sent = net(x, lambda p: expert_choice(p, 4))
    for s in range(2):
        for i in range(9):
            h = (x[s, i] @ net.stem[s] + net.stem_bias[s, 0]).clamp(min=0)
            p = (h @ net.router[s] + net.router_bias[s, 0]).softmax(0)
            total = h.clone()
            for j in range(4):
                if i in sent.tokens[s, j].tolist():
                    inner = (h @ net.first[s, j] + net.first_bias[s, j, 0]).clamp(min=0)
                    total = total + p[j] * (inner @ net.second[s, j] + net.second_bias[s, j, 0])
            torch.testing.assert_close(gates[s, i], p)
            torch.testing.assert_close(logits[s, i], total @ net.head[s] + net.head_bias[s, 0])


def test_places_that_are_not_used_add_nothing():
    net, x = _net(), torch.randn(2, 5, 3, dtype=torch.float64)
    tokens = torch.zeros(2, 4, 1, dtype=torch.int64)
    empty = Dispatch(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    logits = net(x, lambda p: empty)[0]
    h = torch.relu(x @ net.stem + net.stem_bias)
    torch.testing.assert_close(logits, h @ net.head + net.head_bias)


def test_the_router_learns_through_the_gates_alone():
    net, x = _net(), torch.randn(2, 5, 3, dtype=torch.float64)
    seen = []

    def route(gates):
        seen.append(gates.requires_grad)
        return token_choice(gates, 5)

    net(x, route)[0].square().sum().backward()
    assert seen == [False]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_networks_and_seeds_differ():
    net = _net()
    assert not torch.equal(net.stem[0], net.stem[1])
    assert torch.equal(_net().stem, net.stem)
    assert not torch.equal(_net(seed=1).stem, net.stem)
    with pytest.raises(ValueError, match="must be >= 1"):
        RoutedExperts(1, 3, 0, 5, 6, 7, generator=torch.Generator())


def _routed(x):
    net = RoutedExperts(
        len(x), x.shape[2], 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)
    ).to(x)
    return net(x, lambda gates: expert_choice(gates, 1))


CASES = {"RoutedExperts": Case(lambda g: (torch.randn(*sizes(g, 3), generator=g),), _routed)}
