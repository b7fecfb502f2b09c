"""Small mixtures of experts side by side, whose router is any function of the gates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wellposed.ops.dispatch import Dispatch

__all__ = ["RoutedExperts"]

Route = Callable[[Tensor], Dispatch]


class RoutedExperts(nn.Module):
    r"""Stem, one layer of routed experts with a shortcut, and head; `s` networks side by side.

    $$h=[xW_1]_+,\qquad p=\mathrm{softmax}(hW_r),\qquad
    \text{logits}=\Bigl(h+\sum_{j\,\ni\,h}p_jf_j(h)\Bigr)W_2$$

    where $j\ni h$ are the experts that got the token. Each expert $f_j$ has one hidden layer and
    runs on its own `capacity` tokens alone. A token that no expert took keeps the shortcut $h$.

    Args:
        num_networks: $s$; sum their losses, do not average them.
        dim: features of a token.
        num_experts: experts in each network.
        width: units of the stem.
        hidden: units of an expert.
        classes: number of logits.
        generator: source of the weights; biases start at zero.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> from wellposed.ops.dispatch import expert_choice
        >>> net = RoutedExperts(2, 3, 4, 8, 8, 10, generator=torch.Generator().manual_seed(0))
        >>> logits, gates, sent = net(torch.ones(2, 5, 3), lambda p: expert_choice(p, 1))
        >>> tuple(logits.shape), tuple(gates.shape), tuple(sent.tokens.shape)
        ((2, 5, 10), (2, 5, 4), (2, 4, 1))
    """

    stem: nn.Parameter
    router: nn.Parameter
    first: nn.Parameter
    second: nn.Parameter
    head: nn.Parameter
    stem_bias: nn.Parameter
    router_bias: nn.Parameter
    first_bias: nn.Parameter
    second_bias: nn.Parameter
    head_bias: nn.Parameter

    def __init__(
        self,
        num_networks: int,
        dim: int,
        num_experts: int,
        width: int,
        hidden: int,
        classes: int,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if min(num_networks, dim, num_experts, width, hidden, classes) < 1:
            raise ValueError("num_networks, dim, num_experts, width, hidden, classes must be >= 1")
        shapes = {
            "stem": (dim, width),
            "router": (width, num_experts),
            "first": (num_experts, width, hidden),
            "second": (num_experts, hidden, width),
            "head": (width, classes),
        }
        for name, shape in shapes.items():
            size = (num_networks, *shape)
            draw = torch.randn(size, generator=generator, device=generator.device)
            bias = torch.zeros(*size[:-2], 1, size[-1], device=generator.device)
            self.register_parameter(name, nn.Parameter(draw * shape[-2] ** -0.5))
            self.register_parameter(f"{name}_bias", nn.Parameter(bias))

    def forward(self, x: Tensor, route: Route) -> tuple[Tensor, Tensor, Dispatch]:
        """Map tokens `(s, m, dim)` to logits, gates `(s, m, num_experts)` and who went where.

        Args:
            x: tokens, one slice a network; they are routed together.
            route: maps the gates, detached, to a :class:`wellposed.ops.dispatch.Dispatch`.
        """
        h = torch.relu(x @ self.stem + self.stem_bias)
        gates = torch.softmax(h @ self.router + self.router_bias, dim=-1)
        sent = route(gates.detach())
        (s, _, width), n = h.shape, gates.shape[-1]
        index = sent.tokens.flatten(1)[..., None].expand(-1, -1, width)  # (s, n * capacity, width)
        inputs = h.gather(1, index).view(s, n, -1, width)
        out = torch.relu(inputs @ self.first + self.first_bias) @ self.second + self.second_bias
        weight = gates.mT.gather(2, sent.tokens) * sent.used
        weighted = (out * weight[..., None]).flatten(1, 2)
        added = torch.zeros_like(h).scatter_add(1, index, weighted)
        return (h + added) @ self.head + self.head_bias, gates, sent
