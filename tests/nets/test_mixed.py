"""A mixture of operations and bits; its networks are compared one by one in test_superres."""

import pytest
import torch

from contract import Case
from wellposed.nets.mixed import SURROGATES, MixedConv2d
from wellposed.nets.superres import Block, convolve


def mixed(x, probs, surrogate="noise", bits=(4, 8)):
    """A mixture of two operations on the device of its inputs, with the noise of seed 0."""
    block, drawn = Block(2, 4, ("1x1", "3x3/2")), [torch.Generator().manual_seed(0)]
    conv = MixedConv2d(block, bits, drawn, surrogate).to(x)
    return conv(x, probs, torch.Generator(x.device).manual_seed(0)), conv


def test_a_sure_choice_of_many_bits_is_a_plain_convolution():
    """Fails if the probabilities are read in another order, or the ReLU is left out."""
    x = torch.randn(3, 1, 2, 5, 5, dtype=torch.float64)
    out, conv = mixed(x, torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64), bits=(4, 32))
    torch.testing.assert_close(out, convolve(x.relu(), conv.weights[0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 3), (2, 4)])
def test_bad_probabilities(shape):
    with pytest.raises(ValueError, match=r"probs must be \(1, 4\)"):
        mixed(torch.rand(3, 1, 2, 5, 5), torch.rand(shape))


CASES = {
    "MixedConv2d": Case(
        inputs=lambda g: (torch.randn(2, 1, 2, 4, 4, generator=g), torch.rand(1, 4, generator=g)),
        call=lambda x, p: [mixed(x, p, s)[0].detach() for s in SURROGATES],
        on_device=False,
    ),
}
