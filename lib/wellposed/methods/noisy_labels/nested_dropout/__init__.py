r"""Nested dropout: compress the features, so that little room is left for wrong labels.

Y. Chen, S. X. Hu, X. Shen, C. Ai, J. A. K. Suykens, "Compressing Features for Learning with Noisy
Labels", IEEE TNNLS 2022, arXiv:2206.13140 (workshop version: arXiv:2104.13766).

Claim: a network whose features are cut off at a random width :math:`k` in training memorizes far
fewer wrong labels, and puts what matters into its first channels. With features
:math:`h = f(x) \in \mathbb R^D` and a linear classifier :math:`W` without bias,

.. math:: s = W\,(h \odot m_k), \qquad m_k = (\underbrace{1, \dots, 1}_{k}, 0, \dots, 0), \qquad
          P(k) \propto \exp\!\bigl(-((k - \mu)/\eta)^2\bigr), \quad k = 1, \dots, D .

Two such networks then clean the data for each other by co-teaching (stage two).

Departures from the paper: validation labels are noisy here, the paper's are clean. Weights are
those of the last epoch, the authors keep the epoch that is best on validation data. There is no
warm-up of the step size. In co-teaching each network draws its own cut points: with one cut point
an example there is nothing that the two could share.
"""

from __future__ import annotations

from wellposed.methods.noisy_labels.nested_dropout.layer import (
    NestedDropout,
    nested_distribution,
    select_truncation,
    truncate,
)
from wellposed.methods.noisy_labels.nested_dropout.networks import (
    CompressedNetworks,
    fit_regression,
)
from wellposed.methods.noisy_labels.nested_dropout.training import (
    CompressedRun,
    CoTeachingRun,
    co_teach,
    small_loss_indices,
    train_compressed,
)
from wellposed.ops.bias_variance import bias_variance

__all__ = [
    "CoTeachingRun",
    "CompressedNetworks",
    "CompressedRun",
    "NestedDropout",
    "bias_variance",
    "co_teach",
    "fit_regression",
    "nested_distribution",
    "select_truncation",
    "small_loss_indices",
    "train_compressed",
    "truncate",
]
