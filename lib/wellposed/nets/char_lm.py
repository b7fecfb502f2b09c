"""A small perceptron that predicts the next character, several of it side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets.transformer import embed_side_by_side

__all__ = ["CharLM"]


class CharLM(nn.Module):
    r"""Predict the next character from the last few, by a perceptron; networks side by side.

    The embeddings of the context, joined, go through ReLU layers of one width and a softmax:
    :math:`\mathrm{logits} = W_{k+1} \mathrm{relu}(W_k \cdots \mathrm{relu}(W_1 e))`. No biases;
    weights start with variance 2 / inputs (He), embeddings with variance 1.

    Args:
        vocab_size: number of characters V.
        context: characters seen.
        width: :math:`D`, units of a layer.
        depth: ReLU layers, at least 1.
        embed_dim: size of an embedding.
        seeds: one for each network; equal seeds make equal networks.

    Raises:
        ValueError: an argument out of range.

    Source: Bengio et al. 2003 for the kind.

    Example:
        >>> net = CharLM(5, context=3, width=8, seeds=(0, 1))
        >>> net(torch.zeros(2, 4, 3, dtype=torch.long)).shape
        torch.Size([2, 4, 5])
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        width: int,
        depth: int = 3,
        embed_dim: int = 16,
        *,
        seeds: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "context": context, "width": width}
        for name, size in (sizes | {"depth": depth, "embed_dim": embed_dim}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if len(seeds) == 0:
            raise ValueError("seeds must hold at least one number")
        self.vocab_size, self.context, self.width = vocab_size, context, width
        self.depth, self.seeds = depth, tuple(seeds)
        sources = [torch.Generator().manual_seed(s) for s in self.seeds]
        fan = [context * embed_dim, *[width] * depth, vocab_size]
        self._shapes = [(vocab_size, embed_dim), *pairwise(fan)]
        # One tensor for all weights: an optimizer then makes few calls, which dominate here.
        drawn = [
            torch.stack([torch.randn(shape, generator=g) for g in sources])
            * (math.sqrt(2.0 / shape[0]) if i else 1.0)
            for i, shape in enumerate(self._shapes)
        ]
        self.weights = nn.Parameter(torch.cat([part.flatten(1) for part in drawn], dim=1))

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Views of (n, all) as the table (n, V, embed_dim) and the layers (n, inputs, outputs)."""
        pieces = flat.split([i * o for i, o in self._shapes], dim=1)
        return [p.unflatten(1, shape) for p, shape in zip(pieces, self._shapes, strict=True)]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, b, V) of the character behind contexts, int64 (n, b, context)."""
        if tokens.ndim != 3 or tokens.shape[::2] != (len(self.seeds), self.context):
            raise ValueError(
                f"tokens must have shape ({len(self.seeds)}, b, {self.context}), "
                f"got {tuple(tokens.shape)}"
            )
        table, *layers = self.parts(self.weights)
        h = embed_side_by_side(table, tokens).flatten(2)
        for layer in layers[:-1]:
            h = F.relu(h @ layer)
        return h @ layers[-1]

    def backward_pass(self) -> Callable[[Tensor], Tensor]:
        """A function that sets the gradient of the summed losses and returns each one, (n,).

        It takes windows, int64 (n, b, context + 1), the last token to be predicted. The backward
        pass is written out, on views made once: small networks spend their time in calls, and
        autograd makes three times as many.
        """
        weights = self.weights.detach()
        grad = torch.empty_like(weights)
        (table, *layers), (grad_table, *grad_layers) = self.parts(weights), self.parts(grad)
        flipped = [layer.mT for layer in layers]
        n = len(weights)
        shift = (self.vocab_size * torch.arange(n, device=weights.device))[:, None, None]
        minus = weights.new_full((), -1.0)

        def losses(windows: Tensor) -> Tensor:
            b = windows.shape[1]
            rows = (windows[..., :-1] + shift).flatten()
            hidden = [table.reshape(-1, table.shape[2])[rows].view(n, b, -1)]
            for layer in layers[:-1]:
                hidden.append(torch.bmm(hidden[-1], layer).relu_())
            scores = torch.log_softmax(torch.bmm(hidden[-1], layers[-1]), dim=2)
            target = windows[..., -1:]
            each = scores.gather(2, target).mean((1, 2)).neg_()
            back = scores.exp_().scatter_add_(2, target, minus.expand_as(target)).div_(b)
            for i in reversed(range(len(layers))):
                grad_layers[i].copy_(torch.bmm(hidden[i].mT, back))
                back = torch.bmm(back, flipped[i])
                if i:
                    back.mul_(hidden[i] > 0)
            sums = torch.zeros_like(table).flatten(0, 1)
            grad_table.copy_(sums.index_add_(0, rows, back.view(len(rows), -1)).view_as(table))
            self.weights.grad = grad
            return each

        return losses
