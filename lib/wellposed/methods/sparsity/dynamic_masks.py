r"""Dynamic pruning with self-supervised masks: a small head predicts which filters will fire.

S. Elkerdawy, M. Elhoushi, H. Zhang, N. Ray, "Fire Together Wire Together: A Dynamic Pruning
Approach with Self-Supervised Mask Prediction", CVPR 2022, arXiv:2110.08232.

Claim: the filters that an input does not need can be predicted from the layer's own input, by heads
that learn from the network's responses instead of from a penalty, and the work that this saves is
known before training. Filter :math:`c` of a layer with output :math:`O` responds with

.. math::

    a_c = \max_{h,w} |O_{c,h,w}|, \qquad g_c = 1 \iff \sum_{j:\ a_j \ge a_c} a_j \le
    r \sum_j a_j , \qquad
    \mathcal L = \mathrm{CE} + \frac1L \sum_l \sum_c \mathrm{BCE}(P^l_c, g^l_c)

where the logits :math:`P` come from the layer's input. Filters with :math:`\sigma(P_c) \le 1/2` are
set to zero, in training and afterwards.

Departures from the paper: every target mask keeps a filter; heads start with a positive bias; the
softmax in front of the head is optional; :func:`deploy` skips what the paper counts. The authors'
code ends the mask loss halfway and lets the heads move on; its help text freezes them: both here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from math import cos, pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets import Stacked
from wellposed.nets.convnet import ConvNet
from wellposed.nets.deployed import Deployed, MaskPredictor
from wellposed.ops.channel_masks import check_lists, conv_macs, flops_reduction
from wellposed.train import StackedSGD, minibatches

__all__ = [
    "DynamicConv2d",
    "DynamicNet",
    "MaskPredictor",
    "binarize",
    "channel_saliency",
    "conv_macs",
    "deploy",
    "fit",
    "flops_reduction",
    "forward_with_masks",
    "mask_prediction_loss",
    "mass_mask",
    "uniform_mask",
]

DEAD = 1e-5  # a normalized saliency up to this counts as no response (authors' code)
Target = float | Callable[[Tensor], Tensor]


class DynamicOutput(NamedTuple):
    """What a :class:`DynamicNet` returns; the lists have one entry ``(n, c)`` a layer.

    Attributes:
        logits: class scores, ``(n, classes)``.
        mask_logits: what the heads say.
        targets: what they should have said.
        masks: what was kept, zeros and ones.
    """

    logits: Tensor
    mask_logits: list[Tensor]
    targets: list[Tensor]
    masks: list[Tensor]


def _check_features(features: Tensor) -> None:
    if features.ndim != 4 or 0 in features.shape:
        raise ValueError(f"features must have shape (n, c, h, w), got {tuple(features.shape)}")


def channel_saliency(features: Tensor) -> Tensor:
    r"""Peak response of each channel: :math:`a_c = \max_{h,w} |O_{c,h,w}|`.

    Args:
        features: outputs :math:`O` of a layer, ``(n, c, h, w)``.

    Returns:
        Saliencies ``(n, c)``, at least 0, a constant for the gradient.

    Raises:
        ValueError: another number of axes, or an empty one.

    Source: the authors' code (mask generation).

    Example:
        >>> channel_saliency(torch.tensor([[[[1.0, -3.0]], [[2.0, 0.0]]]])).tolist()
        [[3.0, 2.0]]
    """
    _check_features(features)
    return features.detach().abs().amax((2, 3))


def mass_mask(features: Tensor, mass: float | Tensor, min_channels: int = 1) -> Tensor:
    r"""The most salient channels of each sample, as many as fit into a share of the saliency.

    With :math:`a` sorted in descending order, the first :math:`k` are kept, where :math:`k` is the
    largest number with :math:`\sum_{j \le k} a_j \le r \sum_j a_j`. So :math:`k` differs from
    sample to sample. With :math:`r = 1` the channels without a response are dropped.

    Args:
        features: outputs of a layer, ``(n, c, h, w)``.
        mass: the share :math:`r`, in (0, 1]; the range of a tensor is not checked.
        min_channels: so many are kept in any case, in [1, c].

    Returns:
        Zeros and ones ``(n, c)``, in the dtype of ``features``.

    Raises:
        ValueError: a number out of range, or a wrong shape.

    Source: the authors' code (mask generation, "mass"); ``min_channels`` is ours.

    Example:
        >>> x = torch.tensor([[5.0, 1.0, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).view(2, 4, 1, 1)
        >>> mass_mask(x, 0.9).tolist()  # 5 + 4 of 10; three of four
        [[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    """
    if not isinstance(mass, Tensor) and not 0.0 < mass <= 1.0:
        raise ValueError(f"mass must lie in (0, 1], got {mass}")
    saliency = channel_saliency(features)
    channels = saliency.shape[1]
    if not 1 <= min_channels <= channels:
        raise ValueError(f"min_channels must lie in [1, {channels}], got {min_channels}")
    total = saliency.sum(1, keepdim=True)
    share, order = (saliency / total.clamp_min(1e-30)).sort(dim=1, descending=True, stable=True)
    whole = torch.as_tensor(mass, device=share.device) == 1.0
    fits = (share.cumsum(1) <= mass + DEAD) & (total > 0)
    first = torch.arange(channels, device=share.device) < min_channels
    keep = torch.where(whole, share > DEAD, fits) | first
    return torch.zeros_like(saliency).scatter(1, order, keep.to(saliency.dtype))


def uniform_mask(features: Tensor, prune_ratio: float) -> Tensor:
    r"""The same number of channels in each sample: the :math:`\lfloor \rho c \rfloor` least go.

    Channels with a saliency of at most 1e-5 go as well.

    Args:
        features: outputs of a layer, ``(n, c, h, w)``.
        prune_ratio: the share :math:`\rho`, in [0, 1).

    Returns:
        Zeros and ones ``(n, c)``, in the dtype of ``features``.

    Raises:
        ValueError: ``prune_ratio`` out of range, or a wrong shape.

    Source: the authors' code (mask generation, "uniform").

    Example:
        >>> uniform_mask(torch.tensor([5.0, 1.0, 4.0, 2.0]).view(1, 4, 1, 1), 0.5).tolist()
        [[1.0, 0.0, 1.0, 0.0]]
    """
    if not 0.0 <= prune_ratio < 1.0:
        raise ValueError(f"prune_ratio must lie in [0, 1), got {prune_ratio}")
    saliency = channel_saliency(features)
    dropped = int(prune_ratio * saliency.shape[1])
    worst = saliency.argsort(dim=1, stable=True)[:, :dropped]
    return (saliency > DEAD).to(saliency.dtype).scatter(1, worst, 0.0)


def binarize(logits: Tensor) -> Tensor:
    r"""The mask :math:`M = \mathbb 1[\sigma(P) > 1/2]` with a straight-through gradient.

    Backward, the step counts as the identity: :math:`\partial M/\partial P = \sigma'(P)`.

    Args:
        logits: outputs :math:`P` of a head, any shape, floating point.

    Returns:
        Zeros and ones in shape and dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point.

    Source: the authors' code (straight-through mask).

    Example:
        >>> z = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> binarize(z).tolist()
        [0.0, 0.0, 1.0]
        >>> torch.autograd.grad(binarize(z).sum(), z)[0][1].item()
        0.25
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    soft = logits.sigmoid()
    return (soft > 0.5).to(logits.dtype) + (soft - soft.detach())


def mask_prediction_loss(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    r""":math:`\frac1L \sum_l \frac1n \sum_n \sum_c \mathrm{BCE}(P^l_{nc}, g^l_{nc})`.

    A *sum* over channels, a mean over samples and layers.

    Args:
        logits: one tensor :math:`P^l` of shape ``(..., n, c_l)`` a layer.
        targets: masks :math:`g^l` of the same shapes.

    Returns:
        Shape ``(...)``: a scalar for one network.

    Raises:
        ValueError: no layer, no sample, or shapes that differ.

    Source: the authors' code (losses).

    Example:
        >>> value = mask_prediction_loss([torch.zeros(3, 2)], [torch.ones(3, 2)])
        >>> round(value.exp().item(), 4)  # log 2 for each of two channels
        4.0
    """
    check_lists("logits", "targets", logits, targets)
    if any(p.ndim < 2 or p.shape[-2] == 0 for p in logits):
        raise ValueError("logits must have shape (..., n, c) with n at least 1")
    bce = F.binary_cross_entropy_with_logits
    terms = [bce(p, g, reduction="none").sum(-1).mean(-1) for p, g in zip(logits, targets)]
    return torch.stack(terms).mean(0)


class DynamicConv2d(nn.Module):
    r"""A convolution whose filters are switched on and off for each input.

    Args:
        conv, norm, activation: the layer :math:`O = \mathrm{activation}(\mathrm{norm}(W * I))`.
        mass: the share :math:`r` in (0, 1] for :func:`mass_mask`, or a function from features to
            target masks.
        mode: ``"decoupled"`` (the head sees a detached input) or ``"joint"``.
        pool, softmax: settings of the :class:`MaskPredictor`.
        open_bias: start of the head's biases; with a positive one all filters are on at first.

    Raises:
        ValueError: ``mass`` out of range or another ``mode``.

    Source: the authors' code (dynamic layer); ``open_bias`` stands in for their optional
        training of the heads toward all ones.

    Example:
        >>> layer = DynamicConv2d(nn.Conv2d(1, 4, 3), nn.Identity(), nn.ReLU(), 0.9)
        >>> out, logits, target, mask = layer(torch.ones(2, 1, 5, 5))
        >>> out.shape, mask.shape
        (torch.Size([2, 4, 3, 3]), torch.Size([2, 4]))
    """

    mass: Tensor

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module,
        activation: nn.Module,
        mass: Target,
        mode: str = "decoupled",
        *,
        pool: str = "max",
        softmax: bool = True,
        open_bias: float = 2.0,
    ) -> None:
        super().__init__()
        if not callable(mass) and not 0.0 < mass <= 1.0:
            raise ValueError(f"mass must lie in (0, 1], got {mass}")
        if mode not in ("decoupled", "joint"):
            raise ValueError(f"mode must be 'decoupled' or 'joint', got {mode!r}")
        self.conv, self.norm, self.activation = conv, norm, activation
        self.mode, self.select = mode, mass if callable(mass) else None
        value = 0.0 if callable(mass) else mass
        self.register_buffer("mass", conv.weight.new_tensor(value))
        self.head = MaskPredictor(conv.in_channels, conv.out_channels, pool, softmax)
        nn.init.constant_(self.head.linear.bias, open_bias)
        self.head.to(conv.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masked output ``(n, c, h', w')``, and head logits, target and mask, each ``(n, c)``."""
        features = self.activation(self.norm(self.conv(x)))
        logits = self.head(x.detach() if self.mode == "decoupled" else x)
        target = self.select(features) if self.select else mass_mask(features, self.mass)
        mask = binarize(logits)
        return features * mask[:, :, None, None], logits, target, mask


class DynamicNet(nn.Module):
    """A trained :class:`ConvNet`, copied, with a mask for every layer.

    Args:
        net: the dense network; it is not changed.
        mass, mode, pool, softmax, open_bias: settings of each :class:`DynamicConv2d`.

    Raises:
        ValueError: a setting out of range.

    Source: the authors' code (dynamic VGG).

    Example:
        >>> net = DynamicNet(ConvNet(1, [4, 6], 3, strides=[2, 1]), 0.9)
        >>> [m.shape[1] for m in net(torch.ones(2, 1, 8, 8)).masks]
        [4, 6]
    """

    def __init__(
        self,
        net: ConvNet,
        mass: Target,
        mode: str = "decoupled",
        *,
        pool: str = "max",
        softmax: bool = True,
        open_bias: float = 2.0,
    ) -> None:
        super().__init__()
        net = copy.deepcopy(net)
        blocks = [
            DynamicConv2d(
                conv, norm, nn.ReLU(), mass, mode, pool=pool, softmax=softmax, open_bias=open_bias
            )
            for conv, norm in _stages(net)
        ]
        self.blocks, self.classifier = nn.ModuleList(blocks), net.classifier
        self.train(net.training)

    def forward(self, x: Tensor) -> DynamicOutput:
        """Map images to class scores, and say what was masked."""
        parts = []
        for block in self.blocks:
            x, *rest = block(x)
            parts.append(rest)
        logits, targets, masks = (list(part) for part in zip(*parts))
        return DynamicOutput(self.classifier(x.mean((2, 3))), logits, targets, masks)


def _stages(net: ConvNet | DynamicNet) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolution and normalization of each layer."""
    if isinstance(net, ConvNet):
        pairs = zip(net.convs, net.norms)
    else:
        pairs = zip(*[[getattr(b, name) for b in net.blocks] for name in ("conv", "norm")])
    return list(pairs)  # type: ignore[arg-type]


def deploy(net: ConvNet | DynamicNet) -> Deployed:
    """Copy a trained network into a form that carries out only the work that its masks ask for.

    Args:
        net: dense, thinned or dynamic network.

    Returns:
        A predictor with methods ``dense``, ``masked`` and ``skipping``.

    Raises:
        TypeError: another kind of network.

    Source: ours; the paper counts FLOPs.

    Example:
        >>> fast = deploy(DynamicNet(ConvNet(1, [4, 4], 2, strides=[1, 1]), 0.9))
        >>> x = torch.ones(2, 1, 5, 5)
        >>> torch.allclose(fast.masked(x), fast.skipping(x)[0], atol=1e-6)
        True
    """
    if not isinstance(net, ConvNet | DynamicNet):
        raise TypeError(f"net must be a ConvNet or a DynamicNet, got {type(net).__name__}")
    blocks = list(net.blocks) if isinstance(net, DynamicNet) else []
    heads = [block.head for block in blocks if isinstance(block, DynamicConv2d)]
    return Deployed(_stages(net), net.classifier, heads)


def forward_with_masks(net: ConvNet | DynamicNet, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Class scores of a network under given masks, instead of those that it would predict.

    Args:
        net: dense or dynamic network, in the mode (training or evaluation) that it is in.
        x: images ``(n, channels, h, w)``.
        masks: one ``(n, c_l)`` or ``(1, c_l)`` tensor a layer.

    Returns:
        Class scores ``(n, classes)``.

    Raises:
        ValueError: not one mask a layer, or a mask for another number of images.

    Source: ours, for controls.

    Example:
        >>> net = ConvNet(1, [4], 2, strides=[1]).eval()
        >>> scores = forward_with_masks(net, torch.ones(1, 1, 5, 5), [torch.zeros(1, 4)])
        >>> torch.equal(scores[0], net.classifier.bias)
        True
    """
    stages = _stages(net)
    if len(masks) != len(stages):
        raise ValueError(f"masks must be one tensor for each of {len(stages)} layers")
    if any(len(mask) not in (1, len(x)) for mask in masks):
        raise ValueError(f"masks must have 1 or {len(x)} rows, got {[len(m) for m in masks]}")
    for (conv, norm), mask in zip(stages, masks):
        x = norm(conv(x)).relu() * mask[:, :, None, None]
    out: Tensor = net.classifier(x.mean((2, 3)))
    return out


def fit(
    nets: Sequence[ConvNet] | Sequence[DynamicNet],
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    *,
    generators: Sequence[torch.Generator],
    epochs: int = 200,
    batch_size: int = 128,
    lr: float = 1e-2,
    head_lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    mask_weight: float = 1.0,
    cooldown: float = 0.5,
    freeze_heads: bool = True,
) -> Tensor:
    r"""Train networks of one kind side by side: cross-entropy, for dynamic ones plus the mask loss.

    Dense, thinned and dynamic networks go through this one function, and with generators of one
    seed they see the same batches. Learning rates fall to zero along half a cosine.

    Args:
        nets: ``k`` networks that differ in ``mass`` at most; trained in place, then in eval mode.
        x: images ``(n, channels, h, w)`` of each network.
        y: int64 classes ``(n,)`` of each network.
        generators: one for each network, source of the order of its examples.
        epochs, batch_size: at least 1.
        lr, head_lr: of the backbone and of the heads; momentum is the same.
        momentum, weight_decay: of the backbone; heads have no decay.
        mask_weight: weight of the mask loss, at least 0.
        cooldown: share of the steps, at the end, without the mask loss, in [0, 1].
        freeze_heads: whether the heads stay as they are in that time. Otherwise the task loss
            goes on moving them, through the straight-through masks.

    Returns:
        Cross-entropy and mask loss (0 without heads) of each network and step, ``(k, steps, 2)``.

    Raises:
        ValueError: a number out of range, or lengths that differ.

    Source: the authors' code (training script); their steps of the learning rate are a cosine here.

    Example:
        >>> net, x = ConvNet(1, [2], 2, strides=[1]), torch.randn(6, 1, 4, 4)
        >>> y, g = torch.tensor([0, 1] * 3), torch.Generator()
        >>> fit([net], [x], [y], generators=[g], epochs=2, batch_size=3).shape
        torch.Size([1, 4, 2])
    """
    counts = [len(nets), len(x), len(y), len(generators)]
    if min(counts) < 1 or len(set(counts)) > 1 or len({len(v) for v in [*x, *y]}) > 1:
        raise ValueError(f"nets, x, y and generators must match, got lengths {counts}")
    if epochs < 1 or batch_size < 1 or not 0.0 <= cooldown <= 1.0 or mask_weight < 0:
        raise ValueError(
            "epochs and batch_size must be at least 1, cooldown in [0, 1] and mask_weight at least "
            f"0, got {epochs}, {batch_size}, {cooldown} and {mask_weight}"
        )
    model = Stacked(nets).train()
    named = list(model.named_parameters())
    backbone = [p for name, p in named if "_head_" not in name]
    optimizers = [StackedSGD(backbone, lr=lr, momentum=momentum, weight_decay=weight_decay)]
    if heads := [p for name, p in named if "_head_" in name]:
        optimizers.append(StackedSGD(heads, lr=head_lr, momentum=momentum))
    n, losses = len(x[0]), []
    steps = epochs * -(-n // batch_size)
    last = (1.0 - cooldown) * steps
    for step, batches in enumerate(_batches(n, batch_size, epochs, generators, x[0].device)):
        out = model(torch.stack([v[i] for v, i in zip(x, batches)]))
        labels = torch.stack([v[i] for v, i in zip(y, batches)])
        logits = out if isinstance(out, Tensor) else out.logits
        task = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        task = task.view(labels.shape).mean(1)
        mask = torch.zeros_like(task)
        if not isinstance(out, Tensor):
            mask = mask_prediction_loss(out.mask_logits, out.targets)
        weight = mask_weight if step < last else 0.0
        (task + weight * mask).sum().backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers[: 1 if freeze_heads and step >= last else 2]:
            optimizer.step(0.5 * (1.0 + cos(pi * step / steps)))
        losses.append(torch.stack([task.detach(), mask.detach()], dim=1))
    for net, trained in zip(nets, model.networks(), strict=True):
        net.load_state_dict(trained.state_dict())
        net.eval()
    return torch.stack(losses, dim=1)


def _batches(
    n: int,
    batch_size: int,
    epochs: int,
    generators: Sequence[torch.Generator],
    device: torch.device,
) -> Iterator[tuple[Tensor, ...]]:
    """Index batches of every network, epoch after epoch."""
    for _ in range(epochs):
        yield from zip(*[minibatches(n, batch_size, g, device) for g in generators])
