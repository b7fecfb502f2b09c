"""Naive loss minimization, and the gradient without its component along the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OrthoGrad", "nlm_alignment", "orthogonal_gradient"]

_TINY = 1e-30
"""Guard of the two divisions in the projection (authors' code)."""


def _inner(a: Tensor, b: Tensor, batch_dims: int) -> Tensor:
    """Inner product over all but the first `batch_dims` dimensions, kept for broadcasting."""
    product = (a * b).flatten(batch_dims).sum(dim=-1)
    return product.reshape(product.shape + (1,) * (a.ndim - batch_dims))


def _cosine(a: Tensor, b: Tensor, batch_dims: int = 0) -> Tensor:
    norms = _inner(a, a, batch_dims).sqrt() * _inner(b, b, batch_dims).sqrt()
    return (_inner(a, b, batch_dims) / (norms + _TINY)).flatten(batch_dims).squeeze(-1)


def orthogonal_gradient(
    weight: Tensor, grad: Tensor, rescale: bool = True, batch_dims: int = 0
) -> Tensor:
    r"""The gradient without its component along the weight.

    $g_\perp=g-\frac{\langle W,g\rangle}{\langle W,W\rangle}W$. Moving along the weight scales the
    logits of a homogeneous network and changes no prediction: the naive way to lower the loss.
    What is left is still a descent direction, since $\langle g,g_\perp\rangle=\|g_\perp\|^2$.

    Args:
        weight: parameter tensor W, any shape.
        grad: gradient of the same shape.
        rescale: give the result the length of `grad` (authors' code) instead of the shorter one
            of the equation.
        batch_dims: number of leading dimensions that count independent networks; each is
            projected on its own.

    Returns:
        Tensor of the shape of `grad`; a zero weight returns `grad`.

    Raises:
        ValueError: different shapes, or `batch_dims` outside [0, grad.ndim].

    Source: Prieto et al. (2025), perp-Grad; rescaling from the authors' code.

    Example:
        >>> orthogonal_gradient(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0])).tolist()
        [0.0, 5.0]
        >>> orthogonal_gradient(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]), False).tolist()
        [0.0, 4.0]
    """
    if weight.shape != grad.shape:
        raise ValueError(
            f"weight and grad must have one shape, got {tuple(weight.shape)}, {tuple(grad.shape)}"
        )
    if not 0 <= batch_dims <= grad.ndim:
        raise ValueError(f"batch_dims must be in [0, {grad.ndim}], got {batch_dims}")
    along = _inner(weight, grad, batch_dims) / (_inner(weight, weight, batch_dims) + _TINY)
    projected = grad - along * weight
    if not rescale:
        return projected
    length = _inner(projected, projected, batch_dims).sqrt()
    stretch = _inner(grad, grad, batch_dims).sqrt() / (length + _TINY)
    # Where nothing is left of a large gradient, this is infinite, and zero times it no number.
    return projected * stretch.clamp(max=torch.finfo(stretch.dtype).max)


class OrthoGrad(torch.optim.Optimizer):
    r"""$\perp$Grad: projects every gradient off its parameter, then lets a base optimizer step.

    Each parameter tensor is projected on its own. `param.grad` holds the projected gradient
    afterwards. The parameter groups are shared with the base optimizer, so learning-rate
    schedulers work on either.

    Args:
        params: parameters or parameter groups; a group with `project=False` is not projected.
        base_optimizer_cls: any `torch.optim.Optimizer` class.
        rescale: see `orthogonal_gradient`.
        batch_dims: see `orthogonal_gradient`; 1 for parameters stacked over networks.
        **base_kwargs: passed to `base_optimizer_cls` (lr, betas ...).

    Source: Prieto et al. (2025), perp-Grad.

    Example:
        >>> w = nn.Parameter(torch.tensor([2.0, 0.0]))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> OrthoGrad([w], torch.optim.SGD, lr=0.1, rescale=False).step()
        >>> [round(v, 4) for v in w.tolist()]
        [2.0, -0.4]
    """

    def __init__(
        self,
        params: Any,
        base_optimizer_cls: type[torch.optim.Optimizer] = torch.optim.SGD,
        *,
        rescale: bool = True,
        batch_dims: int = 0,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, {"project": True})
        self.rescale = rescale
        self.batch_dims = batch_dims
        self.base_optimizer = base_optimizer_cls(self.param_groups, **base_kwargs)
        self._share_with_base()

    def _share_with_base(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Projects the gradients and steps; a closure is evaluated first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if group["project"] and p.grad is not None:
                    p.grad.copy_(orthogonal_gradient(p, p.grad, self.rescale, self.batch_dims))
        self.base_optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the base optimizer's state."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share_with_base()


def nlm_alignment(model: nn.Module) -> dict[str, float]:
    r"""How far the gradient points along the weights: the sign of naive loss minimization (NLM).

    $\cos(-\nabla_W L, W)$ for every parameter that has a gradient. 1 means that a gradient step
    only scales the parameter up.

    Args:
        model: a module after `backward()`.

    Returns:
        Cosine in [-1, 1] by parameter name; 0 where gradient or parameter is zero.

    Source: Prieto et al. (2025), Fig. 5.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer.weight.grad = -2 * layer.weight.detach()
        >>> round(nlm_alignment(layer)["weight"], 4)
        1.0
    """
    return {
        name: float(_cosine(-p.grad, p.detach()))
        for name, p in model.named_parameters()
        if p.grad is not None
    }
