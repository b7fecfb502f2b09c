"""Masks over channels: statistics, random controls and static networks of equal work."""

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.channel_masks import (
    check_lists,
    conv_macs,
    flops_reduction,
    mask_statistics,
    match_widths,
    shuffle_masks,
)
from wellposed.train import generator


def masks(n=50):
    g = generator(0)
    rates = [torch.rand(c, generator=g) for c in (6, 9)]
    return [(torch.rand(n, len(r), generator=g) < r).double() for r in rates]


LAYERS = [(3, 6, 3, 5, 5), (6, 9, 3, 3, 3)]


def test_statistics_against_loops():
    """Fails if the majority is that of the masks, or filters that never change are dynamic."""
    target = masks()
    mask = [m.roll(1, 0) for m in target]
    mask[0][:, 0] = 1.0
    right, usual, dynamic, filters = 0.0, 0.0, 0, 0
    for m, t in zip(mask, target):
        for c in range(m.shape[1]):
            right += float((m[:, c] == t[:, c]).sum())
            usual += max(float(t[:, c].sum()), 50 - float(t[:, c].sum()))
            dynamic += 1 <= int(m[:, c].sum()) <= 49
            filters += 1
    found = mask_statistics(mask, target)
    assert found.accuracy.item() == pytest.approx(right / 50 / filters)
    assert found.majority.item() == pytest.approx(usual / 50 / filters)
    assert found.dynamic_share.item() == pytest.approx(dynamic / filters)


def test_shuffled_masks_keep_k_and_lose_the_filter():
    """Fails if all samples are shuffled alike."""
    before = [torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4000, 1)]
    after = shuffle_masks(before, generator=generator(1))
    assert after[0].sum(1).unique().tolist() == [2.0]
    assert (after[0].mean(0) - 0.5).abs().max() < 0.05


def test_matched_widths_cost_at_least_as_much_and_little_more():
    """Fails if the search stops below the goal, or far above it."""
    found = masks()
    goal = conv_macs(found, LAYERS).mean().item()
    widths = match_widths(found, LAYERS)
    cost = 25 * 9 * 3 * widths[0] + 9 * 9 * widths[0] * widths[1]
    assert cost >= goal
    for fewer in ([widths[0] - 1, widths[1]], [widths[0], widths[1] - 1]):
        assert 25 * 9 * 3 * fewer[0] + 9 * 9 * fewer[0] * fewer[1] < goal
    assert match_widths([torch.ones(2, 6), torch.ones(2, 9)], LAYERS) == [6, 9]


def test_bad_input():
    with pytest.raises(ValueError, match="masks and targets must be lists"):
        mask_statistics(masks(), masks(7))
    with pytest.raises(ValueError, match="masks must have shape"):
        shuffle_masks([torch.ones(3)], generator=generator(0))
    with pytest.raises(ValueError, match="masks must be one"):
        match_widths(masks(), LAYERS[:1])


TABLE = [(1, 4, 3, 4, 4), (4, 6, 3, 2, 2)]


def _masks(g):
    """Random masks over the filters of two layers, for any number of images."""
    (n,) = sizes(g, 1)
    return tuple((torch.rand(n, layer[1], generator=g) > 0.4).float() for layer in TABLE)


CASES = {
    "check_lists": Case(_masks, lambda a, b: check_lists("a", "b", [a, b], [a + 1, b + 1])),
    "conv_macs": Case(_masks, lambda a, b: conv_macs([a, b], TABLE)),
    "flops_reduction": Case(_masks, lambda a, b: flops_reduction([a, b], TABLE)),
    "mask_statistics": Case(_masks, lambda a, b: mask_statistics([a], [a.flip(0)])),
    "match_widths": Case(_masks, lambda a, b: torch.tensor(match_widths([a, b], TABLE))),
    "shuffle_masks": Case(
        _masks, lambda a, b: shuffle_masks([a, b], generator=generator(0)), on_device=False
    ),
}


def test_masks_of_other_or_no_images_are_refused():
    a, b = torch.ones(2, 4), torch.ones(3, 6)
    with pytest.raises(ValueError, match="n the same"):
        conv_macs([a, b], TABLE)
    with pytest.raises(ValueError, match="n >= 1"):
        mask_statistics([a[:0]], [a[:0]])
    with pytest.raises(ValueError, match="at least one sample"):
        match_widths([a[:0], b[:0]], TABLE)
