r"""A generative imputation and a classifier of time series, trained together.

S. Kim, H. Kim, E. Yun, H. Lee, J. Lee, J. Lee, "Probabilistic Imputation for Time-series
Classification with Missing Data", ICML 2023, arXiv:2308.06738.

Claim: a deep generative model that fills gaps, trained jointly with a classifier by one
importance-weighted bound, classifies better and better calibrated than filling gaps by rule,
provided that observations are dropped in training. Without that the classifier can ignore what is
generated.

.. math::

    \mathcal L = E\Bigl[\log \frac1K \sum_k
        \frac{p(y|x_k)\, p(s|x_k)\, p(x^o|z_k)\, p(z_k)}{q(z_k|x^o)}\Bigr]

Glossary: :math:`x` series of ``steps`` and ``features``; :math:`s` its mask, True where observed;
:math:`x^o` the observed entries; :math:`z_k` latent series, :math:`x_k` series completed from it,
:math:`K` of them (``samples``); :math:`\beta` rate of the observation dropout.

Departures from the paper: gated recurrent units in the place of causal transformers, and a decoder
that works step by step; one completed series for each latent one (J = 1); before the first
observation of a channel the generated value stands alone. Networks can be trained side by side
(``copies``), each as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.data.series import batches_by_seed, check_repeated, rows_by_seed, valid_steps
from wellposed.nets.sequence import StackedGRU, StackedLinear
from wellposed.ops import confidence
from wellposed.ops.imputation import (
    cauchy_kernel,
    check_series,
    decay_impute,
    effective_sample_size,
    last_observed,
    observation_dropout,
    predictive_log_prob,
    supervised_bound,
)
from wellposed.train import StackedAdam

__all__ = [
    "SupNotMIWAE",
    "cauchy_kernel",
    "decay_impute",
    "effective_sample_size",
    "expected_calibration_error",
    "last_observed",
    "observation_dropout",
    "predict_with",
    "predictive_log_prob",
    "supervised_bound",
    "train_generators",
    "train_joint",
]

LATENT_FLOOR = 1e-4  # least standard deviation of the encoder (authors' code)
DATA_FLOOR = 1e-3  # least standard deviation of the decoder (authors' code)
DECAY_BIAS = 0.05  # first bias of the decay; its first weight is 0 (authors' code)
LOG_2PI = math.log(2 * math.pi)


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 10) -> float:
    r"""Mean distance of confidence and accuracy, over equal bins of the top probability.

    .. math:: \sum_b \frac{n_b}{n} \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert

    Args:
        probs: shape ``(n, classes)``, in [0, 1].
        labels: int64, shape ``(n,)``.
        bins: number of bins (lo, hi], at least 1.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: wrong shapes, no example, or ``bins`` below 1.

    Source: the paper's metric; Guo et al. 2017.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> round(expected_calibration_error(probs, torch.tensor([0, 1])), 4)
        0.25
    """
    return confidence.expected_calibration_error(probs, labels, bins)


def _normal(value: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * (((value - mean) / scale).square() + LOG_2PI) - scale.log()


def _floored(raw: Tensor, floor: float) -> Tensor:
    return floor + (1 - floor) * F.softplus(raw)


class SupNotMIWAE(nn.Module):
    r"""Encoder, decoder, missing model and classifier, trained by one bound.

    Series of a batch have shape ``(n, steps, features)``, or ``(copies, n, steps, features)`` with
    a slice for each network; outputs then carry that axis before ``n``, as with ``copies > 1``.

    Args:
        features: channels of the series.
        classes: at least 2.
        latent: dimension of :math:`z` at each step.
        hidden: units of each network.
        copies: networks side by side.
        gp_prior: Gaussian process prior over the steps instead of independent normals.
        length_scale: of that prior, in steps.

    Raises:
        ValueError: a size out of range, or series of another shape.

    Source: Section 3; sizes and floors from the authors' code.

    Example:
        >>> model = SupNotMIWAE(2, 3)
        >>> x, mask = torch.zeros(4, 5, 2), torch.ones(4, 5, 2, dtype=torch.bool)
        >>> model(x, mask, torch.full((4,), 5)).exp().sum(-1).allclose(torch.ones(4))
        True
    """

    prior_factor: Tensor

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        latent: int = 8,
        hidden: int = 24,
        copies: int = 1,
        gp_prior: bool = False,
        length_scale: float = 7.0,
    ) -> None:
        super().__init__()
        if features < 1 or classes < 2:
            raise ValueError(f"need features >= 1 and classes >= 2, got {features}, {classes}")
        self.features, self.copies, self.gp_prior = features, copies, gp_prior
        self.length_scale = length_scale
        self.encoder = StackedGRU(copies, features, hidden)
        self.to_latent = StackedLinear(copies, hidden, 2 * latent)
        self.decoder = StackedLinear(copies, latent, hidden)
        self.to_data = StackedLinear(copies, hidden, 2 * features)
        self.missing = StackedLinear(copies, features, hidden)
        self.to_mask = StackedLinear(copies, hidden, features)
        self.classifier = StackedGRU(copies, features, hidden)
        self.to_class = StackedLinear(copies, hidden, classes)
        self.decay_weight = nn.Parameter(torch.zeros(copies, 1, 1, 1, features))
        self.decay_bias = nn.Parameter(torch.full((copies, 1, 1, 1, features), DECAY_BIAS))

    def _batch(self, x: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs as (copies, n, steps, features) and valid steps (copies or 1, n, steps)."""
        check_series(x, mask)
        if x.ndim == 3:
            x, mask = (v.expand(self.copies, *v.shape) for v in (x, mask))
        if x.ndim != 4 or x.shape[0] != self.copies or x.shape[-1] != self.features:
            raise ValueError(
                f"x must be ([{self.copies},] n, steps, {self.features}), got {tuple(x.shape)}"
            )
        if lengths.shape not in (x.shape[1:2], x.shape[:2]):
            raise ValueError(f"lengths must hold {x.shape[1]} numbers, got {tuple(lengths.shape)}")
        valid = valid_steps(lengths if lengths.ndim == 2 else lengths[None], x.shape[2])
        mask = mask & valid.unsqueeze(-1)
        return torch.where(mask, x, 0), mask, valid

    def _generate(
        self,
        x: Tensor,
        mask: Tensor,
        valid: Tensor,
        samples: int,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Generated values (copies, K, n, steps, features), and log p(x|z), p(z), q(z|x)."""
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        mean, raw = self.to_latent(self.encoder(x)).unsqueeze(1).chunk(2, -1)
        scale = _floored(raw, LATENT_FLOOR)
        shape = (self.copies, samples, *mean.shape[2:])
        noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        z = mean + scale * noise
        inside = valid[:, None, :, :, None]
        if self.gp_prior:  # the process covers padded steps, so the encoder's part does too
            log_pz = self._process(z)
            log_qz = _normal(z, mean, scale).sum((-2, -1))
        else:
            log_pz = torch.where(inside, -0.5 * (z.square() + LOG_2PI), 0).sum((-2, -1))
            log_qz = torch.where(inside, _normal(z, mean, scale), 0).sum((-2, -1))
        center, spread = self.to_data(F.relu(self.decoder(z))).chunk(2, -1)
        spread = _floored(spread, DATA_FLOOR)
        seen = mask.unsqueeze(1)
        log_px = torch.where(seen, _normal(x.unsqueeze(1), center, spread), 0).sum((-2, -1))
        noise = torch.randn(center.shape, generator=generator, device=x.device, dtype=x.dtype)
        return center + spread * noise, log_px, log_pz, log_qz

    def _process(self, z: Tensor) -> Tensor:
        """Log-density of latent series under the Gaussian process, shape (copies, K, n)."""
        steps = z.shape[-2]
        factor = torch.linalg.cholesky(cauchy_kernel(steps, self.length_scale).to(z))
        white = torch.linalg.solve_triangular(factor, z, upper=False)
        log_det = factor.diagonal().log().sum() * z.shape[-1]
        density: Tensor = -0.5 * (white.square() + LOG_2PI).sum((-2, -1)) - log_det
        return density

    def complete(self, x: Tensor, mask: Tensor, generated: Tensor, lengths: Tensor) -> Tensor:
        """Fill gaps with other values, ``(K, ..., n, steps, features)``, by the decay rule."""
        axes = x.ndim
        x, mask, _ = self._batch(x, mask, lengths)
        inward = generated.transpose(0, 1) if generated.ndim == 5 else generated.unsqueeze(0)
        return self._outward(self._complete(x, inward, mask.unsqueeze(1).expand_as(inward)), axes)

    def generated_weight(self) -> Tensor:
        r"""Mean :math:`1 - \gamma` one step after an observation, shape ``(copies,)``."""
        gamma = torch.exp(-F.relu(self.decay_weight + self.decay_bias))
        return (1 - gamma).detach().flatten(1).mean(1)

    def _complete(self, x: Tensor, generated: Tensor, kept: Tensor) -> Tensor:
        times = torch.arange(x.shape[-2], device=x.device)
        series = x.unsqueeze(1).expand_as(generated)
        return decay_impute(series, generated, kept, times, self.decay_weight, self.decay_bias)

    def classify(self, completed: Tensor, lengths: Tensor) -> Tensor:
        """Log-probabilities of the classes of series without gaps.

        Shape ``(copies, ..., n, steps, features)`` to ``(copies, ..., n, classes)``.
        """
        shape = completed.shape
        valid = valid_steps(lengths, shape[-2])
        if lengths.ndim == 2:
            valid = valid.view(shape[0], *[1] * (completed.ndim - 4), *valid.shape[1:])
        states = self.classifier(completed.reshape(shape[0], -1, *shape[-2:]))
        share = (valid / valid.sum(-1, keepdim=True)).to(completed.dtype)
        pooled = (states.reshape(*shape[:-1], -1) * share.unsqueeze(-1)).sum(-2)
        log_probs: Tensor = self.to_class(pooled).log_softmax(-1)
        return log_probs

    def _outward(self, term: Tensor, axes: int) -> Tensor:
        """(copies, K, n, ...) as (K, [copies,] n, ...), for inputs of so many axes."""
        return term.transpose(0, 1) if self.copies > 1 or axes == 4 else term.squeeze(0)

    def log_terms(
        self,
        x: Tensor,
        mask: Tensor,
        lengths: Tensor,
        *,
        samples: int = 20,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Class log-probabilities ``(K, ..., n, classes)`` and log p(x|z), p(z), q(z|x)."""
        axes = x.ndim
        x, mask, valid = self._batch(x, mask, lengths)
        generated, *terms = self._generate(x, mask, valid, samples, generator)
        completed = self._complete(x, generated, mask.unsqueeze(1).expand_as(generated))
        terms = [self.classify(completed, lengths), *terms]
        log_py, log_px, log_pz, log_qz = (self._outward(term, axes) for term in terms)
        return log_py, log_px, log_pz, log_qz

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        lengths: Tensor,
        *,
        samples: int = 20,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predictive log-probabilities ``(..., n, classes)``; nothing is dropped."""
        terms = self.log_terms(x, mask, lengths, samples=samples, generator=generator)
        return predictive_log_prob(*terms)

    def impute(
        self,
        x: Tensor,
        mask: Tensor,
        lengths: Tensor,
        *,
        samples: int = 20,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Completed series ``(K, ..., n, steps, features)``, as the classifier reads them."""
        axes = x.ndim
        x, mask, valid = self._batch(x, mask, lengths)
        generated = self._generate(x, mask, valid, samples, generator)[0]
        completed = self._complete(x, generated, mask.unsqueeze(1).expand_as(generated))
        return self._outward(completed, axes)

    def generate(
        self,
        x: Tensor,
        mask: Tensor,
        lengths: Tensor,
        *,
        samples: int = 20,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What the decoder alone proposes for every entry, ``(K, ..., n, steps, features)``."""
        axes = x.ndim
        x, mask, valid = self._batch(x, mask, lengths)
        return self._outward(self._generate(x, mask, valid, samples, generator)[0], axes)

    def loss(
        self,
        x: Tensor,
        mask: Tensor,
        lengths: Tensor,
        y: Tensor,
        *,
        dropout: float | Tensor = 0.4,
        samples: int = 3,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Negative bound, mean over series and sum over the networks.

        Args:
            x, mask, lengths: as in the class.
            y: int64 labels, shape ``(n,)`` or ``(copies, n)``.
            dropout: rate of the observation dropout, or one for each network.
            samples: latent series :math:`K` for each series.
            generator: source of all draws, on the device of ``x``.
        """
        x, mask, valid = self._batch(x, mask, lengths)
        generated, log_px, log_pz, log_qz = self._generate(x, mask, valid, samples, generator)
        seen = mask.unsqueeze(1).expand_as(generated)
        rate = dropout.view(-1, 1, 1) if isinstance(dropout, Tensor) else dropout
        kept, log_pm = observation_dropout(seen, rate, generator)
        completed = self._complete(x, generated, kept)
        log_py = self.classify(completed, lengths)
        target = y.expand(self.copies, -1)[:, None, :, None].expand(*log_py.shape[:-1], 1)
        logits = self.to_mask(torch.tanh(self.missing(completed)))
        log_ps = F.logsigmoid(torch.where(kept, logits, -logits))
        log_ps = torch.where(valid[:, None, :, :, None], log_ps, 0).sum((-2, -1))
        terms = (log_py.gather(-1, target).squeeze(-1), log_px, log_pz, log_qz, log_ps)
        out = [term.transpose(0, 1) for term in (*terms, log_pm.to(log_px.dtype))]
        return self.copies * supervised_bound(*out)

    def generator_loss(
        self,
        x: Tensor,
        mask: Tensor,
        lengths: Tensor,
        *,
        samples: int = 3,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The bound without labels: encoder and decoder alone, for imputation in two stages."""
        x, mask, valid = self._batch(x, mask, lengths)
        _, *terms = self._generate(x, mask, valid, samples, generator)
        log_px, log_pz, log_qz = (term.transpose(0, 1) for term in terms)
        return self.copies * supervised_bound(torch.zeros_like(log_px), log_px, log_pz, log_qz)


# --- training, networks side by side ---------------------------------------------------------


def predict_with(
    model: SupNotMIWAE, x: Tensor, mask: Tensor, lengths: Tensor, generated: Tensor
) -> Tensor:
    """Predictions of the joint model when other values stand in for what it generates.

    Args:
        model: the joint model.
        x, mask, lengths: as in the class, with ``copies`` as first axis.
        generated: values for every entry, shape ``(K, copies, n, steps, features)``.

    Returns:
        Log of the mean class probabilities over K, shape ``(copies, n, classes)``.

    Raises:
        ValueError: shapes that do not fit.

    Source: not in the paper; a test of whether the classifier reads what is generated.

    Example:
        >>> model = SupNotMIWAE(2, 3, copies=2)
        >>> x, mask = torch.zeros(2, 4, 5, 2), torch.zeros(2, 4, 5, 2, dtype=torch.bool)
        >>> predict_with(model, x, mask, torch.full((4,), 5), x[None]).shape
        torch.Size([2, 4, 3])
    """
    if x.ndim != 4 or generated.shape[1:] != x.shape:
        raise ValueError(
            f"x must be (copies, n, steps, features) and generated (K, *that), got "
            f"{tuple(x.shape)} and {tuple(generated.shape)}"
        )
    completed = model.complete(x, mask, generated, lengths).transpose(0, 1)
    log_py = model.classify(completed, lengths)
    return log_py.logsumexp(1) - math.log(len(generated))


def train_joint(
    model: SupNotMIWAE,
    x: Tensor,
    mask: Tensor,
    lengths: Tensor,
    y: Tensor,
    *,
    rates: Sequence[float],
    epochs: int,
    generator: torch.Generator,
    batch: int = 54,
    lr: float = 5e-3,
    samples: int = 3,
) -> None:
    """Fit the joint model; its copies are ordered by dropout rate, then by seed.

    Args:
        model: with ``len(rates) * seeds`` copies; changed in place.
        x, mask: training series and bool masks, shape ``(seeds, n, steps, features)``.
        lengths, y: int64, shape ``(n,)``.
        rates: rates of the observation dropout.
        epochs: passes over the data.
        generator: source of all draws, on the device of ``x``.
        batch: series in a batch.
        lr: rate of Adam.
        samples: latent series for each series.

    Raises:
        ValueError: shapes that do not fit.

    Source: authors' code; sizes are ours.

    Example:
        >>> model, g = SupNotMIWAE(2, 2), torch.Generator().manual_seed(0)
        >>> x, mask = torch.zeros(1, 3, 4, 2), torch.ones(1, 3, 4, 2, dtype=torch.bool)
        >>> train_joint(model, x, mask, torch.full((3,), 4), torch.tensor([0, 1, 0]),
        ...             rates=[0.4], epochs=1, generator=g)
    """
    check_repeated(x, mask, lengths)
    arms, seeds = len(rates), len(x)
    if model.copies != arms * seeds:
        raise ValueError(f"model must have {arms * seeds} copies, got {model.copies}")
    dropout = torch.tensor(list(rates), dtype=x.dtype, device=x.device).repeat_interleave(seeds)
    adam = StackedAdam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for index in batches_by_seed(len(y), batch, seeds, generator):
            own, seen = (rows_by_seed(v, index).repeat(arms, 1, 1, 1) for v in (x, mask))
            rows = index.repeat(arms, 1)
            model.loss(
                own,
                seen,
                lengths[rows],
                y[rows],
                dropout=dropout,
                samples=samples,
                generator=generator,
            ).backward()
            adam.step()


def train_generators(
    model: SupNotMIWAE,
    x: Tensor,
    mask: Tensor,
    lengths: Tensor,
    *,
    epochs: int,
    generator: torch.Generator,
    batch: int = 54,
    lr: float = 5e-3,
    samples: int = 3,
) -> None:
    """Fit encoder and decoder without labels, the first of two stages; a copy for each seed.

    Args:
        model: with as many copies as ``x`` has seeds; changed in place.
        x, mask, lengths, epochs, generator, batch, lr, samples: as in :func:`train_joint`.

    Raises:
        ValueError: shapes that do not fit.

    Source: the two-stage rival; its bound is the importance-weighted one of MIWAE.

    Example:
        >>> model, g = SupNotMIWAE(2, 2), torch.Generator().manual_seed(0)
        >>> x, mask = torch.zeros(1, 3, 4, 2), torch.ones(1, 3, 4, 2, dtype=torch.bool)
        >>> train_generators(model, x, mask, torch.full((3,), 4), epochs=1, generator=g)
    """
    check_repeated(x, mask, lengths)
    if model.copies != len(x):
        raise ValueError(f"model must have {len(x)} copies, got {model.copies}")
    adam = StackedAdam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for index in batches_by_seed(len(lengths), batch, len(x), generator):
            own, seen = (rows_by_seed(v, index) for v in (x, mask))
            model.generator_loss(
                own, seen, lengths[index], samples=samples, generator=generator
            ).backward()
            adam.step()
