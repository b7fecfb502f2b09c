"""Stacked recurrent networks against torch's own, one network at a time."""

import pytest
import torch

from contract import Case
from wellposed.nets.sequence import StackedGRU, StackedLinear


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_linear_is_each_layer_alone():
    """Fails if the copies share a bias."""
    layer = StackedLinear(3, 4, 2).double()
    x = torch.randn(3, 5, 6, 4, generator=gen(), dtype=torch.float64)
    out = layer(x)
    for i in range(3):
        torch.testing.assert_close(out[i], x[i] @ layer.weight[i] + layer.bias[i])


def test_gru_and_its_gradients_are_those_of_torch():
    """Values and every gradient; fails if the update gate is swapped with its complement."""
    stacked = StackedGRU(2, 3, 4).double()
    peer = torch.nn.GRU(3, 4, batch_first=True).double()
    x = torch.randn(2, 5, 7, 3, generator=gen(), dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 5, 7, 4, generator=gen(1), dtype=torch.float64)
    (stacked(x) * probe).sum().backward()
    for i in range(2):
        with torch.no_grad():
            peer.weight_ih_l0.copy_(stacked.inputs.weight[i].T)
            peer.weight_hh_l0.copy_(stacked.recurrent.weight[i].T)
            peer.bias_ih_l0.copy_(stacked.inputs.bias[i, 0])
            peer.bias_hh_l0.copy_(stacked.recurrent.bias[i, 0])
        peer.zero_grad()
        alone = x.detach()[i].requires_grad_()
        out = peer(alone)[0]
        (out * probe[i]).sum().backward()
        torch.testing.assert_close(stacked(x)[i], out)
        torch.testing.assert_close(x.grad[i], alone.grad)
        for part, name in ((stacked.inputs, "ih"), (stacked.recurrent, "hh")):
            weight, bias = (getattr(peer, f"{what}_{name}_l0") for what in ("weight", "bias"))
            torch.testing.assert_close(part.weight.grad[i], weight.grad.T)
            torch.testing.assert_close(part.bias.grad[i, 0], bias.grad)


def test_gradcheck():
    gru = StackedGRU(1, 2, 2).double()
    x = torch.randn(1, 2, 3, 2, generator=gen(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gru, (x,))


def test_bad_input():
    with pytest.raises(ValueError, match="sizes must be at least 1"):
        StackedLinear(0, 1, 1)
    with pytest.raises(ValueError, match=r"x must be \(2, ..., 3\), got \(1, 5, 3\)"):
        StackedLinear(2, 3, 1)(torch.zeros(1, 5, 3))


def _built(make, x):
    torch.manual_seed(0)
    return make().to(x)(x)


CASES = {
    "StackedLinear": Case(
        inputs=lambda g: (torch.randn(2, 5, 3, generator=g),),
        call=lambda x: _built(lambda: StackedLinear(2, 3, 4), x),
    ),
    "StackedGRU": Case(
        inputs=lambda g: (torch.randn(2, 5, 4, 3, generator=g),),
        call=lambda x: _built(lambda: StackedGRU(2, 3, 4), x),
    ),
}
