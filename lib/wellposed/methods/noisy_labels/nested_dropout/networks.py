"""Networks with compressed features side by side, and a regression to look at."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.func import vmap

from wellposed.methods.noisy_labels.nested_dropout.layer import NestedDropout, _by_width
from wellposed.nets import MLP, Stacked
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedAdam, seeded

__all__ = ["CompressedNetworks", "fit_regression"]


class _Affine(torch.autograd.Function):
    """Linear layers side by side, with gradients that lie in memory as the weights do."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight if ctx.needs_input_grad[0] else None, grad.mT @ x, grad.sum(1)


class _Features(Stacked):
    """Networks side by side; fully connected ones go layer by layer, without vmap's detours."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__(networks)
        layers = dict(self.template.named_children())
        linear = {k: type(v) is nn.Linear and v.bias is not None for k, v in layers.items()}
        plain = type(self.template) in (nn.Sequential, MLP)
        self._plain = plain and all(linear[k] or not v.state_dict() for k, v in layers.items())
        self._layers = [(k if linear[k] else None, v) for k, v in layers.items()]

    def forward(self, x: Tensor) -> Tensor:
        if not self._plain:
            return super().forward(x)
        for name, layer in self._layers:
            if name is not None:
                weight, bias = (
                    getattr(self, self._flat(f"{name}.{p}")) for p in ("weight", "bias")
                )
                out: Tensor = _Affine.apply(x.flatten(1, -2), weight, bias)
                x = out.view(*x.shape[:-1], -1)
            elif isinstance(layer, nn.ReLU):
                x = x.relu()
            else:
                x = vmap(layer, randomness="different")(x)
        return x


class CompressedNetworks(nn.Module):
    """Networks of the form (features, compression, linear map without bias), side by side.

    Features and linear maps are stacked; each network has a compression of its own, so that plain
    networks (``nn.Identity``), dropout and nested dropout can be trained in one go.

    Args:
        networks: ``nn.Sequential(features, compression, linear)`` each; they are copied.

    Raises:
        ValueError: no network, or one of another form.

    Source: Section III; the networks of ``nested/model`` in the authors' code.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), NestedDropout(2, 1.0), nn.Linear(2, 1, bias=False))
        >>> pair = CompressedNetworks([net, net])
        >>> pair.by_width(torch.ones(2, 3, 2)).shape  # networks, widths, examples, outputs
        torch.Size([2, 2, 3, 1])
    """

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        super().__init__()
        weights: list[Tensor] = []
        for net in networks:
            linear = net[2] if len(net) == 3 else None
            if not isinstance(linear, nn.Linear) or linear.bias is not None:
                raise ValueError(
                    "networks must each be nn.Sequential(features, compression, "
                    "nn.Linear(..., bias=False))"
                )
            weights.append(linear.weight.detach())
        self.features = _Features([net[0] for net in networks])
        self.compress = nn.ModuleList(copy.deepcopy(net[1]) for net in networks)
        # One linear map a network, (s, C, D).
        self.weight = nn.Parameter(torch.stack(weights))
        kinds = groupby(range(len(networks)), key=lambda i: _kind(networks[i][1], i))
        self._groups = [list(members) for _, members in kinds]
        self._leaders = [self.compress[members[0]] for members in self._groups]

    @torch.no_grad()
    def networks(self) -> list[nn.Sequential]:
        """Copies of the networks as they are now, each a module of its own."""
        copies = []
        for body, compress, weight in zip(self.features.networks(), self.compress, self.weight):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.clone())
            copies.append(nn.Sequential(body, copy.deepcopy(compress), linear))
        return copies

    def subset(self, index: Sequence[int]) -> CompressedNetworks:
        """Copies of some of the networks, as they are now."""
        networks = self.networks()
        return CompressedNetworks([networks[i] for i in index])

    def classify(self, h: Tensor) -> Tensor:
        """Map features (s, b, D) through compression and linear map to outputs (s, b, C)."""
        # Not slices: the gradient of each would be a tensor as large as all of them.
        shares = h.split([len(members) for members in self._groups])
        parts = [self._squeeze(members, own) for members, own in zip(self._groups, shares)]
        return torch.bmm(torch.cat(parts), self.weight.transpose(1, 2))

    def _switch(self, training: bool) -> None:
        """Set the mode of what computes: one layer compresses for all of its group."""
        self.training = training
        self.features.train(training)
        for layer in self._leaders:
            layer.training = training

    def _squeeze(self, members: list[int], h: Tensor) -> Tensor:
        """Compress the features (g, b, D) of neighbors with one kind of compression."""
        layer, width = self.compress[members[0]], h.shape[-1]
        if isinstance(layer, NestedDropout) and not self.training:
            keep = torch.tensor([getattr(self.compress[i], "keep", None) or width for i in members])
            return h * (torch.arange(width, device=h.device) < keep.to(h.device)[:, None, None])
        squeezed: Tensor = layer(h.flatten(0, 1)).view_as(h)
        return squeezed

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (s, b, ...), one slice a network, to outputs (s, b, C)."""
        return self.classify(self.features(x))

    @torch.no_grad()
    def by_width(self, x: Tensor) -> Tensor:
        """Outputs when only the first 1, ..., D channels are kept, shape (s, D, b, C)."""
        return torch.stack([_by_width(h, w) for h, w in zip(self.features(x), self.weight)])


def _kind(layer: nn.Module, place: int) -> tuple[object, ...]:
    """Equal for layers that may treat the examples of several networks as one batch."""
    if isinstance(layer, NestedDropout):
        return (NestedDropout, layer.std, layer.mean, layer.per_sample or place)
    if isinstance(layer, nn.Dropout):
        return (nn.Dropout, layer.p)
    return (nn.Identity,) if isinstance(layer, nn.Identity) else (type(layer), place)


def fit_regression(
    networks: CompressedNetworks,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    steps: int = 1500,
    lr: float = 2e-3,
) -> Tensor:
    """The toy: fit noisy points by full-batch Adam on the squared error.

    Args:
        networks: with one output each; trained in place.
        x: inputs, shape ``(s, n, 1)`` with ``n >= 1``, one slice a network.
        y: noisy values, shape ``(s, n)``.
        seed: source of the masks.
        steps: at least 1.
        lr: step size of Adam.

    Returns:
        The last training error of each network, shape ``(s,)``; a RuntimeWarning if it diverged.

    Raises:
        ValueError: shapes that do not match or are empty, or ``steps`` below 1.

    Source: the toy example of the authors' README, whose data are not published.

    Example:
        >>> x, y = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[2.0, 4.0]])
        >>> net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(1, 1, bias=False))
        >>> nets = CompressedNetworks([net])
        >>> error = fit_regression(nets, x, y, seed=0, steps=500, lr=0.1)
        >>> round(nets.weight.item(), 3)
        2.0
    """
    fits = x.ndim == 3 and x.shape[:2] == y.shape and len(x) == networks.features.size
    if not fits or 0 in y.shape or steps < 1:
        raise ValueError(
            "x and y must have shapes (s, n, 1) and (s, n), one slice a network, and steps must be "
            f"at least 1, got {tuple(x.shape)}, {tuple(y.shape)} and {steps}"
        )
    adam = StackedAdam(networks.parameters(), lr=lr)
    networks.train()
    error = y.new_zeros(len(y))
    with seeded(seed):
        for _ in range(steps):
            error = (networks(x).squeeze(-1) - y).square().mean(1)
            error.sum().backward()
            adam.step()
    networks.eval()
    warn_of_nan("fit_regression", error, *networks.parameters())
    return error.detach()
