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

from wellposed.data.quadrants import compose_quadrants
from wellposed.methods.regularizers.noise_mask.masks import render_mask
from wellposed.methods.regularizers.noise_mask.policy import (
    MaskPolicy,
    blend_concentrations,
    sample_cells,
    update_base,
)
from wellposed.methods.regularizers.noise_mask.training import HeatRun, fit, heat, policy_loss

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
