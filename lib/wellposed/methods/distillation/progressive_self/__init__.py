r"""Progressive self-knowledge distillation (PS-KD): soften labels with one's own past predictions.

K. Kim, B. Ji, D. Yoon, S. Hwang, "Self-Knowledge Distillation with Progressive Refinement of
Targets", ICCV 2021, arXiv:2006.12000.

Claim: mixing each one-hot label with what the network itself predicted for that example one epoch
earlier, with a weight that grows during training, gives fewer errors, better calibrated confidence
and a better ranking of right above wrong predictions. The target of example :math:`i` in epoch
:math:`t = 1, \dots, T` is

.. math::

    \tilde y_i^{(t)} = (1 - \alpha_t)\, y_i + \alpha_t\, P_i^{(t-1)}, \qquad
    \alpha_t = \alpha_T \, t / T ,

and the loss is the cross-entropy of the prediction :math:`P_i^{(t)}` to that target. For the true
class :math:`g`, the gradient in the logits :math:`z` is a rescaled one,

.. math::

    \frac{\|\partial_z L_{PS}\|_1}{\|\partial_z L_{CE}\|_1}
    = 1 - \alpha_t \, \frac{1 - P^{(t-1)}_g}{1 - P^{(t)}_g} ,

as long as no probability fell below :math:`\alpha_t` times its past value (the true class's is
replaced by its complement).

Departures from the paper: none in the targets and the loss. The schedule can be exchanged (for an
ablation). The training loop is for small stacks of networks trained side by side.
"""

from __future__ import annotations

from wellposed.methods.distillation.progressive_self.loss import (
    PSKDLoss,
    constant_alpha,
    progressive_alpha,
    soft_targets,
)
from wellposed.methods.distillation.progressive_self.rescaling import (
    gradient_ratio,
    rescaling_applies,
)
from wellposed.methods.distillation.progressive_self.task import ImageTask, noisy_images
from wellposed.methods.distillation.progressive_self.training import SideBySide, train_side_by_side
from wellposed.ops.confidence import aurc, eaurc, expected_calibration_error
from wellposed.ops.hard_examples import hard_share

__all__ = [
    "ImageTask",
    "PSKDLoss",
    "SideBySide",
    "aurc",
    "constant_alpha",
    "eaurc",
    "expected_calibration_error",
    "gradient_ratio",
    "hard_share",
    "noisy_images",
    "progressive_alpha",
    "rescaling_applies",
    "soft_targets",
    "train_side_by_side",
]
