"""Tests of wellposed.data.corrupted_modular."""

import pytest
import torch

from wellposed.data.corrupted_modular import LabelTable, modular_addition_data
from wellposed.data.modular import modular_dataset


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def test_counts_labels_and_split(g):
    """Fails if test labels are corrupted, or if more labels are touched than are marked."""
    data = modular_addition_data(11, 0.7, 0.35, g)
    assert len(data.train_pairs) == int(0.7 * 121) == 84
    assert int(data.corrupted.sum()) == int(0.35 * 84) == 29
    assert torch.equal(data.clean_labels, data.train_pairs.sum(1) % 11)
    assert torch.equal(data.test_labels, data.test_pairs.sum(1) % 11)
    assert torch.equal(data.train_labels[~data.corrupted], data.clean_labels[~data.corrupted])
    assert (data.train_labels != data.clean_labels).any()
    cells = torch.cat([data.train_pairs, data.test_pairs]) @ torch.tensor([11, 1])
    assert sorted(cells.tolist()) == list(range(121))


def test_corrupted_labels_are_uniform_and_may_be_right_by_chance():
    """Fails if the true label is left out of the draw."""
    right, labels = [], []
    for seed in range(40):
        data = modular_addition_data(7, 0.9, 0.9, torch.Generator().manual_seed(seed))
        wrong = data.corrupted
        right.append((data.train_labels == data.clean_labels)[wrong])
        labels.append(data.train_labels[wrong])
    assert torch.cat(right).float().mean().item() == pytest.approx(1 / 7, abs=0.03)
    assert (torch.cat(labels).bincount() / len(torch.cat(labels)) - 1 / 7).abs().max() < 0.03


def test_corrupted_rows_are_not_the_first_ones(g):
    """The rows are in random order, so a subset must not be told by its place."""
    data = modular_addition_data(23, 0.5, 0.5, g)
    half = len(data.corrupted) // 2
    assert 0.3 < data.corrupted[:half].float().mean() < 0.7


def test_the_split_is_that_of_the_clean_table():
    data = modular_addition_data(7, 0.6, 0.0, torch.Generator().manual_seed(4))
    clean = modular_dataset(7, 0.6, "add", torch.Generator().manual_seed(4))
    assert torch.equal(data.train_pairs, clean.x)
    assert torch.equal(data.train_labels, clean.y)
    assert not data.corrupted.any()
    assert torch.equal(data.to("cpu").test_pairs, clean.x_test)


def test_a_table_counts_hits_by_hand_whatever_the_padding(g):
    """Fails if padding counts, or if pairs are looked up transposed."""
    sets = [modular_addition_data(5, share, 0.4, g) for share in (0.8, 0.5)]
    table = LabelTable.of(sets, torch.zeros(1, dtype=torch.float64))
    scores = torch.randn(2, 25, 5, generator=g)
    got = table.accuracies(lambda pairs: scores)
    for i, data in enumerate(sets):
        answer = scores[i].argmax(1).view(5, 5)
        rows = zip(data.train_pairs.tolist(), data.train_labels.tolist(), strict=True)
        hit = torch.tensor([answer[m, n].item() == label for (m, n), label in rows]).double()
        rows = zip(data.test_pairs.tolist(), data.test_labels.tolist(), strict=True)
        unseen = torch.tensor([answer[m, n].item() == label for (m, n), label in rows]).double()
        want = [hit, hit[data.corrupted], hit[~data.corrupted], unseen]
        torch.testing.assert_close(got[:, i], torch.stack([w.mean() for w in want]))


def test_the_whole_table_is_asked_in_order(g):
    data = modular_addition_data(5, 0.8, 0.0, g)
    seen = []
    LabelTable.of([data], torch.zeros(1)).accuracies(
        lambda pairs: seen.append(pairs) or torch.zeros(1, 25, 5)
    )
    assert torch.equal(seen[0] @ torch.tensor([5, 1]), torch.arange(25))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0.5, 0.1), "p must be at least 3"),
        ((5, 0.0, 0.1), "train_fraction must be in"),
        ((5, 1.0, 0.1), "train_fraction must be in"),
        ((5, 0.01, 0.1), "train_fraction must be in"),
        ((5, 0.5, 1.0), "corruption must be in"),
        ((5, 0.5, -0.1), "corruption must be in"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        modular_addition_data(*arguments)
