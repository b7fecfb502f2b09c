"""Who takes whom, from loops over tokens and experts."""

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.dispatch import expert_choice, plan_choice, token_choice


def _scores(m=12, n=3, seed=0):
    return torch.rand(2, m, n, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def _taken(sent, s, j):
    pairs = zip(sent.tokens[s, j].tolist(), sent.used[s, j].tolist())
    return {token for token, used in pairs if used}


@pytest.mark.parametrize("capacity", [1, 3, 12])
def test_from_loops(capacity):
    """Fails if late tokens push out early ones."""
    scores = _scores()
    by_token, by_expert = token_choice(scores, capacity), expert_choice(scores, capacity)
    for s in range(2):
        room = {0: [], 1: [], 2: []}
        for i in range(12):
            best = max(range(3), key=lambda j: scores[s, i, j].item())
            if len(room[best]) < capacity:
                room[best].append(i)
        for j in range(3):
            assert _taken(by_token, s, j) == set(room[j])
            order = sorted(range(12), key=lambda i: -scores[s, i, j].item())
            assert _taken(by_expert, s, j) == set(order[:capacity])


def test_plan_keeps_its_largest_entries_and_leaves_zeros_out():
    plan = torch.tensor([[0.5, 0.0], [0.2, 0.0], [0.3, 0.1]])
    sent = plan_choice(plan, 2)
    assert sent.tokens[0].tolist() == [0, 2]
    assert sent.used.tolist() == [[True, True], [True, False]]
    assert sent.copies(3).tolist() == [1, 0, 2]


def test_copies_count_experts():
    scores = _scores()
    assert token_choice(scores, 12).copies(12).eq(1).all()
    assert expert_choice(scores, 12).copies(12).eq(3).all()


@pytest.mark.parametrize("choose", [expert_choice, plan_choice, token_choice])
def test_bad_input(choose):
    with pytest.raises(ValueError, match="capacity must be between 1 and 12, got 13"):
        choose(_scores(), 13)
    with pytest.raises(ValueError, match="tokens and experts must be two axes"):
        choose(torch.ones(3), 1)


def _gates(g):
    s, m, n = sizes(g, 3, least=2)
    return (torch.rand(s, m, n, generator=g),)


CASES = {
    "expert_choice": Case(_gates, lambda x: expert_choice(x, 2)),
    "plan_choice": Case(_gates, lambda x: plan_choice(x, 2)),
    "token_choice": Case(_gates, lambda x: token_choice(x, 2)),
}
