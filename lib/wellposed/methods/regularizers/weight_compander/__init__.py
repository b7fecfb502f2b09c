r"""Weight compander: train each weight through a bounded, nonlinear function.

R. Cakaj, J. Mehnert, B. Yang, "Weight Compander: A Simple Weight Reparameterization for
Regularization", IJCNN 2023, arXiv:2306.16993.

Claim: writing each weight as a nonlinear function of a free parameter limits large weights, keeps
weights away from zero, and so reduces overfitting on top of the usual regularizers; the function's
two hyper-parameters can be learned. With the free tensor :math:`v` and scalars :math:`a, b > 0`,

.. math::

    w = \Psi(v) = a \arctan(v / b), \qquad |w| < \tfrac{\pi}{2} a, \qquad
    \Psi'(v) = \frac{a}{b} \, \frac{1}{1 + (v / b)^2} .

A gradient step of size :math:`\eta` on :math:`v` moves the weight by
:math:`-\eta \, \Psi'(v)^2 \, \partial L / \partial w`: weights near zero move freely, large ones
are held back.

Departures from the paper: only its abstract was at hand. The arctan form is how the method is
remembered, not checked; the choice :math:`a = b = \kappa \cdot \mathrm{std}(w_0)` with an
unchanged network at the start, scalars per layer, and weight decay on :math:`v` are ours. The
formula stands in one place, so that another one can replace it.
"""

from __future__ import annotations

from wellposed.methods.regularizers.weight_compander.reparameterization import (
    WeightCompander,
    apply_weight_compander,
    compand,
    compand_inverse,
)
from wellposed.methods.regularizers.weight_compander.splits import Splits, make_splits
from wellposed.methods.regularizers.weight_compander.training import SideBySide, train_side_by_side
from wellposed.ops.weight_statistics import weight_statistics

__all__ = [
    "SideBySide",
    "Splits",
    "WeightCompander",
    "apply_weight_compander",
    "compand",
    "compand_inverse",
    "make_splits",
    "train_side_by_side",
    "weight_statistics",
]
