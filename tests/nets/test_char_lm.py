"""Tests of wellposed.nets.char_lm."""

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.nets.char_lm import CharLM

CASES = {
    "CharLM": Case(
        inputs=lambda g: (torch.randint(0, 5, (2, 3, 4), generator=g),),
        call=lambda tokens: CharLM(5, 4, 6, seeds=(0, 1)).to(tokens.device)(tokens),
        keeps_dtype=False,
    ),
}


def test_forward_is_the_definition():
    """One context at a time; fails if embeddings are summed instead of joined."""
    net = CharLM(5, 3, 4, depth=2, embed_dim=2, seeds=(0, 1)).double()
    tokens = torch.randint(0, 5, (2, 6, 3), generator=torch.Generator().manual_seed(0))
    logits = net(tokens)
    table, *layers = [part[1] for part in net.parts(net.weights)]
    h = torch.cat([table[t] for t in tokens[1, 4].tolist()])
    for layer in layers[:-1]:
        h = (h @ layer).clamp(min=0)
    torch.testing.assert_close(logits[1, 4], h @ layers[-1])


def test_start():
    """He's variances, and equal seeds make equal networks."""
    net = CharLM(50, 8, 64, seeds=(1, 1, 2))
    table, first, *_, last = net.parts(net.weights)
    assert table.std().item() == pytest.approx(1.0, rel=0.05)
    assert first.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert last.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert torch.equal(net.weights[0], net.weights[1])
    assert not torch.equal(net.weights[0], net.weights[2])


def test_the_written_out_gradient_is_autograds():
    """Fails if a ReLU's mask is left out or the softmax's gradient loses its -1."""
    net = CharLM(5, 3, 4, depth=3, embed_dim=2, seeds=(0, 1, 2)).double()
    windows = torch.randint(0, 5, (3, 7, 4), generator=torch.Generator().manual_seed(0))
    losses = net.backward_pass()(windows)
    grad = net.weights.grad.clone()
    net.weights.grad = None
    logits = net(windows[..., :-1])
    each = F.cross_entropy(logits.flatten(0, 1), windows[..., -1].flatten(), reduction="none")
    each.view(3, 7).mean(1).sum().backward()
    torch.testing.assert_close(losses, each.view(3, 7).mean(1).detach())
    torch.testing.assert_close(grad, net.weights.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["vocab_size", "context", "width", "depth", "embed_dim"])
def test_bad_networks(name):
    sizes = {"vocab_size": 5, "context": 4, "width": 6, "depth": 1, "embed_dim": 2}
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        CharLM(**(sizes | {name: 0}))


def test_bad_tokens_and_seeds():
    with pytest.raises(ValueError, match=r"tokens must have shape \(1, b, 4\)"):
        CharLM(5, 4, 6)(torch.zeros(1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="seeds must hold"):
        CharLM(5, 4, 6, seeds=())
