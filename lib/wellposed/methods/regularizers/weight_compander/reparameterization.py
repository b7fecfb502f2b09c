"""The bounded function, and the layers whose weights go through it."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["WeightCompander", "apply_weight_compander", "compand", "compand_inverse"]

SCALE = 2.0  # kappa: a and b in units of the initial weights' standard deviation (our choice)
CLAMP = 1.5  # largest |w / a| of the inverse, just below pi / 2, where the tangent explodes
M = TypeVar("M", bound=nn.Module)


def _psi(v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """The reparameterization; to try another one, change this function and the next."""
    return a * torch.arctan(v / b)


def _psi_inverse(w: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    return b * torch.tan(w / a)


def _check_positive(**values: Tensor | float) -> None:
    for name, value in values.items():
        good = bool((value > 0).all()) if isinstance(value, Tensor) else 0.0 < value < math.inf
        if not good:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def compand(v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    r"""Map free parameters to bounded weights: :math:`\Psi(v) = a \arctan(v / b)`.

    Args:
        v: free parameters, any shape, floating point.
        a: scale of the weights, positive; they stay below :math:`a \pi / 2` in size.
        b: scale of the free parameters, positive. The slope at zero is ``a / b``.

    Returns:
        Weights, in the shape of ``v``.

    Raises:
        ValueError: ``a`` or ``b`` is not positive.

    Source: the form is not verified, see the module's departures.

    Example:
        >>> round(compand(torch.tensor(3.0), 2.0, 3.0).item(), 4)  # 2 arctan(1) = pi / 2
        1.5708
    """
    _check_positive(a=a, b=b)
    return _psi(v, a, b)


def compand_inverse(w: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    r"""Free parameters that give these weights: :math:`\Psi^{-1}(w) = b \tan(w / a)`.

    Args:
        w: weights, any shape, floating point, smaller than :math:`a \pi / 2` in size.
        a, b: scales, positive.

    Returns:
        Free parameters, in the shape of ``w``.

    Raises:
        ValueError: ``a`` or ``b`` is not positive, or a weight lies outside the range of
            :func:`compand`.

    Source: the form is not verified, see the module's departures.

    Example:
        >>> round(compand_inverse(torch.tensor(math.pi / 2), 2.0, 3.0).item(), 4)
        3.0
    """
    _check_positive(a=a, b=b)
    if not bool((w.abs() < a * (math.pi / 2)).all()):
        raise ValueError(f"w must be smaller than a * pi / 2 in size, got a = {a}")
    return _psi_inverse(w, a, b)


class WeightCompander(nn.Module):
    r"""The compander as a parametrization, for ``torch.nn.utils.parametrize``.

    Args:
        a: scale of the weights, positive; one scalar for the whole tensor.
        b: scale of the free parameters, positive.
        learnable: whether :math:`\log a` and :math:`\log b` are parameters to train. Keep weight
            decay away from them: it would pull both scales to one.
        device, dtype: of the two scalars.

    Raises:
        ValueError: ``a`` or ``b`` is not positive.

    Source: the abstract (learned hyper-parameters); the form is not verified.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(math.pi / 2)
        >>> _ = parametrize.register_parametrization(layer, "weight", WeightCompander(2.0, 3.0))
        >>> weight, free = layer.weight.item(), layer.parametrizations.weight.original.item()
        >>> round(weight, 4), round(free, 4)  # the weight is kept: v = 3 tan(pi / 4)
        (1.5708, 3.0)
    """

    log_a: Tensor
    log_b: Tensor

    def __init__(
        self,
        a: float,
        b: float,
        learnable: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive(a=a, b=b)
        for name, value in (("log_a", a), ("log_b", b)):
            log = torch.tensor(math.log(value), device=device, dtype=dtype)
            if learnable:
                self.register_parameter(name, nn.Parameter(log))
            else:
                self.register_buffer(name, log)

    @property
    def a(self) -> Tensor:
        """Scale of the weights, a positive scalar."""
        return self.log_a.exp()

    @property
    def b(self) -> Tensor:
        """Scale of the free parameters, a positive scalar."""
        return self.log_b.exp()

    def extra_repr(self) -> str:
        return f"learnable={isinstance(self.log_a, nn.Parameter)}"

    def forward(self, v: Tensor) -> Tensor:
        """Weights from free parameters ``v`` of any shape."""
        return _psi(v, self.a, self.b)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Free parameters from weights; what exceeds ``1.5 a`` in size is first cut to that."""
        a = self.a
        return _psi_inverse(w.clamp(-CLAMP * a, CLAMP * a), a, self.b)


def apply_weight_compander(module: M, scale: float = SCALE, learnable: bool = False) -> M:
    r"""Train the weight of every linear and convolutional layer through a compander.

    Each layer gets its own scalars :math:`a = b = \kappa \cdot \mathrm{std}(w_0)`, so the slope at
    zero is one, and :math:`v_0 = \Psi^{-1}(w_0)`, so the layer computes what it did before as long
    as no initial weight exceeds :math:`1.5 a`; PyTorch's uniform initialization reaches
    :math:`\sqrt 3 \, \mathrm{std}(w_0)`, which fits from :math:`\kappa = 1.16` on.

    Args:
        module: changed in place: ``weight`` of each ``Linear``, ``Conv1d`` and ``Conv2d`` in it
            becomes a function of ``parametrizations.weight.original``. Biases and the parameters of
            normalization layers stay as they are. Make the optimizer afterward.
        scale: :math:`\kappa`, positive: the smaller, the tighter the bound.
        learnable: whether the scalars are parameters to train.

    Returns:
        The same module.

    Raises:
        ValueError: ``scale`` is not positive, the module has no such layer, one of them has
            a compander already, or its weights are all equal.

    Source: the abstract (each weight is reparameterized); scales and start are our choice.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[-1.0, 1.0]]))
        >>> layer = apply_weight_compander(layer, scale=2.0)
        >>> round(layer.parametrizations.weight[0].a.item(), 4)  # twice the standard deviation
        2.0
    """
    _check_positive(scale=scale)
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    if not layers:
        raise ValueError("module must contain a Linear, Conv1d or Conv2d layer")
    for layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"module must not have parametrized weights yet, got {layer}")
        weight = layer.weight
        spread = float(weight.detach().std(correction=0))
        if not spread > 0.0:
            raise ValueError(f"module must have weights that differ, those of {layer} are equal")
        compander = WeightCompander(
            scale * spread, scale * spread, learnable, device=weight.device, dtype=weight.dtype
        )
        parametrize.register_parametrization(layer, "weight", compander)
    return module
