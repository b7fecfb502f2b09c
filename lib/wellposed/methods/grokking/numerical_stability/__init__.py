r"""Grokking at the Edge of Numerical Stability.

Prieto, Barsbey, Mediano and Birdal, ICLR 2025, arXiv 2501.04697.

Claim: without regularization a network that has fitted its training set keeps growing its logits
along its own weights, until the softmax rounds to exactly 1 and learning stops. A softmax that
grows more slowly (StableMax), or a gradient without its component along the weights
($\perp$Grad), lets it generalize instead.

Glossary: z logits, y label, s the function that StableMax uses in place of the exponential,
W a weight tensor, g its gradient. The two equations that matter:

    p_i = s(z_i) / sum_j s(z_j),   s(x) = x + 1 for x >= 0,  1 / (1 - x) for x < 0   (StableMax)
    g_perp = g - (<W, g> / <W, W>) W                                                 (perp-Grad)

Departures from the paper:
- The projected gradient is rescaled to the length of the raw gradient, as in the authors' code;
  the paper's equation has no rescaling. `rescale=False` gives the equation.
- A closure given to `OrthoGrad.step` is evaluated before the projection; in the authors' code
  after it, which would leave its gradients unprojected.
- The softmax loss is spelled out, so that it rounds alike on every device; the authors call
  PyTorch's log-softmax.
- The first layer looks its two one-hot columns up instead of multiplying by them: the same
  function and parameters in less time.
- The transformer has no dropout.
"""

from __future__ import annotations

from wellposed.data.modular import modular_dataset
from wellposed.methods.grokking.numerical_stability.losses import (
    StableMaxCrossEntropyLoss,
    log_stablemax,
    softmax_collapse,
    softmax_cross_entropy,
    stable_exp,
    stablemax,
    stablemax_cross_entropy,
)
from wellposed.methods.grokking.numerical_stability.projection import (
    OrthoGrad,
    nlm_alignment,
    orthogonal_gradient,
)
from wellposed.methods.grokking.numerical_stability.training import (
    ADAM_EPS,
    GrokkingRun,
    train_grokking,
)
from wellposed.nets.residues import GrokkingMLP, GrokkingTransformer

__all__ = [
    "ADAM_EPS",
    "GrokkingMLP",
    "GrokkingRun",
    "GrokkingTransformer",
    "OrthoGrad",
    "StableMaxCrossEntropyLoss",
    "log_stablemax",
    "modular_dataset",
    "nlm_alignment",
    "orthogonal_gradient",
    "softmax_collapse",
    "softmax_cross_entropy",
    "stable_exp",
    "stablemax",
    "stablemax_cross_entropy",
    "train_grokking",
]
