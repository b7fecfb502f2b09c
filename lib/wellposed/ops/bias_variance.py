"""The expected cross-entropy of a random predictor: bias, variance and entropy."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bias_variance"]


def bias_variance(log_q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Split the expected cross-entropy of a predictor with random features :math:`z`.

    .. math:: E\bigl[-\log q(y|z)\bigr] = \mathrm{KL}(p \,\|\, \tilde q)
              + E_z \mathrm{KL}(\tilde q \,\|\, q(\cdot|z)) + H(p), \qquad
              \tilde q = \frac{\exp E_z \log q(\cdot|z)}{Z}

    The variance, the second term, equals :math:`-\log Z`.

    Args:
        log_q: normalized log-probabilities under draws of :math:`z`, shape ``(draws, B, C)``.
        p: true probabilities of the classes, shape ``(B, C)``.

    Returns:
        Bias, variance and entropy, means over the B inputs, scalars.

    Raises:
        ValueError: shapes that do not match, or no draw or input.

    Source: Theorem 1 of Y. Chen et al., "Compressing Features for Learning with Noisy Labels",
        arXiv:2206.13140; in essence T. Heskes, Neural Computation 10, 1998.

    Example:
        >>> log_q = torch.tensor([[[0.8, 0.2]], [[0.2, 0.8]]]).log()  # undecided, and certain of it
        >>> bias, variance, entropy = bias_variance(log_q, torch.tensor([[0.5, 0.5]]))
        >>> round(bias.item(), 4), round(variance.exp().item(), 4)  # 1 / (2 * sqrt(0.8 * 0.2))
        (0.0, 1.25)
    """
    if log_q.ndim != 3 or log_q.shape[1:] != p.shape or 0 in log_q.shape:
        raise ValueError(
            "log_q and p must have shapes (draws, B, C) and (B, C), none of them empty, got "
            f"{tuple(log_q.shape)} and {tuple(p.shape)}"
        )
    mean_log = log_q.mean(dim=0)
    log_z = mean_log.logsumexp(dim=-1, keepdim=True)
    surprise = torch.where(p > 0, -p * (mean_log - log_z), 0.0).sum(dim=-1)
    entropy = torch.special.entr(p).sum(dim=-1)
    return (surprise - entropy).mean(), -log_z.mean(), entropy.mean()
