"""A network that adds residues with squared units, alone and several side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["QuadraticMLP", "analytic_mlp", "one_hot_columns", "stacked_logits", "table_logits"]


def one_hot_columns(pairs: Tensor, p: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The one-hot codes of the two residues of each pair, one above the other.

    Args:
        pairs: int64, shape (..., b, 2), entries in [0, p).
        p: the modulus.
        dtype: floating type of the result.

    Returns:
        Shape (..., 2 p, b).

    Raises:
        ValueError: pairs of another shape or type.

    Source: ours.

    Example:
        >>> one_hot_columns(torch.tensor([[0, 2]]), 3).flatten().tolist()
        [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """
    _check_pairs(pairs)
    return F.one_hot(pairs, p).flatten(-2).mT.to(dtype)


def stacked_logits(
    state: dict[str, Tensor],
    x: Tensor,
    *,
    activation: Callable[[Tensor], Tensor] = torch.square,
    mask: Tensor | None = None,
    batch_statistics: bool = False,
) -> Tensor:
    """What several `QuadraticMLP` answer, in one pass.

    Args:
        state: their state dictionaries, each entry stacked on a first axis of k networks; running
            statistics of BatchNorm are updated in place if `batch_statistics`.
        x: one-hot columns, shape (k, 2 p, b).
        activation: between the two layers.
        mask: multiplies the pre-activations, shape (k, width, b): dropout. None for none.
        batch_statistics: whether BatchNorm, where there is one, uses those of this batch.

    Returns:
        Scores, shape (k, p, b).

    Source: Doshi et al. (2024), arXiv 2310.13061.

    Example:
        >>> nets = [QuadraticMLP(3, 4), QuadraticMLP(3, 4)]
        >>> state = {n: torch.stack([m.state_dict()[n] for m in nets]) for n in ("U", "V", "W")}
        >>> pairs = torch.tensor([[[0, 1]], [[2, 2]]])
        >>> out = stacked_logits(state, one_hot_columns(pairs, 3))
        >>> torch.allclose(out[1].T, nets[1](pairs[1]))
        True
    """
    hidden = torch.cat([state["U"], state["V"]], 2) @ x
    if mask is not None:
        hidden = hidden * mask
    hidden = activation(hidden)  # (k, width, b)
    if "norm.weight" in state:
        # A channel for each neuron of each network.
        flat = F.batch_norm(
            hidden.reshape(1, -1, hidden.shape[2]),
            state["norm.running_mean"].view(-1),
            state["norm.running_var"].view(-1),
            state["norm.weight"].view(-1),
            state["norm.bias"].view(-1),
            batch_statistics,
        )
        hidden = flat.view_as(hidden)
    return state["W"] @ hidden


def table_logits(
    state: dict[str, Tensor], *, activation: Callable[[Tensor], Tensor] = torch.square
) -> Tensor:
    """What several `QuadraticMLP` without BatchNorm answer to each pair of residues.

    Args:
        state: their state dictionaries, each entry stacked on a first axis of k networks.
        activation: between the two layers.

    Returns:
        Scores, shape (k, p, p * p); column m * p + n answers the pair (m, n).

    Raises:
        ValueError: networks with BatchNorm.

    Source: Doshi et al. (2024), arXiv 2310.13061.

    Example:
        >>> net = QuadraticMLP(3, 4)
        >>> out = table_logits({name: weight[None] for name, weight in net.state_dict().items()})
        >>> torch.allclose(out[0, :, 2 * 3 + 1], net(torch.tensor([[2, 1]]))[0])
        True
    """
    if "norm.weight" in state:
        raise ValueError("state must be of networks without BatchNorm")
    # An outer sum in place of one-hot products; one network after another, in the cache.
    return torch.stack(
        [
            w @ activation(u[:, :, None] + v[:, None, :]).flatten(1)
            for u, v, w in zip(state["U"], state["V"], state["W"], strict=True)
        ]
    )


def _check_pairs(pairs: Tensor) -> None:
    if pairs.ndim < 2 or pairs.shape[-1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(
            f"pairs must be int64 of shape (..., 2), got {pairs.dtype} {tuple(pairs.shape)}"
        )


class QuadraticMLP(nn.Module):
    r"""The paper's network: $z=W(Ue_m+Ve_n)^{\odot2}$, without biases.

    All entries start normal with standard deviation $0.5\,(2\,\mathrm{width})^{-1/3}$.

    Args:
        p: modulus, at least 3.
        width: number of neurons, at least 1.
        dropout: share of pre-activations set to zero in training, in [0, 1).
        batch_norm: whether BatchNorm stands between the square and `W`.
        generator: CPU generator of the starting weights; None uses the global one.
        activation: in place of the square, for comparison.

    Input: pairs of residues, int64, shape (B, 2). Output: scores, shape (B, p).

    Raises:
        ValueError: an argument out of range, or pairs of another shape or type.

    Source: Doshi et al. (2024); starting weights and the place of dropout and BatchNorm from the
    authors' code.

    Example:
        >>> net = QuadraticMLP(3, 1)
        >>> for name, row in {"U": [[1., 2., 3.]], "V": [[0., 1., 0.]]}.items():
        ...     _ = net.get_parameter(name).data.copy_(torch.tensor(row))
        >>> _ = net.W.data.fill_(1.0)
        >>> net(torch.tensor([[2, 1]])).tolist()  # (3 + 1) ** 2 for each class
        [[16.0, 16.0, 16.0]]
    """

    def __init__(
        self,
        p: int,
        width: int,
        dropout: float = 0.0,
        batch_norm: bool = False,
        generator: torch.Generator | None = None,
        *,
        activation: Callable[[Tensor], Tensor] = torch.square,
    ) -> None:
        super().__init__()
        if p < 3 or width < 1:
            raise ValueError(f"p must be >= 3 and width >= 1, got p={p}, width={width}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.p, self.width, self.dropout, self.activation = p, width, dropout, activation
        std = 0.5 * (2 * width) ** (-1 / 3)
        self.U = nn.Parameter(std * torch.randn(width, p, generator=generator))
        self.V = nn.Parameter(std * torch.randn(width, p, generator=generator))
        self.W = nn.Parameter(std * torch.randn(p, width, generator=generator))
        self.norm = nn.BatchNorm1d(width) if batch_norm else None

    def forward(self, pairs: Tensor) -> Tensor:
        """Scores (B, p) of residue pairs (B, 2)."""
        if pairs.ndim != 2:
            raise ValueError(f"pairs must have shape (B, 2), got {tuple(pairs.shape)}")
        state = {"U": self.U[None], "V": self.V[None], "W": self.W[None]}
        if self.norm is not None:
            norm = [*self.norm.named_parameters(), *self.norm.named_buffers()]
            state |= {f"norm.{name}": value for name, value in norm}
        mask = None
        if self.training and self.dropout:
            mask = F.dropout(self.U.new_ones(1, self.width, len(pairs)), self.dropout)
        x = one_hot_columns(pairs[None], self.p, dtype=self.U.dtype)
        activation, training = self.activation, self.training
        out = stacked_logits(state, x, activation=activation, mask=mask, batch_statistics=training)
        return out[0].T


def analytic_mlp(p: int, width: int, generator: torch.Generator | None = None) -> QuadraticMLP:
    r"""A network that adds modulo p by construction: every neuron is one wave.

    $U_{kn}=\cos(2\pi f_kn/p+u_k)$, $V_{kn}=\cos(2\pi f_kn/p+v_k)$,
    $W_{qk}=\cos(2\pi f_kq/p+u_k+v_k)$ with uniform phases and $f_k$ cycling over
    $1,\dots,\lfloor(p-1)/2\rfloor$.
    Wide networks answer right; the unwanted terms average out.

    Args:
        p: modulus, at least 3; odd for a network that can answer right.
        width: number of neurons, at least 1.
        generator: CPU generator of the phases.

    Returns:
        A `QuadraticMLP` with these weights.

    Raises:
        ValueError: `p` below 3 or `width` below 1.

    Source: Gromov (2023), arXiv 2301.02679, as Doshi et al. (2024) use it.

    Example:
        >>> net = analytic_mlp(7, 400, torch.Generator().manual_seed(0))
        >>> net(torch.tensor([[5, 4]])).argmax().item()
        2
    """
    net = QuadraticMLP(p, width)
    phases = 2 * torch.pi * torch.rand(2, width, 1, generator=generator)
    frequency = torch.arange(width).remainder((p - 1) // 2).add(1)[:, None]
    angle = 2 * torch.pi * frequency * torch.arange(p) / p  # (width, p)
    with torch.no_grad():
        net.U.copy_((angle + phases[0]).cos())
        net.V.copy_((angle + phases[1]).cos())
        net.W.copy_((angle + phases.sum(0)).cos().T)
    return net
