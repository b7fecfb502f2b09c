"""Numbers in intervals, and back."""

import math

import pytest
import torch

from contract import Case
from wellposed.ops.intervals import from_interval, to_interval


def test_intervals_are_inverse_and_have_known_values():
    low, high = [0.0, -5.0], [0.9, -1.0]
    value = torch.tensor([[0.05, -4.0], [0.8, -1.5]], dtype=torch.float64)
    raw = from_interval(value, low, high)
    torch.testing.assert_close(to_interval(raw, low, high), value)
    assert raw[0, 0].item() == pytest.approx(math.log(0.05 / 0.85))
    for call in (to_interval, from_interval):
        with pytest.raises(ValueError, match="low must be below high"):
            call(value, [0.0, 1.0], [1.0, 1.0])
        with pytest.raises(ValueError, match="must hold 1 values"):
            call(value, [0.0], [1.0])
    with pytest.raises(ValueError, match="strictly inside"):
        from_interval(torch.tensor([1.0]), [0.0], [1.0])


CASES = {
    "to_interval": Case(
        inputs=lambda g: (torch.randn(3, 2, generator=g),),
        call=lambda raw: to_interval(raw, [0.0, 1.0], [1.0, 3.0]),
    ),
    "from_interval": Case(
        inputs=lambda g: (torch.rand(3, 2, generator=g),),
        call=lambda value: from_interval(value, [-0.1, -0.1], [1.1, 1.1]),
    ),
}
