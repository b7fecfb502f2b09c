r"""Policy gradient-driven noise mask: a small network learns where to dim each training image.

M. C. Yavuz, Y. Yang, "Policy Gradient-Driven Noise Mask", 2024, arXiv:2406.14568; authors' code at
github.com/ogrenenmakine/Policy-Gradient-Driven-Noise-Mask.

Claim: a classifier pretrained on images that are multiplied by masks from a learned policy, and
then fine-tuned on clean images without the policy, beats one trained in the usual way.

For an image :math:`x` the policy puts out :math:`u, v \in \mathbb R^J`, and running base vectors
:math:`A, B` keep what is common to all images. The mask has :math:`J = G^2` independent cells,

.. math::

    s_j \sim \mathrm{Beta}(\alpha_j, \beta_j), \qquad
    \log \alpha = 0.9 A + 0.1 u, \quad \log \beta = 0.9 B + 0.1 v ,

enlarged to the image size and blurred. With the cross-entropy :math:`c_i` of the masked image
:math:`i`, REINFORCE follows

.. math::

    \nabla_\phi = \frac 1N \sum_i (c_i - b) \, \nabla_\phi \sum_j \log p(s_{ij}) .

The authors' released code minimizes another scalar, in policy and classifier at once,

.. math::

    L = \bar c \cdot \frac 1N \sum_i \log \sum_j p(s_{ij}), \qquad \bar c = \frac 1N \sum_i c_i .

Departures from the paper: both losses are offered, and REINFORCE is the default, because the paper
names it; the baseline :math:`b` is ours. Cells are clamped away from 0 and 1. The heads are
evaluated once per step, not twice as in the released code. Layers of the heads are as wide as the
features, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from wellposed.ops.numerics import warn_of_nan
from wellposed.train import generator, minibatches, seeded

__all__ = [
    "HeatRun",
    "MaskPolicy",
    "blend_concentrations",
    "compose_quadrants",
    "fit",
    "heat",
    "policy_loss",
    "render_mask",
    "sample_cells",
    "update_base",
]

DECAY, MOMENTUM = 0.9, 0.99  # weight and memory of the base vectors, from the released code
EDGE = 1e-6  # the log-density of a Beta is infinite at 0 and 1, where float32 samples do land
Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeatRun:
    """What the pretraining did; row ``k`` of the masks is after ``k`` epochs.

    Attributes:
        mean_mask: mean of each cell's distribution over the images, ``(epochs + 1, grid * grid)``.
        spread: standard deviation of that mean between images, averaged over the cells,
            ``(epochs + 1,)``; zero means that all images get the same distribution.
        cost: mean cross-entropy of the masked images in each epoch, ``(epochs,)``.
    """

    mean_mask: Tensor
    spread: Tensor
    cost: Tensor


def blend_concentrations(
    base_alpha: Tensor,
    base_beta: Tensor,
    delta_alpha: Tensor,
    delta_beta: Tensor,
    decay: float = DECAY,
) -> tuple[Tensor, Tensor]:
    r"""Concentrations of the Beta distributions, from the base and the policy's outputs.

    .. math:: \alpha = \exp(d A + (1 - d)\, u), \qquad \beta = \exp(d B + (1 - d)\, v)

    Args:
        base_alpha, base_beta: base vectors :math:`A, B`, shape ``(1, J)``.
        delta_alpha, delta_beta: outputs of the policy :math:`u, v`, shape ``(N, J)``.
        decay: weight :math:`d` of the base, in [0, 1].

    Returns:
        :math:`(\alpha, \beta)`, each positive and of shape ``(N, J)``.

    Raises:
        ValueError: shapes that do not match, or ``decay`` out of range.

    Source: the released code (forward pass of its policy network).

    Example:
        >>> zero = torch.zeros(1, 1)
        >>> blend_concentrations(zero, zero, zero, zero)  # the uniform distribution
        (tensor([[1.]]), tensor([[1.]]))
    """
    cells = base_alpha.shape[-1] if base_alpha.ndim == 2 else -1
    if base_alpha.shape != (1, cells) or base_beta.shape != (1, cells):
        raise ValueError(
            f"base_alpha and base_beta must both have shape (1, J), got {tuple(base_alpha.shape)} "
            f"and {tuple(base_beta.shape)}"
        )
    shape = (delta_alpha.shape[0] if delta_alpha.ndim == 2 else -1, cells)
    if delta_alpha.shape != shape or delta_beta.shape != shape:
        raise ValueError(
            f"delta_alpha and delta_beta must both have shape (N, {cells}), got "
            f"{tuple(delta_alpha.shape)} and {tuple(delta_beta.shape)}"
        )
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    log_alpha = decay * base_alpha + (1.0 - decay) * delta_alpha
    log_beta = decay * base_beta + (1.0 - decay) * delta_beta
    return log_alpha.exp(), log_beta.exp()


def update_base(base: Tensor, delta: Tensor, momentum: float = MOMENTUM) -> Tensor:
    r"""Move a base vector toward the mean output of the batch.

    .. math:: A \leftarrow m A + (1 - m) \, \frac1N \sum_i u_i

    Args:
        base: base vector, shape ``(1, J)``.
        delta: outputs of the policy, shape ``(N, J)``, with N at least 1.
        momentum: memory :math:`m`, in [0, 1].

    Returns:
        The new base, shape ``(1, J)``, without gradient.

    Raises:
        ValueError: shapes that do not match, or ``momentum`` out of range.

    Source: the released code (forward pass of its policy network).

    Example:
        >>> update_base(torch.zeros(1, 1), torch.tensor([[1.0], [3.0]]), momentum=0.5).item()
        1.0
    """
    if base.ndim != 2 or base.shape[0] != 1 or delta.ndim != 2 or len(delta) == 0:
        raise ValueError(
            "base must have shape (1, J) and delta (N, J) with N >= 1, got "
            f"{tuple(base.shape)} and {tuple(delta.shape)}"
        )
    if base.shape[1] != delta.shape[1]:
        raise ValueError(f"base has {base.shape[1]} cells, delta has {delta.shape[1]}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    return momentum * base.detach() + (1.0 - momentum) * delta.detach().mean(0, keepdim=True)


def _blur(mask: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Separable Gaussian blur of (N, 1, H, W) with reflected borders."""
    half = kernel_size // 2
    place = torch.arange(-half, half + 1, dtype=mask.dtype, device=mask.device)
    weights = (-0.5 * (place / sigma) ** 2).exp()
    weights = weights / weights.sum()
    padded = F.pad(mask, (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def render_mask(
    cells: Tensor,
    size: tuple[int, int],
    kernel_size: int | None = None,
    sigma: float | None = None,
) -> Tensor:
    """Turn cells into masks of the size of the images: enlarge blocks, then blur.

    Args:
        cells: values of the cells, shape ``(N, J)``, J a square; row by row of the grid.
        size: height and width of the images.
        kernel_size: side of the Gaussian blur, odd; without it there is no blur.
        sigma: standard deviation of the blur in pixels, positive; goes with ``kernel_size``.

    Returns:
        Masks of shape ``(N, 1, H, W)``, to be multiplied with the images, all channels alike.

    Raises:
        ValueError: J is not a square, an even or too large kernel, a kernel without sigma.

    Source: the released code (training loop; kernel 13, sigma 6 at 224 pixels).

    Example:
        >>> render_mask(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), (2, 4))[0, 0].tolist()
        [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    """
    if cells.ndim != 2 or isqrt(cells.shape[1]) ** 2 != cells.shape[1] or cells.shape[1] == 0:
        raise ValueError(f"cells must have shape (N, J) with J a square, got {tuple(cells.shape)}")
    if (kernel_size is None) != (sigma is None):
        raise ValueError(f"kernel_size and sigma go together, got {kernel_size} and {sigma}")
    grid = isqrt(cells.shape[1])
    row, column = (torch.arange(n, device=cells.device) * grid // n for n in size)
    mask = cells.view(-1, 1, grid, grid).index_select(2, row).index_select(3, column)
    if kernel_size is None or sigma is None:
        return mask
    if kernel_size < 1 or kernel_size % 2 == 0 or kernel_size // 2 >= min(size):
        raise ValueError(
            f"kernel_size must be odd, positive and below twice the image, got {kernel_size}"
        )
    if not sigma > 0.0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    return _blur(mask, kernel_size, sigma)


def policy_loss(
    log_prob: Tensor, cost: Tensor, mode: str = "reinforce", baseline: bool = True
) -> Tensor:
    r"""Loss whose gradient teaches the policy: REINFORCE, or the scalar of the released code.

    .. math:: L_{\text{reinforce}} = \frac1N \sum_i (c_i - b) \sum_j \log p_{ij}, \qquad
              L_{\text{released}} = \bar c \, \frac1N \sum_i \log \sum_j p_{ij}

    In ``reinforce`` the cost is a constant, :math:`b` is its mean over the batch or zero, and the
    classifier needs its own loss. (With the batch mean as :math:`b` the expected gradient shrinks
    by the harmless factor :math:`1 - 1/N`, because :math:`b` contains the image's own cost.) In
    ``released`` the cost keeps its gradient and the classifier learns from the same scalar.

    Args:
        log_prob: log-densities of the drawn cells, shape ``(N, J)``.
        cost: loss of the classifier on each masked image, shape ``(N,)``.
        mode: ``"reinforce"`` or ``"released"``.
        baseline: whether to subtract the mean cost; of no effect in ``released``.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes that do not match, an empty batch, or another mode.

    Source: the method's name and README (REINFORCE); the released code (training loop).

    Example:
        >>> log_prob = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
        >>> policy_loss(log_prob, torch.tensor([4.0, 2.0])).item()  # ((4-3) 3 + (2-3) 0) / 2
        1.5
    """
    if log_prob.ndim != 2 or log_prob.numel() == 0 or cost.shape != log_prob.shape[:1]:
        raise ValueError(
            "log_prob must have shape (N, J) and cost (N,), got "
            f"{tuple(log_prob.shape)} and {tuple(cost.shape)}"
        )
    if mode == "released":
        return log_prob.logsumexp(dim=1).mean() * cost.mean()
    if mode != "reinforce":
        raise ValueError(f"mode must be 'reinforce' or 'released', got {mode!r}")
    advantage = cost.detach()
    if baseline:
        advantage = advantage - advantage.mean()
    return (advantage * log_prob.sum(dim=1)).mean()


def sample_cells(dist: Beta) -> Tensor:
    """Draw the cells of one mask per image, clamped to the open interval (0, 1).

    There is no gradient through the draw: the policy learns from log-densities alone. The draw
    uses torch's global random state.

    Args:
        dist: Beta distributions with batch shape ``(N, J)``.

    Returns:
        Cells of shape ``(N, J)``, in [1e-6, 1 - 1e-6]. NaN where both concentrations are 0, or
        infinite, as after a policy that diverged: looking for it here would wait for the device.

    Source: the released code (training loop); the clamp is ours.

    Example:
        >>> sample_cells(Beta(torch.full((1, 1), 1e9), torch.full((1, 1), 1e9))).round(decimals=3)
        tensor([[0.5000]])
    """
    return dist.sample().clamp(EDGE, 1.0 - EDGE)


def _head(width: int, outputs: int) -> nn.Sequential:
    """Three linear layers with batch normalization and ReLU in between."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class MaskPolicy(nn.Module):
    r"""The policy network: from images to Beta distributions of mask cells.

    Args:
        encoder: module from images ``(N, ...)`` to features ``(N, feature_dim)``.
        feature_dim: number of features, at least 1.
        grid: cells per side :math:`G`, at least 1.
        decay: weight of the base vectors, in [0, 1].
        momentum: memory of the base vectors, in [0, 1].

    Attributes:
        base_alpha, base_beta: buffers of shape ``(1, G * G)``, uniform in [0, 1) at the start. In
            training mode each call moves them, after their use; no gradient reaches them.

    Raises:
        ValueError: a number out of range.

    Source: the released code (its policy network; grid 64).

    Example:
        >>> policy = MaskPolicy(nn.Flatten(), feature_dim=4, grid=3)
        >>> policy(torch.rand(5, 1, 2, 2)).mean.shape
        torch.Size([5, 9])
    """

    base_alpha: Tensor
    base_beta: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        grid: int,
        decay: float = DECAY,
        momentum: float = MOMENTUM,
    ) -> None:
        super().__init__()
        if feature_dim < 1 or grid < 1:
            raise ValueError(
                f"feature_dim and grid must be at least 1, got {feature_dim} and {grid}"
            )
        for name, value in (("decay", decay), ("momentum", momentum)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        self.encoder, self.decay, self.momentum = encoder, decay, momentum
        self.alpha, self.beta = (_head(feature_dim, grid * grid) for _ in range(2))
        self.register_buffer("base_alpha", torch.rand(1, grid * grid))
        self.register_buffer("base_beta", torch.rand(1, grid * grid))

    def forward(self, x: Tensor) -> Beta:
        """Map images (N, ...) to Beta distributions with batch shape (N, grid * grid)."""
        features = self.encoder(x)
        u, v = self.alpha(features), self.beta(features)
        alpha, beta = blend_concentrations(self.base_alpha, self.base_beta, u, v, self.decay)
        if self.training:
            self.base_alpha = update_base(self.base_alpha, u, self.momentum)
            self.base_beta = update_base(self.base_beta, v, self.momentum)
        return Beta(alpha, beta, validate_args=False)  # validation would wait for the device


def compose_quadrants(x: Tensor, y: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four images in one, of which only the top left one belongs to the label.

    The three others are drawn at random from the same images, with replacement: they look the same
    and say nothing. So the informative part of the large image is known.

    Args:
        x: images, shape ``(n, channels, h, w)``.
        y: labels, shape ``(n,)``.
        generator: source of the distractors, on the CPU.

    Returns:
        Images of shape ``(n, channels, 2 h, 2 w)``, and ``y`` itself.

    Raises:
        ValueError: images that are not 4-D, or another number of labels.

    Source: none in the paper; a task with a known answer.

    Example:
        >>> x, y = torch.tensor([3.0]).view(1, 1, 1, 1), torch.tensor([1])
        >>> compose_quadrants(x, y, generator=torch.Generator())[0].tolist()
        [[[[3.0, 3.0], [3.0, 3.0]]]]
    """
    if x.ndim != 4 or len(x) == 0 or y.shape != x.shape[:1]:
        raise ValueError(
            "x must have shape (n, channels, h, w) and y (n,), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    right, low, corner = torch.randint(len(x), (3, len(x)), generator=generator).to(x.device)
    top = torch.cat([x, x[right]], dim=-1)
    return torch.cat([top, torch.cat([x[low], x[corner]], dim=-1)], dim=-2), y


def _reinforce(log_prob: Tensor, cost: Tensor) -> Tensor:
    """REINFORCE for the policy plus the mean cost for the classifier."""
    return policy_loss(log_prob, cost) + cost.mean()


def heat(
    classifier: nn.Module,
    policy: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    classifier_optimizer: torch.optim.Optimizer,
    policy_optimizer: torch.optim.Optimizer,
    seed: int,
    objective: Objective = _reinforce,
    epochs: int = 90,
    batch_size: int = 32,
    kernel_size: int | None = None,
    sigma: float | None = None,
) -> HeatRun:
    """Pretrain ("heat") a classifier on images masked by a policy that learns along with it.

    An optimizer with ``lr=0`` freezes its network: so one function also trains under masks that
    do not learn, and teaches a policy about a classifier that stays as it is.

    Args:
        classifier: network from images to logits ``(N, classes)``; trained in place.
        policy: :class:`MaskPolicy`, or a module that maps images to a ``Beta``; trained in place.
        x: images, shape ``(n, channels, H, W)``, on the device of the networks.
        y: labels, shape ``(n,)``, int64.
        classifier_optimizer, policy_optimizer: one step each per minibatch.
        seed: of the order of the images and the drawn masks.
        objective: from ``log_prob (N, J)`` and ``cost (N,)`` to the scalar that both networks
            descend; REINFORCE plus the mean cost unless told otherwise.
        epochs: passes over the images, at least 1.
        batch_size: images a step, at least 2 for batch normalization.
        kernel_size, sigma: blur of the masks, see :func:`render_mask`.

    Returns:
        Mean masks and costs, on the CPU. A RuntimeWarning if the run diverged.

    Raises:
        ValueError: ``epochs`` below 1, images that are not 4-D, fewer than two of them.

    Source: the released code (training loop; 90 epochs, batches of 32 a device).

    Example:
        >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> policy = MaskPolicy(nn.Flatten(), feature_dim=16, grid=2)
        >>> sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, policy)]
        >>> run = heat(
        ...     net, policy, x, y, classifier_optimizer=sgd[0], policy_optimizer=sgd[1], seed=0,
        ...     epochs=3, batch_size=4,
        ... )
        >>> run.mean_mask.shape
        torch.Size([4, 4])
    """
    if epochs < 1 or x.ndim != 4 or len(x) < 2 or len(x) != len(y):
        raise ValueError(
            "epochs must be at least 1, x 4-D with two images or more, and y as long, got "
            f"{epochs} and shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    order = generator(seed)
    size = (x.shape[-2], x.shape[-1])
    masks, spreads, costs = [], [], []

    def look() -> None:
        policy.eval()
        with torch.no_grad():
            mean = policy(x).mean
        masks.append(mean.mean(0))
        spreads.append(mean.std(0).mean())
        policy.train()

    classifier.train()
    look()
    with seeded(seed):
        for _ in range(epochs):
            total = x.new_zeros(())
            for index in minibatches(len(x), batch_size, order, device=x.device):
                dist = policy(x[index])
                cells = sample_cells(dist)
                masked = x[index] * render_mask(cells, size, kernel_size, sigma)
                cost = F.cross_entropy(classifier(masked), y[index], reduction="none")
                classifier_optimizer.zero_grad()
                policy_optimizer.zero_grad()
                objective(dist.log_prob(cells), cost).backward()  # type: ignore[no-untyped-call]
                classifier_optimizer.step()
                policy_optimizer.step()
                total += cost.detach().sum()
            costs.append(total / len(x))
            look()
    run = [torch.stack(part).cpu() for part in (masks, spreads, costs)]
    warn_of_nan("heat", *run)
    return HeatRun(*run)


def _clean(x: Tensor) -> Tensor:
    return x


def fit(
    classifier: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    seed: int,
    corrupt: Callable[[Tensor], Tensor] = _clean,
    epochs: int = 10,
    batch_size: int = 32,
) -> Tensor:
    """Train a classifier in the usual way: fine-tuning after :func:`heat`, and the baselines.

    Args:
        classifier: network from images to logits ``(N, classes)``; trained in place.
        x: images, shape ``(n, ...)``.
        y: labels, shape ``(n,)``, int64.
        optimizer: one step per minibatch.
        seed: of the order of the images and of all noise.
        corrupt: what happens to a minibatch of images before the classifier sees it; may draw
            from torch's global random state.
        epochs: passes over the images, at least 1.
        batch_size: images a step, at least 1.

    Returns:
        Mean cross-entropy in each epoch, ``(epochs,)``, on the CPU.

    Raises:
        ValueError: ``epochs`` below 1.

    Source: the authors' README (fine-tuning for 10 epochs on clean images).

    Example:
        >>> net = nn.Linear(1, 2)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> bool(fit(net, x, y, optimizer=sgd, seed=0, epochs=50)[-1] < 0.1)
        True
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    order = generator(seed)
    costs = []
    classifier.train()
    with seeded(seed):
        for _ in range(epochs):
            total = x.new_zeros(())
            for index in minibatches(len(x), batch_size, order, device=x.device):
                loss = F.cross_entropy(classifier(corrupt(x[index])), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(index)
            costs.append(total / len(x))
    return torch.stack(costs).cpu()
