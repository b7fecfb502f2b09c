"""The policy: from images to Beta distributions of mask cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Beta

__all__ = ["MaskPolicy", "blend_concentrations", "sample_cells", "update_base"]

DECAY, MOMENTUM = 0.9, 0.99  # weight and memory of the base vectors, from the released code
EDGE = 1e-6  # the log-density of a Beta is infinite at 0 and 1, where float32 samples do land


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
