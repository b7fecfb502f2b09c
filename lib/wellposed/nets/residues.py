"""Networks that read two residues and answer with a third one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GrokkingMLP", "GrokkingTransformer"]


class GrokkingMLP(nn.Module):
    r"""ReLU, two hidden layers, no biases, on two one-hot residues.

    Sizes $2p\to$ width $\to$ width $\to p$. Without biases it is homogeneous of degree 3: scaling
    all weights by $c>0$ scales the logits by $c^3$. Initialized as PyTorch's linear layers.

    Args:
        p: modulus, at least 2.
        width: units in each hidden layer.

    Input: pairs of residues, int64, shape (N, 2). Output: logits, shape (N, p).

    Source: Prieto et al. (2025), arXiv 2501.04697, experimental settings: p = 113, width = 200.

    Example:
        >>> sum(w.numel() for w in GrokkingMLP(5, width=10).parameters())  # 100 + 100 + 50
        250
    """

    def __init__(self, p: int, width: int = 200) -> None:
        super().__init__()
        if p < 2 or width < 1:
            raise ValueError(f"p must be >= 2 and width >= 1, got p={p}, width={width}")
        self.p = p
        # Transposed against nn.Linear: row a is the column that the one-hot code of a selects.
        self.first = nn.Parameter(torch.empty(2 * p, width).uniform_(-1, 1) / (2 * p) ** 0.5)
        self.hidden = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, p, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (N, p) of residue pairs (N, 2)."""
        _check_pairs(pairs)
        left, right = self.first[: self.p], self.first[self.p :]
        x = F.embedding(pairs[:, 0], left) + F.embedding(pairs[:, 1], right)  # (N, width)
        return self.output(F.relu(self.hidden(F.relu(x))))  # type: ignore[no-any-return]


class GrokkingTransformer(nn.Module):
    """A one-layer transformer that reads the two residues as tokens and answers at the last one.

    Multi-head attention and a ReLU feed-forward block, each with a residual connection and a layer
    norm after it; no position code, no dropout.

    Args:
        p: modulus and vocabulary size, at least 2.
        width: embedding size, divisible by `heads`.
        heads: attention heads.
        feedforward: hidden units of the feed-forward block.

    Input: pairs of residues, int64, shape (N, 2). Output: logits, shape (N, p).

    Source: Prieto et al. (2025), arXiv 2501.04697, Fig. 6; width 128 and 4 heads. The authors'
    code takes PyTorch's encoder layer with its defaults, hence 2048 feed-forward units (and dropout
    0.1, left out here so that runs stay deterministic).

    Example:
        >>> GrokkingTransformer(5, width=8, heads=2, feedforward=16)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 5])
    """

    def __init__(self, p: int, width: int = 128, heads: int = 4, feedforward: int = 2048) -> None:
        super().__init__()
        if p < 2 or heads < 1 or width % heads:
            raise ValueError(
                f"p must be >= 2 and width divisible by heads, got p={p}, width={width}, "
                f"heads={heads}"
            )
        self.heads = heads
        self.embedding = nn.Embedding(p, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.mix.bias)
        self.norm_attention = nn.LayerNorm(width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.norm_feedforward = nn.LayerNorm(width)
        self.output = nn.Linear(width, p)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (N, p) of residue pairs (N, 2)."""
        _check_pairs(pairs)
        tokens = self.embedding(pairs)  # (N, 2, width)
        # (N, 2, 3 * width) -> three of (N, heads, 2, width / heads)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Only the last token is read out, so only its query is needed.
        scores = q[:, :, -1:] @ k.transpose(-1, -2) / k.shape[-1] ** 0.5  # (N, heads, 1, 2)
        attended = (scores.softmax(dim=-1) @ v).flatten(1)  # (N, width)
        x = self.norm_attention(tokens[:, -1] + self.mix(attended))
        x = self.norm_feedforward(x + self.contract(F.relu(self.expand(x))))
        return self.output(x)  # type: ignore[no-any-return]


def _check_pairs(pairs: Tensor) -> None:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(
            f"pairs must be int64 of shape (N, 2), got {pairs.dtype} {tuple(pairs.shape)}"
        )
