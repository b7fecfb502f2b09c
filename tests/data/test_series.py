"""The recordings, and the ways in which their entries go missing."""

import pytest
import torch

from wellposed.data import series


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_recordings_are_those_of_the_file():
    """Counts, lengths and the first values; fails if channels and steps are swapped."""
    train, test = series.japanese_vowels()
    assert train.x.shape == (270, 29, 12)
    assert test.x.shape == (370, 29, 12)
    assert train.y.bincount().tolist() == [30] * 9
    assert test.y.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert (int(train.lengths.min()), int(test.lengths.max())) == (7, 29)
    assert train.x[0, :2, 0].tolist() == pytest.approx([1.860936, 1.891651])
    assert train.x[0, 0, :2].tolist() == pytest.approx([1.860936, -0.207383])
    assert not train.x[0, int(train.lengths[0]) :].any()


def test_steps_cut():
    train, _ = series.japanese_vowels(steps=8)
    whole, _ = series.japanese_vowels()
    assert torch.equal(train.x, whole.x[:, :8])
    assert int(train.lengths.max()) == 8
    with pytest.raises(ValueError, match="steps must be at least 1"):
        series.japanese_vowels(steps=0)


@pytest.mark.parametrize(
    "hide", [series.missing_at_random, series.missing_in_blocks, series.missing_channels]
)
@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_rates_hold_and_padding_is_never_seen(hide, rate):
    """Fails if ``rate`` is the share that stays; 4 standard errors of wiggle room."""
    x, lengths = torch.zeros(2000, 11, 3), torch.randint(3, 12, (2000,), generator=gen())
    mask = hide(x, lengths, rate=rate, generator=gen(1))
    valid = series.valid_steps(lengths, 11)
    assert not mask[~valid].any()
    share = mask[valid].float().mean()
    lift = (1 - rate) / 3 if hide is series.missing_channels else 0.0
    assert 1 - rate - 0.03 < share < 1 - rate + 0.03 + lift


def test_blocks_are_one_run_and_channels_are_whole():
    x, lengths = torch.zeros(50, 10, 4), torch.full((50,), 10)
    mask = series.missing_in_blocks(x, lengths, rate=0.5, generator=gen())
    turns = (mask != mask.roll(1, 1)).sum(1)  # on a circle a run has two ends
    assert turns.unique().tolist() == [2]
    mask = series.missing_channels(x, lengths, rate=0.9, generator=gen())
    assert torch.equal(mask.all(1), mask.any(1))
    assert mask.any(2).all()


def test_values_decide_what_is_missing():
    """Large values go; fails if the slope's sign flips."""
    x = torch.randn(500, 6, 2, generator=gen())
    lengths = torch.full((500,), 6)
    mask = series.missing_by_value(x, lengths, slope=2.0, generator=gen(1))
    assert x[mask].mean() < -0.3 < 0.3 < x[~mask].mean()
    even = series.missing_by_value(x, lengths, slope=0.0, generator=gen(1))
    assert abs(float(even.float().mean()) - 0.5) < 0.03


def test_standardize_reads_only_what_is_observed():
    """NaN in the gaps does no harm; fails if hidden values enter the mean."""
    x = torch.randn(20, 5, 2, generator=gen(), dtype=torch.float64) * 3 + 1
    mask = torch.rand(2, 20, 5, 2, generator=gen(1)) > 0.4
    hidden = torch.where(mask.any(0), x, torch.nan)
    out = series.standardize(hidden, mask, x)[0]
    for i in range(2):
        for d in range(2):
            seen = out[i][..., d][mask[i][..., d]]
            assert abs(float(seen.mean())) < 1e-12
            assert float(seen.square().mean()) == pytest.approx(1.0)


def test_bad_input():
    x, lengths = torch.zeros(2, 3, 1), torch.full((2,), 3)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
        series.missing_at_random(x, lengths, rate=1.0, generator=gen())
    with pytest.raises(ValueError, match="lengths"):
        series.missing_in_blocks(x, lengths[:1], rate=0.5, generator=gen())
    with pytest.raises(ValueError, match="two different observed values"):
        series.standardize(x, torch.ones_like(x, dtype=torch.bool), x)
    with pytest.raises(ValueError, match="mask must be"):
        series.standardize(x, torch.ones(1, 3, 1, dtype=torch.bool), x)
