r"""Measurements for the boundary tilting perspective: pairs of digits, Gaussians, small networks.

T. Tanay, L. Griffin, "A Boundary Tilting Persepective on the Phenomenon of Adversarial Examples",
arXiv:1608.07690, 2016; "A New Angle on L2 Regularization", arXiv:1806.11186, 2018.

Claim: the level of regularization sets the adversarial strength. For networks the distance to the
nearest adversarial example takes its place, :math:`x \leftarrow x - f\nabla f/\|\nabla f\|^2` until
the sign of the output :math:`f` has changed (DeepFool).

Departures from the paper: the choice of the regularization by validation, the exact error on
Gaussians and the distance in the maximum norm are ours; the network is smaller than the LeNet of
the companion article.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wellposed.ops.numerics import warn_of_nan
from wellposed.train import minibatches, seeded

__all__ = [
    "Pairs",
    "PathMeasures",
    "deepfool_distance",
    "digit_pairs",
    "fit_lda",
    "gaussian_error",
    "measure",
    "pick_strongest",
    "train_network",
    "upsample",
]


@dataclass(frozen=True)
class Pairs:
    """Two-class problems of equal size, with labels -1 and 1.

    Attributes:
        x, y: training images ``(p, n, d)`` and labels ``(p, n)``, classes balanced.
        x_val, y_val: for the choice of the regularization.
        x_test, y_test: for the results.
    """

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class PathMeasures:
    r"""Classifiers measured; all ``(..., k)``.

    Attributes:
        angle: deviation from the training centroids, in radians.
        strength: its tangent.
        validation, test: shares of right decisions.
        relative: mean :math:`\|x_m-x\|/\|x\|` of the test images.
        linf: mean least change of all pixels that brings a test image to the boundary.
    """

    angle: Tensor
    strength: Tensor
    validation: Tensor
    test: Tensor
    relative: Tensor
    linf: Tensor


def _means(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means of both classes, `(..., d)`."""
    low, high = (y < 0).to(x.dtype), (y > 0).to(x.dtype)
    if y.shape != x.shape[:-1] or not (low.sum(-1) * high.sum(-1) > 0).all():
        raise ValueError(f"y must hold both classes, one label a row, got {tuple(y.shape)}")
    i, j = (
        (side[..., None, :] @ x)[..., 0, :] / side.sum(-1, keepdim=True) for side in (low, high)
    )
    return i, j


def digit_pairs(
    images: Tensor,
    labels: Tensor,
    pairs: Sequence[tuple[int, int]],
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    generator: torch.Generator,
) -> Pairs:
    r"""Random balanced splits of pairs of classes.

    Args:
        images: ``(n, ...)``, floating point; rows are flattened.
        labels: ``(n,)``.
        pairs: the classes that become -1 and 1.
        num_train, num_val, num_test: even numbers of images of both classes together.
        generator: on the CPU.

    Returns:
        :class:`Pairs`, on the device of ``images``.

    Raises:
        ValueError: an odd or negative number, classes that are too small, no pair, not one label
            an image.

    Source: ours; Tanay and Griffin 2018 use 3,000 images of each class.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> images, labels = torch.arange(8.0)[:, None], torch.tensor([3] * 4 + [7] * 4)
        >>> digit_pairs(images, labels, [(3, 7)], num_train=4, num_val=2, num_test=2, generator=g).y
        tensor([[-1., -1.,  1.,  1.]])
    """
    sizes = [num_train, num_val, num_test]
    if any(size < 2 or size % 2 for size in sizes):
        raise ValueError(f"num_train, num_val and num_test must be even and positive, got {sizes}")
    if not pairs:
        raise ValueError("pairs must not be empty")
    if images.ndim < 2 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be one an image, got {tuple(labels.shape)}")
    flat, halves = images.flatten(1), [size // 2 for size in sizes]
    found: list[list[Tensor]] = [[], [], []]
    for pair in pairs:
        parts = []
        for digit in pair:
            rows = (labels.cpu() == digit).nonzero()[:, 0]
            if len(rows) < sum(halves):
                raise ValueError(f"class {digit} has {len(rows)} images, {sum(halves)} are needed")
            rows = rows[torch.randperm(len(rows), generator=generator)[: sum(halves)]]
            parts.append(flat[rows.to(flat.device)].split(halves))
        for where, both in zip(found, zip(*parts, strict=True), strict=True):
            where.append(torch.cat(both))
    x, x_val, x_test = (torch.stack(part) for part in found)
    y, y_val, y_test = (
        torch.cat([-part.new_ones(half), part.new_ones(half)]).expand(len(pairs), -1).contiguous()
        for part, half in zip((x, x_val, x_test), halves, strict=True)
    )
    return Pairs(x, y, x_val, y_val, x_test, y_test)


def measure(weight: Tensor, bias: Tensor, data: Pairs) -> PathMeasures:
    r"""Angle, strength, accuracies and distances of ``k`` classifiers of each of ``p`` pairs.

    Args:
        weight: ``(p, k, d)``.
        bias: ``(p, k)``.
        data: the pairs.

    Returns:
        :class:`PathMeasures`; the centroids are those of the training images.

    Raises:
        ValueError: shapes that do not fit, a weight or a test image that is zero.

    Source: Tanay and Griffin 2016 and 2018; the maximum norm after Goodfellow et al. 2014.

    Example:
        >>> x, y = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), torch.tensor([[-1.0, 1.0]])
        >>> data = Pairs(x, y, x, y, x, y)
        >>> m = measure(torch.tensor([[[1.0, 1.0]]]), torch.tensor([[-2.0]]), data)
        >>> m.strength, m.test, m.linf              # |w x + b| = 1, L1 norm of w = 2
        (tensor([[1.]]), tensor([[1.]]), tensor([[0.5000]]))
    """
    p, _, d = data.x.shape
    if weight.ndim != 3 or weight.shape[:2] != bias.shape or weight.shape[::2] != (p, d):
        raise ValueError(
            f"weight must be (p, k, d) and bias (p, k), got {tuple(weight.shape)}, "
            f"{tuple(bias.shape)} for {p} pairs"
        )
    if not (weight.any(-1).all() and data.x_test.any(-1).all()):
        raise ValueError("weight and data.x_test must have no row that is zero")

    def right(x: Tensor, y: Tensor) -> Tensor:
        decisions = (weight @ x.mT + bias[..., None]) * y[:, None] > 0
        return decisions.to(x.dtype).mean(-1)

    i, j = _means(data.x, data.y)
    z = nn.functional.normalize(j - i, dim=-1, eps=torch.finfo(j.dtype).tiny)[:, None]
    along = (weight * z).sum(-1)
    across = weight - along[..., None] * z
    across = across - (across * z).sum(-1, keepdim=True) * z  # once more, for small angles
    angle = torch.atan2(torch.linalg.vector_norm(across, dim=-1), along)
    size = (weight @ data.x_test.mT + bias[..., None]).abs()
    norm = torch.linalg.vector_norm(data.x_test, dim=-1)[:, None]
    length = torch.linalg.vector_norm(weight, dim=-1)
    return PathMeasures(
        angle,
        angle.tan(),
        right(data.x_val, data.y_val),
        right(data.x_test, data.y_test),
        (2 * size / norm).mean(-1) / length,
        size.mean(-1) / weight.abs().sum(-1),
    )


def fit_lda(x: Tensor, y: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    r"""Linear discriminant, :math:`w=[(1-a)\Sigma+a\bar\sigma^2I]^{-1}(j-i)`, boundary midway.

    :math:`\Sigma` is the covariance inside the classes, :math:`\bar\sigma^2` its mean variance.

    Args:
        x: ``(..., n, d)``.
        y: labels -1 and 1, ``(..., n)``.
        shrinkage: :math:`a` in (0, 1]; 1 is the nearest centroid.

    Returns:
        Weight ``(..., d)`` and bias ``(...)``.

    Raises:
        ValueError: bad shapes or labels, ``shrinkage`` outside (0, 1], classes that do not vary.

    Source: Tanay and Griffin 2016, classifier L; the shrinkage is ours.

    Example:
        >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 2.0], [1.0, 2.0]])
        >>> fit_lda(x, torch.tensor([-1, -1, 1, 1]), 1.0)       # variances 1 and 0: mean 1/2
        (tensor([0., 4.]), tensor(-4.))
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in (0, 1], got {shrinkage}")
    i, j = _means(x, y)
    inside = x - torch.where((y > 0)[..., None], j[..., None, :], i[..., None, :])
    cov = inside.mT @ inside / x.shape[-2]
    mean_var = cov.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not (mean_var > 0).all():
        raise ValueError("x must vary inside the classes")
    system = (1 - shrinkage) * cov
    system.diagonal(dim1=-2, dim2=-1).add_(shrinkage * mean_var[..., None])
    weight = torch.cholesky_solve((j - i)[..., None], torch.linalg.cholesky(system))[..., 0]
    return weight, -(weight * (i + j)).sum(-1) / 2


def pick_strongest(validation: Tensor, *, within: float = 0.01) -> Tensor:
    r"""First of ``k`` strengths, from strong to weak, whose accuracy is close to the best.

    Args:
        validation: accuracies ``(..., k)``, the strongest regularization first.
        within: how much below the best counts as close, at least 0.

    Returns:
        Indices ``(...)``.

    Raises:
        ValueError: no strength, ``within`` negative.

    Source: ours, after the rule of one standard error.

    Example:
        >>> pick_strongest(torch.tensor([0.90, 0.955, 0.96, 0.95]))
        tensor(1)
    """
    if validation.ndim < 1 or not validation.shape[-1] or not within >= 0:
        raise ValueError(f"validation must not be empty and within >= 0, got {within}")
    best = validation.amax(-1, keepdim=True)
    # accuracies are multiples of 1/n; a hair of slack keeps a tie at exactly `within` inside
    return (validation >= best - within - 1e-6).to(torch.int8).argmax(-1)


def gaussian_error(weight: Tensor, bias: Tensor, i: Tensor, j: Tensor, cov: Tensor) -> Tensor:
    r"""Error on two Gaussians of one covariance, equally likely, by their distribution function.

    .. math:: \tfrac12\Phi\Bigl(\frac{w\cdot i+b}{\sqrt{w^\top\Sigma w}}\Bigr)
        +\tfrac12\Phi\Bigl(-\frac{w\cdot j+b}{\sqrt{w^\top\Sigma w}}\Bigr)

    Args:
        weight: ``(..., d)``, not zero.
        bias: ``(...)``.
        i, j: means ``(d,)``.
        cov: :math:`\Sigma`, ``(d, d)``, positive definite.

    Returns:
        Probability ``(...)``.

    Raises:
        ValueError: shapes that do not fit, a variance along ``weight`` that is not positive.

    Source: ours, for the taxonomy.

    Example:
        >>> one = torch.ones(1)
        >>> gaussian_error(one, torch.tensor(0.0), -one, one, torch.eye(1))      # Phi(-1)
        tensor(0.1587)
    """
    shapes = [tuple(t.shape) for t in (weight, bias, i, j, cov)]
    if not i.shape == j.shape == weight.shape[-1:] or cov.shape != (*i.shape, *i.shape):
        raise ValueError(f"weight, bias, i, j and cov must fit, got {shapes}")
    variance = ((weight @ cov) * weight).sum(-1)
    if not (variance > 0).all():
        raise ValueError("weight must not be zero and cov must be positive definite")
    low, high = ((weight * mean).sum(-1) + bias for mean in (i, j))
    deviation, normal = variance.sqrt(), torch.special.ndtr
    error: Tensor = (normal(low / deviation) + normal(-high / deviation)) / 2
    return error


def upsample(x: Tensor, factor: int, *, smooth: bool = False) -> Tensor:
    r"""Square images at a higher resolution: every pixel repeated, or bilinear.

    Args:
        x: ``(..., h*h)``, flat square images.
        factor: at least 1.
        smooth: bilinear interpolation instead of repetition.

    Returns:
        ``(..., h*h*factor*factor)``.

    Raises:
        ValueError: images that are empty or not square, a factor below 1.

    Source: Tanay and Griffin 2016, against the linear explanation.

    Example:
        >>> upsample(torch.tensor([[7.0]]), 2)
        tensor([[7., 7., 7., 7.]])
    """
    side = math.isqrt(x.shape[-1]) if x.ndim else 0
    if side < 1 or side * side != x.shape[-1] or factor < 1:
        raise ValueError(
            f"x must hold square images and factor be >= 1, got {tuple(x.shape)}, {factor}"
        )
    images = x.reshape(x.shape[:-1].numel(), 1, side, side)
    large = (
        nn.functional.interpolate(images, scale_factor=factor, mode="bilinear")
        if smooth
        else images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    )
    return large.reshape(*x.shape[:-1], x.shape[-1] * factor**2)


# --- networks -------------------------------------------------------------------------------------


def train_network(
    x: Tensor,
    y: Tensor,
    *,
    decay: float,
    steps: int,
    seed: int,
    width: int = 8,
    lr: float = 0.05,
    momentum: float = 0.9,
    batch_size: int = 50,
) -> nn.Sequential:
    r"""Small convolutional network, :math:`\frac1n\sum\log(1+e^{-yf(x)})+\frac{c}{2}\|W\|^2`.

    Two convolutions of stride 2 with ReLU, then a linear layer with one output.

    Args:
        x: images ``(n, 1, h, w)``.
        y: labels -1 and 1, ``(n,)``.
        decay: :math:`c\ge0`, on all parameters.
        steps: of SGD with momentum, at least 1.
        seed: of the weights and the order of the images.
        width: channels of the first layer; the second has twice as many.
        lr, momentum, batch_size: of SGD.

    Returns:
        The network, in the dtype and on the device of ``x``; a warning tells if it diverged.

    Raises:
        ValueError: bad shapes or numbers.

    Source: Tanay and Griffin 2018, weight decay and networks.

    Example:
        >>> x, y = torch.randn(8, 1, 8, 8), torch.tensor([-1.0, 1.0]).repeat(4)
        >>> train_network(x, y, decay=0.1, steps=2, seed=0)(x).shape
        torch.Size([8, 1])
    """
    if x.ndim != 4 or 0 in x.shape or x.shape[1] != 1 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x must be (n, 1, h, w) and y (n,), got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if not decay >= 0 or steps < 1 or width < 1 or not lr > 0 or not 0 <= momentum < 1:
        raise ValueError("decay must be >= 0, steps and width >= 1, lr > 0, momentum in [0, 1)")
    height, breadth = ((size + 3) // 4 for size in x.shape[2:])
    with seeded(seed):
        net = nn.Sequential(
            nn.Conv2d(1, width, 5, 2, 2), nn.ReLU(), nn.Conv2d(width, 2 * width, 5, 2, 2),
            nn.ReLU(), nn.Flatten(), nn.Linear(2 * width * height * breadth, 1),
        ).to(x)  # fmt: skip
    params: list[Tensor] = list(net.parameters())
    speed = [torch.zeros_like(p) for p in params]
    order = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for batch in minibatches(len(x), batch_size, order, x.device):
            loss = nn.functional.softplus(-y[batch] * net(x[batch])[:, 0]).mean()
            grads = list(torch.autograd.grad(loss, params))
            with torch.no_grad():
                torch._foreach_add_(grads, params, alpha=decay)
                torch._foreach_mul_(speed, momentum)
                torch._foreach_add_(speed, grads)
                torch._foreach_add_(params, speed, alpha=-lr)
            done += 1
            if done == steps:
                break
    warn_of_nan("train_network", loss, *params)
    return net


def deepfool_distance(net: nn.Module, x: Tensor, *, max_iter: int = 20) -> tuple[Tensor, Tensor]:
    r"""Distance to the boundary found by linearizing again and again.

    Args:
        net: maps ``(n, ...)`` to ``(n, 1)``; the sign is the decision.
        x: ``(n, ...)``.
        max_iter: steps, at least 1.

    Returns:
        Distances ``(n,)`` to the points where the sign has changed, and whether it has, ``(n,)``.

    Raises:
        ValueError: ``max_iter`` below 1, an output that is not ``(n, 1)``.

    Source: Moosavi-Dezfooli et al. 2016, as in Tanay and Griffin 2018.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> deepfool_distance(net, torch.tensor([[2.0, 1.0]]))[0].round(decimals=1)   # 10 / 5
        tensor([2.])
    """
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    point, first = x.detach(), torch.empty(0)
    tiny = torch.finfo(x.dtype).tiny
    for step in range(max_iter + 1):
        moving = point.clone().requires_grad_()
        out = net(moving)
        if out.shape != (len(x), 1):
            raise ValueError(f"net must map to (n, 1), got {tuple(out.shape)}")
        first = out.detach()[:, 0] if step == 0 else first
        open_ = out.detach()[:, 0] * first.sign() > 0
        if step == max_iter:
            break
        (grad,) = torch.autograd.grad(out.sum(), moving)
        square = grad.flatten(1).square().sum(1).clamp(min=tiny)
        # two percent beyond the boundary, as DeepFool does
        length = torch.where(open_, 1.02 * out.detach()[:, 0] / square, 0.0)
        point = point - length.reshape(-1, *[1] * (x.ndim - 1)) * grad
    return (point - x).flatten(1).norm(dim=1), ~open_
