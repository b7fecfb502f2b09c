"""Dropout with one rate for each example."""

import pytest
import torch

from contract import Case
from wellposed.nets.dropout import dropout


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_dropout_has_one_rate_an_example():
    """Fails if one rate serves all, or if what is kept is not scaled up."""
    x, rates = torch.ones(3, 100_000), torch.tensor([0.0, 0.3, 0.8])
    out = dropout(x, rates, True, gen())
    torch.testing.assert_close((out == 0).float().mean(1), rates, atol=0.01, rtol=0)
    torch.testing.assert_close(out.mean(1), torch.ones(3), atol=0.02, rtol=0)
    assert dropout(x, rates, False) is x
    with pytest.raises(ValueError, match=r"probability must have shape \(3,\)"):
        dropout(x, torch.zeros(2), True)


def test_a_rate_of_one_drops_everything():
    """Fails if zero is divided by the probability of being kept."""
    assert dropout(torch.ones(2, 3), torch.ones(2), True).tolist() == [[0.0] * 3] * 2


CASES = {
    "dropout": Case(
        inputs=lambda g: (torch.randn(3, 2, generator=g), torch.rand(3, generator=g)),
        call=lambda x, p: dropout(x, p, True, torch.Generator(x.device).manual_seed(0)),
        on_device=False,
    ),
}
