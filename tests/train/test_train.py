"""Tests of wellposed.train."""

import pytest
import torch

from contract import Case, sizes
from wellposed.train import (
    StackedAdam,
    StackedSGD,
    accuracy,
    generator,
    minibatches,
    pick_device,
    seeded,
    spawn_seeds,
)


def test_pick_device_takes_three_words() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda', got 'gpu'"):
        pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pick_device_does_not_fall_back_silently() -> None:
    with pytest.raises(ValueError, match="no usable GPU"):
        pick_device("cuda")


def test_spawned_seeds_differ_and_do_not_depend_on_how_many() -> None:
    """Fails if children are seed, seed + 1, ...: roots 0 and 1 would then share seeds."""
    many = [set(spawn_seeds(root, 50)) for root in range(5)]
    assert all(len(seeds) == 50 for seeds in many)
    assert len(set.union(*many)) == 250
    assert spawn_seeds(3, 2) == spawn_seeds(3, 7)[:2]
    with pytest.raises(ValueError, match="n must be at least 1"):
        spawn_seeds(0, 0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        spawn_seeds(-1, 2)


def test_seeded_repeats_and_leaves_the_global_state_alone() -> None:
    """Fails if the state is not restored."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(5):
        first = torch.nn.Linear(3, 2).weight
    assert torch.equal(torch.rand(3), expected)
    with seeded(5):
        assert torch.equal(torch.nn.Linear(3, 2).weight, first)
    with seeded(6):
        assert not torch.equal(torch.nn.Linear(3, 2).weight, first)


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (7, 3), (6, 3), (3, 10)])
def test_minibatches_are_a_shuffled_partition(n: int, batch_size: int) -> None:
    batches = list(minibatches(n, batch_size, generator(0)))
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_minibatches_follow_their_generator() -> None:
    """Fails if the order is not shuffled, or not drawn from the generator."""
    draw = generator(1)
    first, second = (torch.cat(list(minibatches(50, 8, draw))) for _ in range(2))
    again = torch.cat(list(minibatches(50, 8, generator(1))))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50))
    with pytest.raises(ValueError, match="n must be at least 1"):
        next(minibatches(0, 1, generator(0)))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(minibatches(1, 0, generator(0)))


def test_accuracy_counts_and_keeps_leading_axes() -> None:
    logits = torch.randn(3, 20, 4, generator=generator(0))
    target = torch.randint(4, (3, 20), generator=generator(1))
    expected = [
        sum(int(row.argmax()) == int(label) for row, label in zip(rows, labels)) / 20
        for rows, labels in zip(logits, target)
    ]
    assert accuracy(logits, target).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="target must have the shape"):
        accuracy(logits, target[0])


def _stepped(kind, w, grad, **options):
    """A parameter after two steps along the same gradient."""
    p = w.clone().requires_grad_()
    optimizer = kind([p], lr=0.1, **options)
    for _ in range(2):
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def _weights(g):
    """Weights and a gradient of any shape, in one tensor."""
    return (torch.randn(*sizes(g, 2), 2, generator=g),)


def _drawn_in(seed):
    with seeded(seed):
        return torch.rand(3)


CASES = {
    "StackedAdam": Case(_weights, lambda both: _stepped(StackedAdam, *both.unbind(-1))),
    "StackedSGD": Case(_weights, lambda both: _stepped(StackedSGD, *both.unbind(-1), momentum=0.9)),
    "accuracy": Case(
        lambda g: (torch.randn(3, 5, 4, generator=g), torch.randint(4, (3, 5), generator=g)),
        accuracy,
        keeps_dtype=False,
    ),
    "generator": Case(
        lambda g: (), lambda: torch.rand(3, generator=generator(0)), keeps_dtype=False
    ),
    "minibatches": Case(
        lambda g: tuple(sizes(g, 2)), lambda n, b: list(minibatches(n, b, generator(0)))
    ),
    "pick_device": Case(lambda g: (), lambda: pick_device("cpu").type),
    "seeded": Case(lambda g: tuple(sizes(g, 1)), _drawn_in, keeps_dtype=False),
    "spawn_seeds": Case(lambda g: tuple(sizes(g, 2)), spawn_seeds),
}
