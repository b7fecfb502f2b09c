r"""To grok or not to grok: generalization and memorization on corrupted algorithmic data.

Doshi, Das, He and Gromov, ICLR 2024, arXiv 2310.13061.

Claim: a network can learn addition modulo p and, at the same time, learn wrong labels by heart.
Different neurons do the two jobs. A neuron that generalizes is a single wave in Fourier space, so
its inverse participation ratio tells it apart; pruning the other neurons removes the memorized
labels. Weight decay and dropout turn all neurons into waves, BatchNorm turns the others down.

    z = W (U e_m + V e_n)^2,   IPR_r(u) = sum_j (|u^_j| / |u^|_2)^(2 r),   u^ = rfft(u)

Departures from the paper:
- Networks of several seeds, weight decays and data sets are trained side by side.
- The transformer is the book's (root-mean-square norms, GELU); the authors' has neither norm nor
  GELU and scales its output for width.
- The phases are told apart by thresholds on two accuracies, ours.
"""

from __future__ import annotations

from wellposed.data.corrupted_modular import CorruptedData, modular_addition_data
from wellposed.methods.grokking.corrupted_data.neurons import (
    neuron_ipr,
    neuron_magnitude,
    prune_neurons,
)
from wellposed.methods.grokking.corrupted_data.phases import (
    PHASES,
    Accuracies,
    History,
    evaluate,
    evaluate_side_by_side,
    training_phase,
    two_stages,
)
from wellposed.methods.grokking.corrupted_data.training import (
    train,
    train_side_by_side,
    train_transformers,
)
from wellposed.nets.quadratic import QuadraticMLP, analytic_mlp
from wellposed.ops.spectrum import inverse_participation_ratio

__all__ = [
    "PHASES",
    "Accuracies",
    "CorruptedData",
    "History",
    "QuadraticMLP",
    "analytic_mlp",
    "evaluate",
    "evaluate_side_by_side",
    "inverse_participation_ratio",
    "modular_addition_data",
    "neuron_ipr",
    "neuron_magnitude",
    "prune_neurons",
    "train",
    "train_side_by_side",
    "train_transformers",
    "training_phase",
    "two_stages",
]
