r"""Simulated random objects, and the competitors of FCCov on them.

For the experiments of H. Yuan, C. D. Wang, Z. Yu, "Fréchet Cumulative Covariance Net for Deep
Nonlinear Sufficient Dimension Reduction with Random Objects", arXiv:2502.15374, 2025: responses
that are numbers, distributions or covariance matrices, a few of them spoiled; regression through a
bottleneck; reduction by kernel features and the eigenproblem :math:`X^T K X v = \lambda C v`.

Departures: the simulation models are ours, in the spirit of the field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wellposed.nets import MLP, Stacked
from wellposed.nets.columns import stacked_forward
from wellposed.nets.seeded import seeded_mlps
from wellposed.ops.metric_spaces import spd_distances, wasserstein_distances
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedAdam, generator, minibatches, seeded
from wellposed.train.checks import check_epochs

__all__ = [
    "RandomObjects",
    "landmark_features",
    "linear_sdr",
    "rotated_images",
    "simulate_objects",
    "train_bottlenecks",
]

LEVELS = 19
"""Levels 0.05, 0.10, ..., 0.95 of quantile functions."""

MODELS = ("number", "distribution", "location-scale", "matrix")


@dataclass(frozen=True)
class RandomObjects:
    """One simulated sample.

    Attributes:
        x: predictors ``(n, p)``, standard normal.
        truth: the true sufficient predictor, shape ``(n, d)``.
        coordinates: the responses in coordinates whose Euclidean distance is the metric, shape
            ``(n, q)``; only regression needs them.
        distances: of the responses, shape ``(n, n)``.
        spoiled: which responses are outliers, bool ``(n,)``.
    """

    x: Tensor
    truth: Tensor
    coordinates: Tensor
    distances: Tensor
    spoiled: Tensor


# --- data ------------------------------------------------------------------------------------


def _cauchy(n: int, g: torch.Generator) -> Tensor:
    return torch.tan(math.pi * (torch.rand(n, 1, generator=g, dtype=torch.float64) - 0.5))


def simulate_objects(
    model: str,
    n: int,
    *,
    generator: torch.Generator,
    num_predictors: int = 10,
    outliers: float = 0.0,
    outlier_scale: float = 50.0,
) -> RandomObjects:
    r"""Draw predictors and responses of one of four models; some responses are spoiled.

    - ``"number"``: :math:`e^{x_1/2} sgn(x_2) + 0.3 \varepsilon`.
    - ``"distribution"``: :math:`N(x_1^2 + x_2^2 + 0.3 \varepsilon, 1)` by its quantiles.
    - ``"location-scale"``: :math:`N(3 \sin(x_1 + x_2), (0.3 + x_3^2)^2)`; two predictors.
    - ``"matrix"``: the 3 x 3 covariance :math:`\exp(t A + E)` with
      :math:`t = \sin(2 x_1) + x_2^2 / 2`, noise :math:`E`, and the root metric.

    An outlier is moved by ``outlier_scale`` times a Cauchy variable :math:`c`: a number or a
    distribution is shifted, a covariance matrix receives an artifact of amplitude :math:`c` in a
    random direction.

    Args:
        model: one of the four names.
        n: sample size, at least 2.
        generator: source of randomness.
        num_predictors: at least 3.
        outliers: share of spoiled responses in [0, 1].
        outlier_scale: at least 0.

    Returns:
        The sample, in float32.

    Raises:
        ValueError: an unknown model or a number out of range.

    Source: models E, D and L after the simulations usual in the field; the matrix model is ours.

    Example:
        >>> sample = simulate_objects("distribution", 5, generator=generator(0))
        >>> sample.x.shape, sample.coordinates.shape
        (torch.Size([5, 10]), torch.Size([5, 19]))
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if n < 2 or num_predictors < 3:
        raise ValueError(f"n must be >= 2 and num_predictors >= 3, got {n} and {num_predictors}")
    if not 0.0 <= outliers <= 1.0 or not 0.0 <= outlier_scale < math.inf:
        raise ValueError(
            f"outliers must be in [0, 1] and outlier_scale at least 0, got {outliers} and "
            f"{outlier_scale}"
        )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, noise = normal(n, num_predictors), normal(n, 3, 3)
    spoiled = torch.zeros(n, dtype=torch.bool)
    spoiled[torch.randperm(n, generator=generator)[: round(outliers * n)]] = True
    shift = outlier_scale * _cauchy(n, generator) * spoiled[:, None]
    direction = F.normalize(normal(n, 3), dim=1)
    x1, x2, x3 = x[:, :1], x[:, 1:2], x[:, 2:3]
    levels = torch.special.ndtri(torch.arange(1, LEVELS + 1, dtype=torch.float64) / (LEVELS + 1))
    if model == "matrix":
        truth = torch.sin(2 * x1) + x2.square() / 2
        shape = x.new_tensor([[1.0, 0.5, 0.0], [0.5, -0.5, 0.5], [0.0, 0.5, -0.5]])
        log = truth[:, :, None] * shape + 0.1 * (noise + noise.mT)
        artifact = shift * direction
        response = torch.matrix_exp(log) + artifact[:, :, None] * artifact[:, None, :]
        distances = spd_distances(response)
        values, vectors = torch.linalg.eigh(response)
        coordinates = 2 * ((vectors * values.sqrt().unsqueeze(1)) @ vectors.mT).flatten(1)
    else:
        if model == "number":
            truth = torch.exp(x1 / 2) * torch.sign(x2)
            coordinates = truth + 0.3 * noise[:, 0, :1] + shift
        elif model == "distribution":
            truth = x1.square() + x2.square()
            coordinates = truth + 0.3 * noise[:, 0, :1] + shift + levels
        else:
            truth = torch.cat([torch.sin(x1 + x2), x3.square()], 1)
            coordinates = 3 * truth[:, :1] + shift + (0.3 + truth[:, 1:]) * levels
        distances = wasserstein_distances(coordinates)
        coordinates = coordinates / coordinates.shape[1] ** 0.5
    return RandomObjects(x.float(), truth.float(), coordinates.float(), distances.float(), spoiled)


def rotated_images(images: Tensor, angles: Tensor) -> Tensor:
    r"""Rotate images about their middle, counterclockwise, with bilinear interpolation.

    Args:
        images: shape ``(n, c, h, w)``.
        angles: in radians, shape ``(n,)``.

    Returns:
        Images of the same shape; what comes from outside is 0.

    Raises:
        ValueError: shapes that do not match.

    Source: ours.

    Example:
        >>> image = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])  # the upper right corner
        >>> rotated_images(image, torch.tensor([torch.pi / 2]))[0, 0].round().abs()
        tensor([[1., 0.],
                [0., 0.]])
    """
    if images.ndim != 4 or angles.shape != images.shape[:1]:
        raise ValueError(
            f"images must have shape (n, c, h, w) and angles (n,), got {tuple(images.shape)} and "
            f"{tuple(angles.shape)}"
        )
    c, s, o = angles.cos(), angles.sin(), torch.zeros_like(angles)
    maps = torch.stack([torch.stack([c, -s, o], 1), torch.stack([s, c, o], 1)], 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# --- reductions ------------------------------------------------------------------------------


def linear_sdr(
    features: Tensor, kernel: Tensor, *, num_directions: int = 1, ridge: float = 1e-3
) -> Tensor:
    r"""Directions with the largest :math:`v^T X^T K X v / n^2` per variance :math:`v^T C v`.

    With the ball kernel this is FCCov for linear maps in closed form, a robust relative of
    sliced inverse regression. On kernel features it is a nonlinear reduction without a network.

    Args:
        features: shape ``(..., n, p)``.
        kernel: of the responses, positive semidefinite, shape ``(..., n, n)``.
        num_directions: from 1 to p.
        ridge: share of the mean variance added to :math:`C`, positive.

    Returns:
        Directions in the columns, shape ``(..., p, num_directions)``, best first; projections have
        variance one (up to the ridge). Signs are arbitrary.

    Raises:
        ValueError: shapes that do not match, or a number out of range.

    Source: generalized eigenproblem of the kernel form.

    Example:
        >>> x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        >>> same = (x[:, :1] == x[:, :1].T).float()  # a kernel of the first column
        >>> [round(v, 4) for v in linear_sdr(x, same).abs().flatten().tolist()]
        [0.9995, 0.0]
    """
    n, p = features.shape[-2:] if features.ndim > 1 else (0, 0)
    if n < 1 or kernel.shape[-2:] != (n, n):
        raise ValueError(
            f"features and kernel must have shapes (..., n, p) and (..., n, n), got "
            f"{tuple(features.shape)} and {tuple(kernel.shape)}"
        )
    if not 1 <= num_directions <= p:
        raise ValueError(f"num_directions must be from 1 to {p}, got {num_directions}")
    if not 0.0 < ridge < math.inf:
        raise ValueError(f"ridge must be positive, got {ridge}")
    u = features - features.mean(-2, keepdim=True)
    cov = u.mT @ u / n
    level = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    level = level.clamp_min(torch.finfo(u.dtype).tiny)
    eye = torch.eye(p, dtype=u.dtype, device=u.device)
    root, failed = torch.linalg.cholesky_ex(cov + ridge * level * eye)
    if bool((failed != 0).any()) or not bool(root.isfinite().all()):
        raise ValueError("features have a covariance that is not finite or not positive definite")
    half = torch.linalg.solve_triangular(root, u.mT, upper=False)
    _, vectors = torch.linalg.eigh(half @ kernel @ half.mT / n**2)
    best = vectors[..., -num_directions:].flip(-1)
    directions: Tensor = torch.linalg.solve_triangular(root.mT, best, upper=True)
    return directions


def landmark_features(x: Tensor, landmarks: Tensor) -> Tensor:
    r"""Gaussian kernel features :math:`\exp(-\|x - z\|^2 / (2 h^2))`, h the median distance.

    Args:
        x: shape ``(..., n, p)``.
        landmarks: shape ``(..., m, p)``.

    Returns:
        Features ``(..., n, m)``.

    Raises:
        ValueError: shapes that do not match.

    Source: Nyström features, the usual shortcut of kernel methods.

    Example:
        >>> z = torch.tensor([[0.0], [1.0], [2.0]])  # median distance 1
        >>> landmark_features(z[:1], z).log().tolist()
        [[0.0, -0.5, -2.0]]
    """
    if (
        min(x.ndim, landmarks.ndim) < 2
        or x.shape[-1] != landmarks.shape[-1]
        or not landmarks.numel()
    ):
        raise ValueError(
            f"x and landmarks must have shapes (..., n, p) and (..., m, p), got {tuple(x.shape)} "
            f"and {tuple(landmarks.shape)}"
        )
    width = torch.cdist(landmarks, landmarks).flatten(-2).median(-1).values[..., None, None]
    scaled: Tensor = torch.cdist(x, landmarks) / width.clamp_min(1e-6)
    return torch.exp(-0.5 * scaled.square())


def train_bottlenecks(
    x: Tensor,
    targets: Tensor,
    *,
    seeds: Sequence[int],
    num_features: int = 1,
    huber: float | Sequence[float] = math.inf,
    hidden: Sequence[int] = (64, 32),
    num_epochs: int = 60,
    batch_size: int = 125,
    lr: float = 3e-3,
) -> Stacked:
    """Regression through a bottleneck: networks and a linear map from features to coordinates.

    Targets are centered by their median and divided by one median absolute deviation, which
    outliers do not move.

    Args:
        x: shape ``(m, n, p)``.
        targets: coordinates of the responses, shape ``(m, n, q)``.
        seeds: m seeds, as in :func:`train_reductions`.
        num_features: d, at least 1.
        huber: residuals beyond this many deviations count linearly; infinity for squared loss. One
            number, or one for each network.
        hidden: widths of the hidden layers.
        num_epochs: passes over the data, at least 1.
        batch_size: at least 2; a last batch that is not full is dropped.
        lr: learning rate of Adam.

    Returns:
        The networks up to the bottleneck.

    Raises:
        ValueError: shapes that do not match, or a number out of range.

    Source: the usual regression baseline; Huber 1964 for the loss.

    Example:
        >>> x = torch.linspace(-1, 1, 20).view(1, 20, 1)
        >>> train_bottlenecks(x, x, seeds=[0], num_epochs=1)(x).shape
        torch.Size([1, 20, 1])
    """
    check_epochs(num_epochs, batch_size)
    bends = [huber] * len(x) if isinstance(huber, int | float) else list(huber)
    if len(bends) != len(x) or not all(bend > 0.0 for bend in bends):
        raise ValueError(f"huber must be one positive number, or {len(x)} of them, got {huber}")
    nets = seeded_mlps(x, (*hidden, num_features), seeds)
    if targets.ndim != 3 or targets.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"targets must have shape ({len(x)}, {x.shape[1]}, q), got {tuple(targets.shape)}"
        )
    y = targets - targets.median(1, keepdim=True).values
    y = y / y.abs().flatten(1).median(1).values.clamp_min(1e-12)[:, None, None]
    n, q = y.shape[1:]
    heads = Stacked([_head(num_features, q, s) for s in seeds]).to(x.device, x.dtype)
    batch_size = min(batch_size, n)
    bend = y.new_tensor(bends).view(-1, 1, 1)
    g, adam = generator(seeds[0]), StackedAdam([*nets.parameters(), *heads.parameters()], lr=lr)
    for _ in range(num_epochs):
        for rows in minibatches(n, batch_size, g, x.device):
            if len(rows) < batch_size:
                continue
            wrong = stacked_forward(heads, stacked_forward(nets, x[:, rows])) - y[:, rows]
            # The gradient of Huber's loss is the clipped residual.
            wrong.backward(wrong.detach().clamp(-bend, bend) / wrong[0].numel())
            adam.step()
    warn_of_nan("train_bottlenecks", *nets.parameters())
    return nets


def _head(num_features: int, q: int, seed: int) -> MLP:
    with seeded(seed):
        return MLP((num_features, q))
