"""Networks that read two residues."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contract import Case, module_call
from wellposed.nets.residues import GrokkingMLP, GrokkingTransformer


def _pairs(g, p=5, n=6):
    return (torch.randint(0, p, (n, 2), generator=g),)


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def test_mlp_is_the_network_on_one_hot_inputs(g):
    """Fails if the second residue reads the first one's rows."""
    model = GrokkingMLP(7, 16).double()
    (pairs,) = _pairs(g, p=7)
    one_hot = torch.cat([F.one_hot(pairs[:, 0], 7), F.one_hot(pairs[:, 1], 7)], dim=1).double()
    hidden = F.relu(F.relu(one_hot @ model.first) @ model.hidden.weight.T)
    torch.testing.assert_close(model(pairs), hidden @ model.output.weight.T)


def test_mlp_starts_like_pytorchs_linear_layers():
    torch.manual_seed(0)
    first = GrokkingMLP(50, 200).first.detach()
    bound = 1 / math.sqrt(100)
    assert float(first.abs().max()) <= bound
    assert float(first.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not any("bias" in name for name, _ in GrokkingMLP(5).named_parameters())
    assert [w.shape[-1] for w in GrokkingMLP(5, 9).parameters()] == [9, 9, 9]


def test_transformer_matches_pytorchs_encoder_layer(g):
    """Same weights in torch's own layer, read at the last token.

    Fails if the first token is read, a residual is dropped or the scores lack 1/sqrt(d).
    """
    model = GrokkingTransformer(7, width=8, heads=2, feedforward=16).double()
    peer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    for ours, theirs in (
        (model.mix, peer.self_attn.out_proj),
        (model.expand, peer.linear1),
        (model.contract, peer.linear2),
        (model.norm_attention, peer.norm1),
        (model.norm_feedforward, peer.norm2),
    ):
        theirs.load_state_dict(ours.state_dict())
    peer.self_attn.in_proj_weight.data.copy_(model.qkv.weight)
    peer.self_attn.in_proj_bias.data.copy_(model.qkv.bias)
    (pairs,) = _pairs(g, p=7)
    expected = model.output(peer(model.embedding(pairs))[:, -1])
    torch.testing.assert_close(model(pairs), expected)


@pytest.mark.parametrize("build", [GrokkingMLP, GrokkingTransformer])
def test_networks_refuse_bad_input(build):
    model = build(5, 8)
    for pairs in (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match=r"pairs must be int64 of shape \(N, 2\)"):
            model(pairs)
    with pytest.raises(IndexError):
        model(torch.tensor([[0, 5]]))
    with pytest.raises(IndexError):
        model(torch.tensor([[5, 0]]))
    with pytest.raises(ValueError, match="p must be >= 2"):
        build(1, 8)


def test_transformer_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="width divisible by heads"):
        GrokkingTransformer(5, width=9, heads=2)


CASES = {
    "GrokkingMLP": Case(
        inputs=lambda g: (*_pairs(g), torch.ones(1)),
        call=module_call(lambda: GrokkingMLP(5, 8)),
    ),
    "GrokkingTransformer": Case(
        inputs=lambda g: (*_pairs(g), torch.ones(1)),
        call=module_call(lambda: GrokkingTransformer(5, 8, heads=2, feedforward=16)),
    ),
}
