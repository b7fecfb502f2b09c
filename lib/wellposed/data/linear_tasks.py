"""Linear tasks that share a basis: problems on which multi-task theory holds exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "LinearTasks",
    "Sampler",
    "copied_tasks",
    "random_tasks",
    "source_samplers",
    "target_sample",
]

Sampler = Callable[[int, int], tuple[Tensor, Tensor]]  # (task, n) -> inputs (n, d), targets (n,)


@dataclass(frozen=True)
class LinearTasks:
    """Problems that follow the theory exactly, side by side in the leading axis."""

    basis: Tensor  # (b, d, k), orthonormal columns
    heads: Tensor  # (b, k, M)
    target_head: Tensor  # (b, k)
    noise: float  # standard deviation of the response's noise


def random_tasks(
    num: int,
    *,
    dim: int,
    rank: int,
    num_tasks: int,
    noise: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> LinearTasks:
    r"""Random bases and unit heads; the target's head is the normalized sum of the first two.

    Args:
        num: problems side by side.
        dim: $d$.
        rank: $k$, at most $d$.
        num_tasks: M, at least 2 and at least $k$.
        noise: $\sigma\ge0$.
        generator: source of bases and heads.
        dtype: of the problems.

    Returns:
        :class:`LinearTasks` on the generator's device.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> tasks = random_tasks(3, dim=5, rank=2, num_tasks=4, noise=1.0, generator=g)
        >>> tuple(tasks.heads.shape), round(tasks.target_head[0].norm().item(), 6)
        ((3, 2, 4), 1.0)
    """
    if num < 1 or not 1 <= rank <= dim or num_tasks < max(2, rank) or noise < 0:
        raise ValueError(
            "random_tasks needs num >= 1, 1 <= rank <= dim, num_tasks >= max(2, rank) and noise "
            f">= 0, got {num}, rank {rank}, dim {dim}, num_tasks {num_tasks}, noise {noise}"
        )
    like = torch.empty(0, dtype=dtype, device=generator.device)
    basis = torch.linalg.qr(_normal((num, dim, rank), generator, like)).Q
    heads = _normal((num, rank, num_tasks), generator, like)
    heads = heads / heads.norm(dim=-2, keepdim=True)
    target = heads[..., 0] + heads[..., 1]
    return LinearTasks(basis, heads, target / target.norm(dim=-1, keepdim=True), noise)


def copied_tasks(
    num: int,
    *,
    dim: int,
    num_tasks: int,
    noise: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> LinearTasks:
    r"""An instance on which the L2 rule pays the number of tasks, rank 2.

    One source has the head $e_1$, the other $M-1$ are copies of $e_2$, the target's is
    $(e_1+e_2)/\sqrt2$. Then $\|\nu^1\|_1^2=2$, while counts in proportion to $(\nu^2_m)^2$ have
    $N\,E(n)=M\frac{M}{2(M-1)}$, a factor $\frac M4\frac M{M-1}$ more; the L1 rule gives each head
    half of the samples, the L2 rule gives the copies a share of $1/M$ together.

    Args:
        num: problems side by side, with random bases.
        dim: $d\ge2$.
        num_tasks: M, at least 2.
        noise: $\sigma\ge0$.
        generator: source of the bases.
        dtype: of the problems.

    Returns:
        :class:`LinearTasks` on the generator's device.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> tasks = copied_tasks(1, dim=5, num_tasks=5, noise=1.0, generator=g)
        >>> tasks.heads[0].sum(1).tolist()
        [1.0, 4.0]
    """
    if num < 1 or dim < 2 or num_tasks < 2 or noise < 0:
        raise ValueError(
            "copied_tasks needs num >= 1, dim >= 2, num_tasks >= 2 and noise >= 0, got "
            f"{num}, {dim}, {num_tasks} and {noise}"
        )
    like = torch.empty(0, dtype=dtype, device=generator.device)
    basis = torch.linalg.qr(_normal((num, dim, 2), generator, like)).Q
    heads = basis.new_zeros(num, 2, num_tasks)
    heads[:, 0, 0] = 1
    heads[:, 1, 1:] = 1
    return LinearTasks(basis, heads, basis.new_full((num, 2), 0.5**0.5), noise)


def source_samplers(tasks: LinearTasks, generator: torch.Generator) -> list[Sampler]:
    r"""Samplers of standard normal inputs and their responses, one a problem.

    Args:
        tasks: the problems.
        generator: source of inputs and noise, shared by all samplers; a CPU generator gives the
            same samples on every device.

    Returns:
        Functions `sampler(task, n)` giving inputs `(n, d)` and targets `(n,)`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> tasks = random_tasks(1, dim=3, rank=1, num_tasks=2, noise=0.0, generator=g)
        >>> x, y = source_samplers(tasks, g)[0](1, 5)
        >>> bool((x @ tasks.basis[0] @ tasks.heads[0, :, 1] - y).abs().max() < 1e-12)
        True
    """

    def sampler_for(coefficients: Tensor) -> Sampler:
        def sampler(task: int, n: int) -> tuple[Tensor, Tensor]:
            drawn = _normal((n, coefficients.shape[0] + 1), generator, coefficients)
            x = drawn[:, :-1]
            return x, x @ coefficients[:, task] + tasks.noise * drawn[:, -1]

        return sampler

    return [sampler_for(coefficients) for coefficients in tasks.basis @ tasks.heads]


def target_sample(tasks: LinearTasks, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A sample of every problem's target task.

    Args:
        tasks: the problems.
        n: samples of each, at least 1.
        generator: source of inputs and noise.

    Returns:
        Inputs `(b, n, d)` and targets `(b, n)`.

    Raises:
        ValueError: `n` below 1.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> tasks = random_tasks(2, dim=3, rank=1, num_tasks=2, noise=0.0, generator=g)
        >>> x, y = target_sample(tasks, 4, g)
        >>> tuple(x.shape), tuple(y.shape)
        ((2, 4, 3), (2, 4))
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    b, d, _ = tasks.basis.shape
    drawn = _normal((b, n, d + 1), generator, tasks.basis)
    x = drawn[..., :-1]
    coefficients = tasks.basis @ tasks.target_head.unsqueeze(-1)
    return x, (x @ coefficients).squeeze(-1) + tasks.noise * drawn[..., -1]


def _normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Drawn where the generator lives: a CPU generator gives the same on every device."""
    drawn = torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)
