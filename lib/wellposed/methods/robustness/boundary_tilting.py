r"""Adversarial examples of linear classifiers, seen as tilted boundaries.

T. Tanay, L. Griffin, "A Boundary Tilting Persepective on the Phenomenon of Adversarial Examples",
arXiv:1608.07690, 2016; companion article "A New Angle on L2 Regularization", arXiv:1806.11186.

Claim: how close an image lies to its adversarial example depends on one angle, the deviation
:math:`\delta` of the weight :math:`w` from the difference of the class centroids :math:`i, j`,

.. math::
    x_m = x - 2\, d(x)\, \hat w,\qquad d(x) = \frac{w \cdot x + b}{\|w\|},\qquad
    s = \frac{\|i_m - j\|}{\|i_m - i\|} = \tan\delta ,

and this angle can be raised without any change of the accuracy, and lowered by regularization.

Glossary: class I has label -1 and centroid :math:`i`, class J label +1 and centroid :math:`j`;
:math:`\hat z` is the unit vector along :math:`j - i`; ``reg`` is :math:`\lambda` in
:math:`\frac1n\sum_i \ell(y_i(w\cdot x_i+b)) + \lambda\|w\|^2`.

Departures from the paper: the normalization of the strength is remembered, not read; angles come
from atan2, which is exact near zero; linear discriminant analysis, logistic regression, the error
of a linear classifier on Gaussians and the distance in the maximum norm are added for comparison,
DeepFool distances of small convolutional networks as in the companion article.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wellposed.ops.linear_classifiers import logistic_path, signed_labels, svm_path

__all__ = [
    "adversarial_distance",
    "adversarial_strength",
    "centroids",
    "deviation_angle",
    "fit_linear_svm",
    "fit_logistic",
    "mirror",
    "nearest_centroid",
    "project",
    "relative_perturbation",
    "signed_distance",
    "tilt",
    "tilting_plane",
]


# --- checks ---------------------------------------------------------------------------------------


def _unit(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Direction and length; scaled first, so that no square under- or overflows."""
    if weight.ndim < 1 or 0 in weight.shape or not weight.isfinite().all():
        raise ValueError(f"{name} must be finite and not empty, got shape {tuple(weight.shape)}")
    largest = weight.abs().amax(-1, keepdim=True)
    if (largest == 0).any():
        raise ValueError(f"{name} must not be zero")
    scaled = weight / largest
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / norm, norm * largest


def _check_fit(weight: Tensor, other: Tensor, *batches: torch.Size) -> None:
    """Refuse vectors of different lengths, and batch dimensions that do not broadcast."""
    try:
        torch.broadcast_shapes(weight.shape[:-1], *batches)
    except RuntimeError:
        batches = ()
    if not batches or weight.shape[-1:] != other.shape[-1:]:
        raise ValueError(
            f"weight must fit the other arguments, got {tuple(weight.shape)}, {tuple(other.shape)}"
        )


def _offset(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distances ``(..., n)`` and unit weights ``(..., d)``."""
    unit, norm = _unit(weight)
    if x.ndim < 2 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x must be (..., n, {weight.shape[-1]}), got {tuple(x.shape)}")
    _check_fit(weight, x, x.shape[:-2], torch.as_tensor(bias).shape)
    distance = (x @ unit[..., None])[..., 0] + (torch.as_tensor(bias)[..., None] / norm)
    return distance, unit


# --- geometry -------------------------------------------------------------------------------------


def centroids(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Means of both classes, :math:`i` (label -1) and :math:`j` (label +1).

    Args:
        x: ``(..., n, d)``, floating point.
        y: labels -1 and 1, ``(..., n)``, both present.

    Returns:
        Two tensors ``(..., d)``.

    Raises:
        ValueError: shapes that do not fit, other labels, an empty class.

    Source: Tanay and Griffin 2016, strength of adversarial examples.

    Example:
        >>> centroids(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([-1, -1, 1]))
        (tensor([1.]), tensor([5.]))
    """
    y = signed_labels(x, y)
    low, high = (y < 0).to(x.dtype), (y > 0).to(x.dtype)
    i = (low[..., None, :] @ x)[..., 0, :] / low.sum(-1, keepdim=True)
    j = (high[..., None, :] @ x)[..., 0, :] / high.sum(-1, keepdim=True)
    return i, j


def _axis(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vector and distance between the centroids, and their middle."""
    i, j = centroids(x, y)
    if (i == j).all(-1).any():
        raise ValueError("x must have centroids that differ")
    z, gap = _unit(j - i, "j - i")
    return z, gap[..., 0], (i + j) / 2


def nearest_centroid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Classifier of the nearest centroid, :math:`\hat z` and :math:`-\hat z\cdot(i+j)/2`.

    Args:
        x: ``(..., n, d)``.
        y: labels -1 and 1, ``(..., n)``.

    Returns:
        Unit weight ``(..., d)`` and bias ``(...)``.

    Raises:
        ValueError: bad shapes or labels, an empty class, equal centroids.

    Source: Tanay and Griffin 2016, classifier B.

    Example:
        >>> nearest_centroid(torch.tensor([[0.0], [4.0]]), torch.tensor([-1, 1]))
        (tensor([1.]), tensor(-2.))
    """
    z, _, middle = _axis(x, y)
    return z, -(z * middle).sum(-1)


def signed_distance(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Distance to the boundary, positive on the side of J: :math:`\hat w\cdot x + b/\|w\|`.

    Args:
        x: ``(..., n, d)``.
        weight: ``(..., d)``, not zero.
        bias: ``(...)``.

    Returns:
        ``(..., n)``.

    Raises:
        ValueError: zero weight, shapes that do not fit.

    Source: Tanay and Griffin 2016, mirror images.

    Example:
        >>> weight = torch.tensor([3.0, 4.0])
        >>> signed_distance(torch.tensor([[3.0, 4.0]]), weight, torch.tensor(-5.0))
        tensor([4.])
    """
    return _offset(x, weight, bias)[0]


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Nearest point of the boundary, :math:`x_p = x - d(x)\hat w`: an example of no confidence.

    Args:
        x: ``(..., n, d)``.
        weight: ``(..., d)``, not zero.
        bias: ``(...)``.

    Returns:
        ``(..., n, d)``.

    Raises:
        ValueError: zero weight, shapes that do not fit.

    Source: Tanay and Griffin 2016, projected image.

    Example:
        >>> project(torch.tensor([[3.0, 1.0]]), torch.tensor([2.0, 0.0]), torch.tensor(-2.0))
        tensor([[1., 1.]])
    """
    distance, unit = _offset(x, weight, bias)
    return x - distance[..., None] * unit[..., None, :]


def mirror(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Mirror image :math:`x_m = x - 2d(x)\hat w`: the other side, the same confidence.

    Args:
        x: ``(..., n, d)``.
        weight: ``(..., d)``, not zero.
        bias: ``(...)``.

    Returns:
        ``(..., n, d)``.

    Raises:
        ValueError: zero weight, shapes that do not fit.

    Source: Tanay and Griffin 2016, mirror image.

    Example:
        >>> mirror(torch.tensor([[3.0, 1.0]]), torch.tensor([2.0, 0.0]), torch.tensor(-2.0))
        tensor([[-1.,  1.]])
    """
    distance, unit = _offset(x, weight, bias)
    return x - 2 * distance[..., None] * unit[..., None, :]


def _parts(weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine, sine and the rest of the unit weight that is orthogonal to ``z``."""
    unit = _unit(weight)[0]
    _check_fit(weight, z, z.shape[:-1])
    cosine = (unit * z).sum(-1)
    rest = unit - cosine[..., None] * z
    rest = rest - (rest * z).sum(-1, keepdim=True) * z  # once more, for small angles
    return cosine, torch.linalg.vector_norm(rest, dim=-1), rest


def deviation_angle(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    r"""Angle between a classifier and the nearest centroid classifier, :math:`\delta\in[0,\pi]`.

    Args:
        weight: ``(..., d)``, not zero.
        x: ``(..., n, d)``; the batch dimensions broadcast with those of ``weight``.
        y: labels -1 and 1, ``(..., n)``.

    Returns:
        Radians, ``(...)``.

    Raises:
        ValueError: zero weight, bad shapes or labels, an empty class, equal centroids.

    Source: Tanay and Griffin 2016, deviation angle.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([-1, 1])
        >>> deviation_angle(torch.tensor([1.0, 1.0]), x, y)      # pi / 4
        tensor(0.7854)
    """
    cosine, sine, _ = _parts(weight, _axis(x, y)[0])
    return torch.atan2(sine, cosine)


def adversarial_strength(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    r"""Strength :math:`s=\tan\delta`: 0 if the mirror of class I is class J, no bound above.

    Args:
        weight: ``(..., d)``, not zero.
        x: ``(..., n, d)``; the batch dimensions broadcast with those of ``weight``.
        y: labels -1 and 1, ``(..., n)``.

    Returns:
        ``(...)``; infinite at a right angle, negative beyond.

    Raises:
        ValueError: zero weight, bad shapes or labels, an empty class, equal centroids.

    Source: Tanay and Griffin 2016, adversarial strength (normalization from memory).

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([-1, 1])
        >>> adversarial_strength(torch.tensor([1.0, 2.0]), x, y)
        tensor(2.)
    """
    cosine, sine, _ = _parts(weight, _axis(x, y)[0])
    return sine / cosine


def adversarial_distance(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    r"""Mean distance of the classes from the boundary, :math:`\frac12\|j-i\|\cos\delta`.

    It is the mean of :math:`y\,d(x)` if both classes are equally large, whatever the bias.

    Args:
        weight: ``(..., d)``, not zero.
        x: ``(..., n, d)``; the batch dimensions broadcast with those of ``weight``.
        y: labels -1 and 1, ``(..., n)``.

    Returns:
        ``(...)``.

    Raises:
        ValueError: zero weight, bad shapes or labels, an empty class, equal centroids.

    Source: Tanay and Griffin 2018, adversarial distance.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.tensor([-1, 1])
        >>> adversarial_distance(torch.tensor([3.0, 4.0]), x, y)     # 5 / 2 * 3 / 5
        tensor(1.5000)
    """
    z, gap, _ = _axis(x, y)
    return gap / 2 * _parts(weight, z)[0]


def tilting_plane(weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Orthonormal :math:`\hat z,\hat n` with :math:`\hat w=\cos\delta\,\hat z+\sin\delta\,\hat n`.

    Args:
        weight: ``(..., d)`` with ``d >= 2``, not zero and not along :math:`j-i`.
        x: ``(..., n, d)``; the batch dimensions broadcast with those of ``weight``.
        y: labels -1 and 1, ``(..., n)``.

    Returns:
        :math:`\hat z` and :math:`\hat n`, ``(..., d)``; :math:`\hat n\cdot w\ge0`.

    Raises:
        ValueError: as above, and a weight along :math:`j-i`, which has no such plane.

    Source: Tanay and Griffin 2018, tilting plane.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([-1, 1])
        >>> tilting_plane(torch.tensor([1.0, -1.0]), x, y)
        (tensor([1., 0.]), tensor([ 0., -1.]))
    """
    z = _axis(x, y)[0]
    _, sine, rest = _parts(weight, z)
    if (sine <= torch.finfo(weight.dtype).eps).any():
        raise ValueError("weight must not lie along j - i, where the tilting plane is not unique")
    n = _unit(rest, "weight")[0]
    return z.expand_as(n).contiguous(), n


def tilt(
    weight: Tensor, bias: Tensor, direction: Tensor, angle: float, anchor: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Turn a boundary about one of its points: :math:`w_\theta=\cos\theta\,\hat w+\sin\theta\,u`.

    Data that do not vary along :math:`u` keep their decisions for every :math:`|\theta|<\pi/2`,
    and :math:`\cos\delta_\theta=\cos\theta\cos\delta` if :math:`u\perp j-i`.

    Args:
        weight: ``(d,)``, not zero.
        bias: scalar.
        direction: ``(d,)``; its part orthogonal to ``weight`` is :math:`u`, after normalization.
        angle: :math:`\theta` in radians.
        anchor: ``(d,)``; its projection on the boundary stays on the boundary.

    Returns:
        Unit weight ``(d,)`` and bias, a scalar.

    Raises:
        ValueError: zero weight, a direction along it, shapes that differ, an angle not finite.

    Source: Tanay and Griffin 2016, boundary tilting.

    Example:
        >>> east, north, origin = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(2)
        >>> tilt(east, torch.tensor(-2.0), north, torch.pi / 6, origin)[0]
        tensor([0.8660, 0.5000])
    """
    if weight.ndim != 1 or direction.shape != weight.shape or anchor.shape != weight.shape:
        raise ValueError(
            "weight, direction and anchor must have one shape (d,), got "
            f"{tuple(weight.shape)}, {tuple(direction.shape)}, {tuple(anchor.shape)}"
        )
    if not math.isfinite(angle):
        raise ValueError(f"angle must be finite, got {angle}")
    unit, along = _unit(weight)[0], _unit(direction, "direction")[0]
    _, sine, rest = _parts(direction, unit)
    if sine <= torch.finfo(weight.dtype).eps:
        raise ValueError("direction must not lie along weight")
    point = project(anchor[None], weight, bias)[0]
    along = _unit(rest, "direction")[0]
    turned = _unit(math.cos(angle) * unit + math.sin(angle) * along)[0]
    return turned, -(turned * point).sum()


def relative_perturbation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Size of the step to the mirror image beside the image, :math:`\|x_m-x\|/\|x\|`.

    Args:
        x: ``(..., n, d)``, no row zero.
        weight: ``(..., d)``, not zero.
        bias: ``(...)``.

    Returns:
        ``(..., n)``; it does not change if all images are scaled or upsampled.

    Raises:
        ValueError: zero weight, a zero image, shapes that do not fit.

    Source: Tanay and Griffin 2016, mirror images; the ratio is ours.

    Example:
        >>> weight = torch.tensor([1.0, 0.0])
        >>> relative_perturbation(torch.tensor([[3.0, 4.0]]), weight, torch.tensor(-1.0))
        tensor([0.8000])
    """
    norm = torch.linalg.vector_norm(x, dim=-1)
    if (norm == 0).any():
        raise ValueError("x must have no image that is zero")
    ratio: Tensor = 2 * signed_distance(x, weight, bias).abs() / norm
    return ratio


# --- classifiers ----------------------------------------------------------------------------------


def fit_linear_svm(
    x: Tensor, y: Tensor, reg: float, *, tol: float = 1e-6, max_iter: int = 60
) -> tuple[Tensor, Tensor]:
    r"""Support vector machine, :math:`\frac1n\sum\max(0,1-y(w\cdot x+b))+\lambda\|w\|^2`.

    As :math:`\lambda\to\infty` the weight points along :math:`j-i` (balanced classes).

    Args:
        x: ``(..., n, d)``, float64.
        y: labels -1 and 1, ``(..., n)``.
        reg: :math:`\lambda>0`; :math:`C=1/(2n\lambda)`.
        tol: largest relative duality gap.
        max_iter: most updates of the multipliers; a warning tells if they did not suffice.

    Returns:
        Weight ``(..., d)`` and bias ``(...)``.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: bad shapes, labels or numbers.

    Source: Tanay and Griffin 2016, support vector machines on digits.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> fit_linear_svm(x, torch.tensor([-1, 1]), 1.0)[0]         # 1 / (2 reg)
        tensor([0.5000], dtype=torch.float64)
    """
    path = svm_path(x, y, [reg], tol=tol, max_iter=max_iter)
    return path.weight[..., 0, :], path.bias[..., 0]


def fit_logistic(
    x: Tensor, y: Tensor, reg: float, *, tol: float = 1e-6, max_iter: int = 60
) -> tuple[Tensor, Tensor]:
    r"""Logistic regression, :math:`\frac1n\sum\log(1+e^{-y(w\cdot x+b)})+\lambda\|w\|^2`.

    Args:
        x: ``(..., n, d)``, float64.
        y: labels -1 and 1, ``(..., n)``.
        reg: :math:`\lambda>0`.
        tol: largest relative Newton decrement.
        max_iter: most Newton steps; a warning tells if they did not suffice.

    Returns:
        Weight ``(..., d)`` and bias ``(...)``.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: bad shapes, labels or numbers.

    Source: Tanay and Griffin 2016, regularization; the loss is the usual one.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> w, b = fit_logistic(x, torch.tensor([-1, 1]), 0.1)
        >>> 0.2 * w * (1 + w.exp())                             # the gradient is zero
        tensor([1.0000], dtype=torch.float64)
    """
    path = logistic_path(x, y, [reg], tol=tol, max_iter=max_iter)
    return path.weight[..., 0, :], path.bias[..., 0]
