r"""Networks that tune their own regularization while they train.

M. MacKay, P. Vicol, J. Lorraine, D. Duvenaud, R. Grosse, "Self-Tuning Networks: Bilevel
Optimization of Hyperparameters using Structured Best-Response Functions", ICLR 2019,
arXiv:1903.03088.

Claim: the best weights are a function of the hyperparameters :math:`\lambda`. A layer whose units
are gated by :math:`\lambda`,

.. math:: \hat W(\lambda) = W_e + \mathrm{diag}(V\lambda)\,W_h , \qquad
          \hat b(\lambda) = b_e + (C\lambda) \odot b_h ,

learns that function near the current :math:`\lambda` from randomly perturbed copies of it; the
gradient of the validation loss through it then tunes :math:`\lambda` within one run.

Glossary: :math:`H` hyperparameters :math:`\lambda` (``hyper``), unconstrained; perturbations
:math:`\epsilon \sim N(0, \mathrm{diag}\,\sigma^2)` with
:math:`\sigma = \mathrm{softplus}(s)` (``scale``, ``raw_scale``); weight :math:`\tau` of their
entropy (``entropy_weight``). A leading axis of *runs* means networks trained side by side.

Departures from the paper: the learned scalar that the authors' code puts on the elementary output
is left out (it is not in the formula); :func:`self_tune` trains weights by Adam (networks have the
authors' SGD with momentum); the learning rate of weights falls linearly; weight decay is tuned too,
as the exact squared norm of each example's own weights. Added for comparison: plain networks with
fixed or replayed hyperparameters.
"""

from __future__ import annotations

from wellposed.methods.optimization.self_tuning.alternation import (
    SelfTuningResult,
    gaussian_entropy,
    perturb,
    self_tune,
)
from wellposed.methods.optimization.self_tuning.layers import BestResponseConv2d, BestResponseLinear
from wellposed.methods.optimization.self_tuning.networks import (
    TuningRun,
    train_fixed,
    train_self_tuning,
)
from wellposed.methods.optimization.self_tuning.ridge import (
    ridge_best_response,
    ridge_gates,
    ridge_response_jacobian,
)
from wellposed.methods.optimization.self_tuning.task import HIGH, LOW, NAMES, TuningTask, make_task
from wellposed.nets.dropout import dropout
from wellposed.ops.intervals import from_interval, to_interval

__all__ = [
    "HIGH",
    "LOW",
    "NAMES",
    "BestResponseConv2d",
    "BestResponseLinear",
    "SelfTuningResult",
    "TuningRun",
    "TuningTask",
    "dropout",
    "from_interval",
    "gaussian_entropy",
    "make_task",
    "perturb",
    "ridge_best_response",
    "ridge_gates",
    "ridge_response_jacobian",
    "self_tune",
    "to_interval",
    "train_fixed",
    "train_self_tuning",
]
