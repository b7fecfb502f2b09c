"""A convolutional network for prediction, which skips the channels that masks switch off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from time import thread_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Deployed", "MaskPredictor", "fastest_seconds"]


class MaskPredictor(nn.Module):
    r"""A head: pooled input of a layer -> (softmax over channels) -> linear map -> logits.

    Args:
        in_channels: channels of the layer's input, at least 1.
        out_channels: filters of the layer, at least 1.
        pool: ``"max"`` or ``"mean"`` over space.
        softmax: whether the pooled channels pass through a softmax.

    Raises:
        ValueError: a width below 1, or another ``pool``.

    Source: Elkerdawy et al. 2022, method figure (max pooling); the authors' code (softmax).

    Example:
        >>> head = MaskPredictor(1, 2, softmax=False)
        >>> _ = head.linear.weight.data.fill_(1.0), head.linear.bias.data.zero_()
        >>> head(torch.tensor([[[[3.0, 1.0]]]])).tolist()
        [[3.0, 3.0]]
    """

    def __init__(
        self, in_channels: int, out_channels: int, pool: str = "max", softmax: bool = True
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels) < 1 or pool not in ("max", "mean"):
            raise ValueError(
                "in_channels and out_channels must be at least 1 and pool 'max' or 'mean', got "
                f"{in_channels}, {out_channels}, {pool!r}"
            )
        self.pool, self.softmax = pool, softmax
        self.linear = nn.Linear(in_channels, out_channels)

    def summary(self, x: Tensor) -> Tensor:
        """Pool ``(n, c, h, w)`` over space."""
        return x.amax((2, 3)) if self.pool == "max" else x.mean((2, 3))

    def decide(self, pooled: Tensor) -> Tensor:
        """Map pooled channels ``(n, c)`` to logits ``(n, out_channels)``."""
        out: Tensor = self.linear(pooled.softmax(1) if self.softmax else pooled)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Map a layer's input ``(n, c, h, w)`` to logits ``(n, out_channels)``."""
        return self.decide(self.summary(x))


class Deployed:
    """A trained network for prediction only, with normalization folded into the convolutions.

    The network is a chain of layers (3 x 3 convolution with padding, batch normalization, ReLU),
    then a mean over space and a linear map. It may have one head a layer that says, from the
    layer's input, which of its filters are wanted.

    Args:
        stages: convolution and normalization of each layer.
        classifier: the linear map.
        heads: one for each layer; without heads only ``dense`` works.

    Raises:
        ValueError: another number of heads than layers.

    Example:
        >>> conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        >>> net = Deployed([(conv, nn.BatchNorm2d(2))], nn.Linear(2, 3))
        >>> net.dense(torch.ones(4, 1, 5, 5)).shape
        torch.Size([4, 3])
    """

    @torch.no_grad()
    def __init__(
        self,
        stages: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]],
        classifier: nn.Linear,
        heads: Sequence[MaskPredictor] = (),
    ) -> None:
        if len(heads) not in (0, len(stages)):
            raise ValueError(f"heads must be none or {len(stages)}, got {len(heads)}")
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        for conv, norm in stages:
            mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            scale = norm.weight * (var + norm.eps).rsqrt()
            self.weights.append(conv.weight * scale[:, None, None, None])
            self.biases.append(norm.bias - mean * scale)
        self.strides = [conv.stride for conv, _ in stages]
        self.heads = copy.deepcopy(list(heads))
        self.classifier = copy.deepcopy(classifier)

    @torch.no_grad()
    def calibrate(self, x: Tensor, shares: Sequence[float]) -> None:
        """Shift the heads' biases so that each filter is active on a given share of images.

        Args:
            x: images ``(n, channels, h, w)``.
            shares: one number in (0, 1] a layer.

        Raises:
            ValueError: not one share a layer, or one out of range.
        """
        if len(shares) != len(self.heads) or not all(0.0 < share <= 1.0 for share in shares):
            raise ValueError(f"shares must be {len(self.heads)} numbers in (0, 1], got {shares}")
        for weight, bias, stride, head, share in zip(*self._layers(), shares):
            cut = head(x).sort(dim=0).values[round((1.0 - share) * (len(x) - 1))]
            head.linear.bias.sub_(cut - 1e-6)  # the value at the cut itself is active
            mask = (head(x).sigmoid() > 0.5).to(x.dtype)
            x = _convolve(x, weight, bias, stride).relu_().mul_(mask[:, :, None, None])

    @torch.no_grad()
    def dense(self, x: Tensor) -> Tensor:
        """Class scores without masks."""
        for weight, bias, stride in zip(self.weights, self.biases, self.strides):
            x = F.conv2d(x, weight, bias, stride, 1).relu_()
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out

    @torch.no_grad()
    def masked(self, x: Tensor) -> Tensor:
        """Class scores with masks, by computing everything and multiplying by zero."""
        for weight, bias, stride, head in zip(*self._layers()):
            mask = (head(x).sigmoid() > 0.5).to(x.dtype)
            x = F.conv2d(x, weight, bias, stride, 1).relu_().mul_(mask[:, :, None, None])
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out

    @torch.no_grad()
    def skipping(self, x: Tensor, group: int = 1) -> tuple[Tensor, Tensor]:
        """Class scores with masks, computing only filters and input channels that are needed.

        Args:
            x: images ``(n, channels, h, w)``.
            group: so many images are computed together, with the filters that any of them needs.

        Returns:
            Class scores ``(n, classes)``, and the multiply-adds of the convolutions that were
            carried out for each image, ``(n,)`` int64.

        Raises:
            ValueError: ``group`` below 1, or a network without heads.
        """
        if group < 1:
            raise ValueError(f"group must be at least 1, got {group}")
        runs = [self._skip(part) for part in x.split(group)]
        scores = torch.cat([score for score, _ in runs])
        return scores, torch.cat([x.new_full((len(s),), m, dtype=torch.int64) for s, m in runs])

    def _layers(
        self,
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[int, ...]], list[MaskPredictor]]:
        if not self.heads:
            raise ValueError("heads are needed for masks, and this network has none")
        return self.weights, self.biases, self.strides, self.heads

    def _skip(self, x: Tensor) -> tuple[Tensor, int]:
        live, macs = torch.arange(x.shape[1], device=x.device), 0  # channels of x that exist
        for weight, bias, stride, head in zip(*self._layers()):
            pooled = x.new_zeros(len(x), weight.shape[1]).index_copy_(1, live, head.summary(x))
            mask = head.decide(pooled).sigmoid() > 0.5
            active = mask.any(0).nonzero()[:, 0]
            weight, bias = weight.index_select(0, active), bias.index_select(0, active)
            if len(live) < weight.shape[1]:
                weight = weight.index_select(1, live)
            x = _convolve(x, weight, bias, stride).relu_()
            if len(mask) > 1:
                x.mul_(mask.index_select(1, active)[:, :, None, None])
            macs += weight.numel() * x.shape[2] * x.shape[3]
            live = active
        pooled = x.new_zeros(len(x), self.classifier.in_features)
        scores: Tensor = self.classifier(pooled.index_copy_(1, live, x.mean((2, 3))))
        return scores, macs


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Convolution 3 x 3 with padding; also without channels on one side, which torch refuses."""
    if weight.numel() > 0:
        return F.conv2d(x, weight, bias, stride, 1)
    height, width = (-(-size // s) for size, s in zip(x.shape[2:], stride))
    return bias[:, None, None].expand(len(x), len(bias), height, width).clone()


def fastest_seconds(calls: Sequence[Callable[[], object]], *, repeats: int = 5) -> list[float]:
    """Time that each of several functions takes on this thread: the fastest of several rounds.

    In each round all functions are called in turn, so that what slows the machine down for a while
    slows all of them down. Time in which the thread waits for the processor does not count, so on
    a busy machine too it is what a clock would show on an idle one. It does not wait for a GPU.

    Args:
        calls: functions without arguments.
        repeats: rounds that count, at least 1; one more is for warming up.

    Returns:
        Seconds, one number a function.

    Raises:
        ValueError: ``repeats`` below 1.

    Example:
        >>> quick, slow = fastest_seconds([lambda: None, lambda: sum(range(100000))])
        >>> quick < slow
        True
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    rounds = []
    for _ in range(repeats + 1):
        marks = [thread_time()]
        for call in calls:
            call()
            marks.append(thread_time())
        rounds.append([after - before for before, after in pairwise(marks)])
    return [min(times) for times in zip(*rounds[1:])]
