"""Tests of wellposed.nets.transformer."""

import math

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.nets.transformer import Transformer, embed_side_by_side

CASES = {
    "Transformer": Case(
        inputs=lambda g: (torch.randint(0, 5, (2, 3, 4), generator=g),),
        call=lambda tokens: Transformer(5, 4, 6, seeds=(0, 1)).to(tokens.device)(tokens),
        keeps_dtype=False,
        on_device=False,
    ),
    "embed_side_by_side": Case(
        inputs=lambda g: (
            torch.randn(2, 5, 3, generator=g),
            torch.randint(0, 5, (2, 4), generator=g),
        ),
        call=embed_side_by_side,
    ),
}


def tokens_like(net, b=3, t=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, net.vocab_size, (net.size, b, t or net.context), generator=g)


def plain(net, i, sequence):
    """Network i on one sequence, position by position and head by head."""
    own = {name: p[i] for name, p in net.named_parameters()}

    def norm(v, gain=1.0):
        return v / (v.square().mean() + torch.finfo(v.dtype).eps).sqrt() * gain

    h = [own["token"][s] + own["position"][k] for k, s in enumerate(sequence.tolist())]
    size = net.width // net.heads
    for d in range(net.depth):
        qkv = [norm(v, own[f"mix_norm_{d}"]) @ own[f"qkv_{d}"] for v in h]
        mixed = []
        for k in range(len(h)):
            seen = range(k + 1) if net.causal else range(len(h))
            heads = []
            for a in range(net.heads):
                part = slice(a * size, (a + 1) * size)
                q = qkv[k][: net.width][part]
                keys = [qkv[j][net.width : 2 * net.width][part] for j in seen]
                if net.qk_norm:
                    q, keys = norm(q), [norm(key) for key in keys]
                weight = torch.stack([q @ key / math.sqrt(size) for key in keys]).softmax(0)
                values = torch.stack([qkv[j][2 * net.width :][part] for j in seen])
                heads.append(weight @ values)
            mixed.append(torch.cat(heads) @ own[f"mix_{d}"])
        h = [v + m for v, m in zip(h, mixed, strict=True)]
        h = [
            v + F.gelu(norm(v, own[f"up_norm_{d}"]) @ own[f"up_{d}"]) @ own[f"down_{d}"] for v in h
        ]
    return torch.stack([norm(v, own["head_norm"]) @ own["head"] for v in h])


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"causal": False}, {"outputs": 3}])
def test_forward_is_the_definition(options):
    """Fails if the mask, the scale of attention, a norm or the split into heads is another one."""
    net = Transformer(7, 5, 8, depth=2, heads=2, seeds=(0, 1), mlp_ratio=3, **options).double()
    with torch.no_grad():
        for p in net.parameters():  # gains other than one
            p.mul_(1 + 0.1 * torch.arange(p.shape[-1]))
    tokens = tokens_like(net, t=4)
    logits = net(tokens)
    assert logits.shape == (2, 3, 4, options.get("outputs", 7))
    for i in range(2):
        torch.testing.assert_close(logits[i, 1], plain(net, i, tokens[i, 1]), rtol=1e-9, atol=1e-9)


def test_later_tokens_do_not_matter():
    """Fails without the causal mask."""
    net = Transformer(7, 6, 8, heads=2)
    tokens = tokens_like(net)
    other = tokens.clone()
    other[..., 4:] = (other[..., 4:] + 1) % 7
    torch.testing.assert_close(net(tokens)[:, :, :4], net(other)[:, :, :4])
    assert not torch.allclose(net(tokens)[:, :, 4:], net(other)[:, :, 4:])


def test_networks_do_not_touch_each_other():
    """Gradient of one network's loss is zero for the other; alone it computes the same."""
    pair = Transformer(7, 5, 8, seeds=(3, 4)).double()
    tokens = tokens_like(pair)
    out = pair(tokens)
    alone = Transformer(7, 5, 8, seeds=(4,)).double()
    torch.testing.assert_close(out[1], alone(tokens[1:])[0])
    out[0].square().sum().backward()
    for p in pair.parameters():
        assert p.grad[0].any()
        assert not p.grad[1].any()


def test_start():
    """Scales at the start, and seeds; fails if residual matrices are not made smaller."""
    net = Transformer(50, 8, 64, depth=8, seeds=(1, 1, 2))
    assert net.size == 3
    assert torch.equal(net.up_0[0], net.up_0[1])
    assert not torch.equal(net.up_0[0], net.up_0[2])
    assert net.up_0.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert net.mix_0.std().item() == pytest.approx(1 / 8 / 4, rel=0.05)
    assert net.down_0.std().item() == pytest.approx(1 / 16 / 4, rel=0.05)
    assert net.token.std().item() == pytest.approx(1.0, rel=0.05)
    small = Transformer(50, 8, 64, embed_std=0.02)
    assert small.token.std().item() == pytest.approx(0.02, rel=0.05)


def test_modular_addition_is_fitted():
    """The last position learns a small table: what papers on grokking train it for."""
    p = 5
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    tokens = torch.cat([pairs, torch.full((p * p, 1), p)], dim=1)
    label = pairs.sum(1) % p
    net = Transformer(p + 1, 3, 32, depth=1, heads=2, outputs=p)
    sgd = torch.optim.Adam(net.parameters(), lr=0.003)
    for _ in range(120):
        sgd.zero_grad()
        F.cross_entropy(net(tokens[None])[0, :, -1], label).backward()
        sgd.step()
    assert (net(tokens[None])[0, :, -1].argmax(1) == label).all()


def test_embedding_is_a_lookup():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(3, 4, 2, generator=g)
    tokens = torch.randint(0, 4, (3, 5), generator=g)
    expected = torch.stack([table[i][tokens[i]] for i in range(3)])
    assert torch.equal(embed_side_by_side(table, tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    net = Transformer(7, 5, 8).to(dtype)
    assert net(tokens_like(net)).dtype == dtype


@pytest.mark.parametrize("name", ["vocab_size", "context", "width", "depth", "heads", "mlp_ratio"])
def test_bad_sizes(name):
    sizes = {"vocab_size": 5, "context": 4, "width": 6, "depth": 1, "heads": 1, "mlp_ratio": 4}
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Transformer(**(sizes | {name: 0}))


def test_bad_input():
    with pytest.raises(ValueError, match="multiple of heads"):
        Transformer(5, 4, 6, heads=4)
    with pytest.raises(ValueError, match="seeds must hold"):
        Transformer(5, 4, 6, seeds=())
    with pytest.raises(ValueError, match="outputs must be"):
        Transformer(5, 4, 6, outputs=0)
    net = Transformer(5, 4, 6)
    for shape in ((1, 2, 5), (2, 2, 3), (2, 3)):
        with pytest.raises(ValueError, match=r"tokens must have shape \(1, b, t\)"):
            net(torch.zeros(shape, dtype=torch.long))
