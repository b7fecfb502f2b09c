r"""Unlearning a feature of a GAN: find its direction in parameter space, then keep away from it.

P. Tiwary, A. Guha, S. Panda, Prathosh A.P., "Adapt then Unlearn: Exploring Parameter Space
Semantics for Unlearning in Generative Adversarial Networks", TMLR 2025, arXiv:2309.14054.

Claim: a generator that was fine-tuned on samples with the undesired feature marks a direction in
parameter space; fine-tuning the original generator on the other samples while being repelled from
there removes the feature and keeps the quality. With parameters :math:`\theta_N^{(r)}` of the
adapted generators,

.. math::

    \min_\theta\ \mathcal L_G(\theta)+w\,\mathcal L_{rep}(\theta),\qquad
    d(\theta)=\frac1R\sum_{r=1}^R\|\theta-\theta_N^{(r)}\|^2,\qquad
    \mathcal L_{rep}\in\{1/d,\ -d,\ e^{-\alpha d}\}.

Departures from the paper: small networks; no path-length regularization and no augmentation; both
stages start from the averaged weights of pretraining with a fresh Adam; distances are measured in
units of the start's, so that weights do not depend on the size of a network; the same images of a
generator serve both steps of one iteration; Fréchet distances are taken in features of a digit
classifier, and the classifier that scores is not the one that labels. Networks are trained side by
side. Added for comparison: points in random directions.
"""

from __future__ import annotations

from wellposed.methods.generative.gan_unlearning.judges import (
    Score,
    fit_classifiers,
    random_anchors,
    sample,
    score,
    with_parameters,
)
from wellposed.methods.generative.gan_unlearning.stages import (
    Repulsion,
    adapt,
    diagonal_fisher,
    ewc_penalty,
    extrapolate,
    parameter_distance,
    percentage_unlearned,
    repulsion_loss,
    unlearn,
)
from wellposed.methods.generative.gan_unlearning.training import (
    GanRun,
    GanSettings,
    discriminator_loss,
    flat,
    generator_loss,
    play,
    r1_penalty,
    train_gan,
)

__all__ = [
    "GanRun",
    "GanSettings",
    "Repulsion",
    "Score",
    "adapt",
    "diagonal_fisher",
    "discriminator_loss",
    "ewc_penalty",
    "extrapolate",
    "fit_classifiers",
    "flat",
    "generator_loss",
    "parameter_distance",
    "percentage_unlearned",
    "play",
    "r1_penalty",
    "random_anchors",
    "repulsion_loss",
    "sample",
    "score",
    "train_gan",
    "unlearn",
    "with_parameters",
]
