"""A small decoder-only transformer, several networks of it side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Transformer", "embed_side_by_side"]


def embed_side_by_side(table: Tensor, tokens: Tensor) -> Tensor:
    """Look tokens up in a table of their own network.

    Args:
        table: (n, vocab, d), one table a network.
        tokens: int64 (n, ...), entries in [0, vocab).

    Returns:
        (n, ..., d).

    Raises:
        ValueError: shapes that do not fit.

    Source: a lookup for each network.

    Example:
        >>> table = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
        >>> embed_side_by_side(table, torch.tensor([[0, 1], [0, 1]])).squeeze(-1).tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    if table.ndim != 3 or tokens.ndim < 1 or len(tokens) != len(table) or not len(table):
        raise ValueError(
            f"table and tokens must be (n, vocab, d) and (n, ...), got {tuple(table.shape)} and "
            f"{tuple(tokens.shape)}"
        )
    n, vocab, _ = table.shape
    shift = vocab * torch.arange(n, device=tokens.device)
    rows = tokens + shift.view(-1, *[1] * (tokens.ndim - 1))
    return F.embedding(rows, table.flatten(0, 1))


class Transformer(nn.Module):
    r"""Decoder-only transformers of one architecture, with weights stacked on a first axis.

    Each block is :math:`h \leftarrow h + \mathrm{Attn}(\mathrm{norm}(h))`,
    :math:`h \leftarrow h + W_2\,\mathrm{gelu}(W_1\,\mathrm{norm}(h))`, with root-mean-square
    norms, learned positions and no biases. One forward pass serves all networks; no entry of a
    weight acts on two of them, so with an optimizer that treats entries for themselves
    (:class:`wellposed.train.StackedAdam`) and losses summed over networks, each is trained as if it
    were alone.

    Weights start normal: matrices with variance 1 / inputs, those that write to the residual
    stream smaller by the root of twice the depth, embeddings with standard deviation
    ``embed_std``, and the output matrix with that of 1 / width.

    Args:
        vocab_size: number of tokens V.
        context: longest sequence, at least 1.
        width: size D of the residual stream, a multiple of ``heads``.
        depth: blocks, at least 1.
        heads: attention heads.
        seeds: one for each network; equal seeds make equal networks.
        outputs: size of the output, V where it is None.
        mlp_ratio: hidden units of a block's perceptron per unit of width.
        qk_norm: whether queries and keys are normalized to unit root mean square.
        causal: whether a position sees only itself and earlier ones.
        embed_std: standard deviation of the embeddings at the start.

    Raises:
        ValueError: an argument out of range.

    Source: Vaswani et al. 2017, with the norms before the layers and without biases.

    Example:
        >>> twins = Transformer(5, context=4, width=8, heads=2, seeds=(7, 7, 8))
        >>> logits = twins(torch.tensor([[0, 1, 2, 3]]).expand(3, 1, 4))
        >>> logits.shape, torch.equal(logits[0], logits[1]), torch.equal(logits[0], logits[2])
        (torch.Size([3, 1, 4, 5]), True, False)
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        width: int,
        *,
        depth: int = 2,
        heads: int = 1,
        seeds: Sequence[int] = (0,),
        outputs: int | None = None,
        mlp_ratio: int = 4,
        qk_norm: bool = False,
        causal: bool = True,
        embed_std: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "context": context, "width": width, "depth": depth}
        sizes |= {"heads": heads, "mlp_ratio": mlp_ratio}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), got {width}")
        if len(seeds) == 0:
            raise ValueError("seeds must hold at least one number")
        if outputs is not None and outputs < 1:
            raise ValueError(f"outputs must be at least 1, got {outputs}")
        self.vocab_size, self.context, self.width = vocab_size, context, width
        self.depth, self.heads, self.seeds = depth, heads, tuple(seeds)
        self.qk_norm, self.causal = qk_norm, causal
        hidden, small = mlp_ratio * width, 1.0 / math.sqrt(2.0 * depth)
        shapes: dict[str, tuple[tuple[int, int], float]] = {
            "token": ((vocab_size, width), embed_std),
            "position": ((context, width), embed_std),
        }
        for i in range(depth):
            shapes[f"qkv_{i}"] = ((width, 3 * width), width**-0.5)
            shapes[f"mix_{i}"] = ((width, width), small * width**-0.5)
            shapes[f"up_{i}"] = ((width, hidden), width**-0.5)
            shapes[f"down_{i}"] = ((hidden, width), small * hidden**-0.5)
        shapes["head"] = ((width, outputs or vocab_size), width**-0.5)
        sources = [torch.Generator().manual_seed(s) for s in self.seeds]
        for name, (shape, std) in shapes.items():
            drawn = torch.stack([torch.randn(shape, generator=g) for g in sources])
            self.register_parameter(name, nn.Parameter(std * drawn))
        names = [f"{kind}_norm_{i}" for i in range(depth) for kind in ("mix", "up")]
        for name in [*names, "head_norm"]:
            self.register_parameter(name, nn.Parameter(torch.ones(len(self.seeds), width)))

    @property
    def size(self) -> int:
        """How many networks there are side by side."""
        return len(self.seeds)

    def _normed(self, name: str, h: Tensor) -> Tensor:
        """Unit root mean square, times a gain for each unit; h is (n, b * t, width)."""
        gain = self.get_parameter(name)
        return F.rms_norm(h, (h.shape[-1],)) * gain[:, None]

    def _attend(self, i: int, h: Tensor, b: int) -> Tensor:
        """The output of attention, before it is added; h is (n, b * t, width)."""
        n, rows, width = h.shape
        joint = h @ self.get_parameter(f"qkv_{i}")
        parts = joint.view(n * b, rows // b, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (n * b, heads, t, width / heads)
        if self.qk_norm:
            query = F.rms_norm(query, (query.shape[-1],))
            key = F.rms_norm(key, (key.shape[-1],))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(n, rows, width) @ self.get_parameter(f"mix_{i}")

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each position.

        Args:
            tokens: int64 (n, b, t) with t at most ``context``, one slice a network.

        Returns:
            (n, b, t, outputs).

        Raises:
            ValueError: a shape that does not fit.
        """
        if tokens.ndim != 3 or len(tokens) != self.size or tokens.shape[2] > self.context:
            raise ValueError(
                f"tokens must have shape ({self.size}, b, t) with t at most {self.context}, "
                f"got {tuple(tokens.shape)}"
            )
        n, b, t = tokens.shape
        table, place = self.get_parameter("token"), self.get_parameter("position")
        h = (embed_side_by_side(table, tokens) + place[:, None, :t]).flatten(1, 2)
        for i in range(self.depth):
            h = h + self._attend(i, self._normed(f"mix_norm_{i}", h), b)
            wide = self._normed(f"up_norm_{i}", h) @ self.get_parameter(f"up_{i}")
            h = h + F.gelu(wide) @ self.get_parameter(f"down_{i}")
        logits = self._normed("head_norm", h) @ self.get_parameter("head")
        return logits.view(n, b, t, -1)
