r"""Random Teachers are Good Teachers.

F. Sarnthein, G. Bachmann, S. Anagnostidis, T. Hofmann, "Random Teachers are Good Teachers",
ICML 2023, arXiv:2302.12091.

Claim: a student trained to copy a *random, frozen* network of its own architecture, without
labels, ends with better features than that teacher; they depend on the data, and the student
behaves like a network early in labeled training. Over the inputs it minimizes

.. math::

    \min_{\theta_S} \; E_x \,
        \mathrm{KL}\bigl(\mathrm{softmax} f_{\theta_T}(x) \,\|\,
        \mathrm{softmax} f_{\theta_S}(x)\bigr),
    \qquad
    \theta_S(\alpha) = \frac{(1 - \alpha)\, \theta_T + \alpha\, \tilde\theta}
                            {\sqrt{(1 - \alpha)^2 + \alpha^2}}

with the teacher :math:`\theta_T` and an independent draw :math:`\tilde\theta`. A network is an
encoder, whose outputs (embeddings) are what counts, and a head that is thrown away afterwards.

Departures from the paper: the KL divergence instead of the cross-entropy (same gradients); the
teacher's outputs are computed once and kept; the linear probe is solved to its minimum on
standardized embeddings instead of trained for some epochs; pruning leaves biases alone.
"""

from __future__ import annotations

from wellposed.methods.distillation.random_teacher.distillation import (
    DistillationRun,
    distill,
    distillation_epochs,
    distillation_loss,
    embed,
    probe_encoders,
    probed_distillation,
)
from wellposed.methods.distillation.random_teacher.landscape import finetune, linear_path
from wellposed.methods.distillation.random_teacher.networks import (
    L2BottleneckHead,
    interpolate_init,
    mlp_encoder,
    vgg_encoder,
)
from wellposed.nets.batchnorm import recalibrate_batchnorm
from wellposed.nets.pruning import magnitude_mask
from wellposed.ops.linear_probe import ProbeTask, linear_probe, linear_probes

__all__ = [
    "DistillationRun",
    "L2BottleneckHead",
    "ProbeTask",
    "distill",
    "distillation_epochs",
    "distillation_loss",
    "embed",
    "finetune",
    "interpolate_init",
    "linear_path",
    "linear_probe",
    "linear_probes",
    "magnitude_mask",
    "mlp_encoder",
    "probe_encoders",
    "probed_distillation",
    "recalibrate_batchnorm",
    "vgg_encoder",
]
