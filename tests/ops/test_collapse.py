"""Tests of wellposed.ops.collapse; the formulas are tested with the method that uses them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.collapse import balanced_one_hot, collapse_metrics, within_span_of_means

LABELS = torch.tensor([2, 0, 1, 1, 2, 0])


def _case(function):
    return Case(
        inputs=lambda g: (torch.randn(2, 6, 4, generator=g),),
        call=lambda h: function(h, LABELS.to(h.device)),
    )


CASES = {f.__name__: _case(f) for f in (balanced_one_hot, collapse_metrics, within_span_of_means)}


def _random(k, n, d, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(k * n, d, generator=g, dtype=dtype), torch.arange(k).repeat(n)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(2, 5),
    n=st.integers(1, 4),
    d=st.integers(1, 6),
    power=st.integers(-40, 37),
    seed=st.integers(0, 99),
    flat=st.booleans(),
)
def test_never_nan_at_any_scale(k, n, d, power, seed, flat):
    """Ratios do not depend on the scale, up to the ends of float32; fails without the scaling."""
    h, y = _random(k, n, d, seed, torch.float32)
    h = h * float(not flat)
    found = collapse_metrics(h * 10.0**power, y)
    plain = collapse_metrics(h, y)
    for name in ("nc1_ratio", "nc1_pinv", "nc2"):
        assert not getattr(found, name).isnan().any()
        if power > -30 and (name != "nc1_pinv" or d >= k):
            torch.testing.assert_close(
                getattr(found, name), getattr(plain, name), rtol=1e-2, atol=1e-4
            )


def test_coinciding_means_are_not_collapse():
    """A vanishing covariance of the means gives infinity; fails if the pseudo-inverse gives 0."""
    h = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    found = collapse_metrics(h, torch.tensor([0, 0, 1, 1]))
    assert found.nc1_ratio == torch.inf
    assert found.nc1_pinv == torch.inf
    assert found.nc2 == 1
    assert collapse_metrics(torch.zeros(4, 1), torch.tensor([0, 0, 1, 1])).nc1_ratio == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pinv_where_the_means_lie_on_a_line(dtype):
    """Rank below K - 1: noise must not be divided by; fails without the cutoff."""
    h, y = _random(4, 5, 6, dtype=dtype)
    means = torch.outer(torch.arange(4, dtype=dtype), torch.ones(6, dtype=dtype))
    centered = h - balanced_one_hot(h, y) @ (balanced_one_hot(h, y).T @ h / 5)
    found = collapse_metrics(centered + means[y], y)
    assert abs(found.between.item() / 7.5 - 1) < 1e-5
    power = (centered.double() @ torch.ones(6, dtype=torch.float64)).square().mean() / 6
    assert abs(found.nc1_pinv.item() / (power.item() / 7.5 / 4) - 1) < 1e-3


def test_batch_is_one_by_one():
    """Leading axes are a batch."""
    h, y = _random(3, 4, 5)
    both = torch.stack([h, h.flip(0) ** 2])
    for name, value in vars(collapse_metrics(both, y)).items():
        torch.testing.assert_close(value[1], getattr(collapse_metrics(both[1], y), name))
    torch.testing.assert_close(within_span_of_means(both, y)[0], within_span_of_means(h, y))


def test_span_of_the_means():
    """A projection: with as many classes as dimensions all of it, along chosen axes a part."""
    h, y = _random(3, 4, 3)
    torch.testing.assert_close(within_span_of_means(h, y), collapse_metrics(h, y).within)
    h, y = _random(2, 50, 5)
    h = h - balanced_one_hot(h, y) @ (balanced_one_hot(h, y).T @ h / 50)
    part = h[:, :2].square().sum() / 100
    torch.testing.assert_close(within_span_of_means(h + 3 * torch.eye(5)[y], y), part)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: collapse_metrics(torch.ones(2, 2), torch.tensor([0, 0])), "at least 2 classes"),
        (lambda: collapse_metrics(torch.ones(3, 2), torch.tensor([0, 0, 1])), "balanced"),
        (lambda: collapse_metrics(torch.ones(2, 2), torch.tensor([0, 2])), "balanced"),
        (lambda: collapse_metrics(torch.ones(2, 2), torch.tensor([0, -1])), "at least 0"),
        (lambda: collapse_metrics(torch.ones(2), torch.tensor([0, 1])), "float tensor"),
        (lambda: collapse_metrics(torch.ones(2, 2).int(), torch.tensor([0, 1])), "float tensor"),
        (lambda: collapse_metrics(torch.ones(2, 2), torch.tensor([0.0, 1.0])), "int64"),
        (lambda: balanced_one_hot(torch.tensor([[torch.nan]]), torch.tensor([0])), "finite"),
        (lambda: within_span_of_means(torch.ones(2, 1), torch.tensor([0, 1])), "at least 2 dim"),
    ],
)
def test_bad_input(call, message):
    """The text names the argument."""
    with pytest.raises(ValueError, match=message):
        call()
