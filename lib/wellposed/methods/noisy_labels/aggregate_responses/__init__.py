r"""Learning when only the mean response of each bag of examples is known.

A. Javanmard, L. Chen, V. Mirrokni, A. Badanidiyuru, G. Fu, "Learning from Aggregate responses:
Instance Level versus Bag Level Loss Functions", ICLR 2024, arXiv:2401.11081.

Claim: fitting every prediction to its bag's mean (instance loss) is fitting the bag's mean
prediction to it (bag loss) plus a penalty on the spread of predictions inside a bag,

.. math::

    L_\rho = (1-\rho) L_{bag} + \rho L_{ins} = \frac1m \sum_a (\bar y_a - \bar f_a)^2
        + \frac{\rho}{n} \sum_a \sum_{i \in B_a} (f_i - \bar f_a)^2 ,

so :math:`\rho` trades variance for bias, and for linear models the trade is known exactly.

Glossary: :math:`n` examples in :math:`m` bags of :math:`k` (``bag_size``), contiguous blocks of
rows; :math:`d` features, :math:`\gamma = d/n`; noise variance :math:`\sigma^2` (``noise_var``),
:math:`r^2 = \|\theta_0\|^2` (``signal``).

Departures from the paper: the risk is written as our own derivation gives it, in another form than
the paper's fixed-point system; the Laplace noise has the scale that the sensitivity :math:`2C/k`
of a bag mean asks for; responses are clipped at a fixed bound, where the paper lets the bound grow
slowly with n. Added for comparison: a ridge penalty, leave-one-bag-out errors, sorted bags.
"""

from __future__ import annotations

from wellposed.methods.noisy_labels.aggregate_responses.experiments import (
    BaggedSplits,
    NetworkRun,
    bagged_splits,
    simulate_private_risk,
    simulate_risk,
    train_network,
)
from wellposed.methods.noisy_labels.aggregate_responses.losses import (
    bag_loss,
    bag_means,
    fit_interpolating,
    instance_loss,
    interpolating_loss,
    leave_one_bag_out,
)
from wellposed.methods.noisy_labels.aggregate_responses.risk import (
    RiskResult,
    asymptotic_risk,
    optimal_bag_size,
    private_noise_var,
    privatize_bag_means,
)

__all__ = [
    "BaggedSplits",
    "NetworkRun",
    "RiskResult",
    "asymptotic_risk",
    "bag_loss",
    "bag_means",
    "bagged_splits",
    "fit_interpolating",
    "instance_loss",
    "interpolating_loss",
    "leave_one_bag_out",
    "optimal_bag_size",
    "private_noise_var",
    "privatize_bag_means",
    "simulate_private_risk",
    "simulate_risk",
    "train_network",
]
