"""Denoising losses for every prediction kind, and their weightings.

A weighting is a function (process, t, predict) -> (batch,) that multiplies the event-mean squared error of the
predicted kind. With e the error of x_0, the error of the kind (a, b) is -(det/sigma) e, det = alpha b - sigma a; each
weighting below but `unit` is defined once, as lambda(t) |e|^2, and divided by (det/sigma)^2, so it is the same loss for
every kind.

Weightings raise ValueError for an unknown kind and TypeError for times that are not real.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff._array import (
    as_floating,
    batch_time,
    call,
    check_array,
    check_integers,
    check_like,
    check_per_example,
    check_positive,
    expand,
    mean_event,
    normal_like,
    per_example_keys,
    widened,
)
from jdiff._typing import Array, Field, Key, Kind, Process
from jdiff.predictions import check_kind, coefficients
from jdiff.processes import perturb, rates

__all__ = [
    "Weighting",
    "classification",
    "denoising",
    "edm",
    "label_log_prob",
    "likelihood",
    "min_snr",
    "sigma2",
    "snr",
    "unit",
]

Weighting = Callable[[Process, Array, Kind], Array]


def unit(process: Process, t: Array, predict: Kind) -> Array:
    """Return 1: the plain squared error of the predicted kind (flow matching for velocity, DDPM for eps)."""
    check_kind(predict)
    return jnp.ones_like(as_floating(t))


def snr(process: Process, t: Array, predict: Kind) -> Array:
    """Return the weight of SNR |x_0 error|^2 = |eps error|^2: alpha^2 / det^2, also where alpha = 0.

    Ho et al. 2020 (arXiv 2006.11239), eq. 14, for any predicted kind.
    """
    alpha, _, det = _terms(process, t, predict, limit=True)
    return (alpha / det) ** 2


sigma2 = snr
"""sigma^2 |score error|^2 (Song et al. 2021, arXiv 2011.13456, section 3.3), which is the eps error of `snr`."""


def likelihood(process: Process, t: Array, predict: Kind) -> Array:
    """Return the weight of g^2 |score error|^2, whose time integral bounds the KL divergence from the data.

    Song et al. 2021 (arXiv 2101.09258), theorem 1. For eps it is g^2/sigma^2; finite for x0, v and velocity where alpha
    = 0.
    """
    alpha, sigma, dalpha, dsigma = rates(process, t)
    _, _, det = _terms(process, t, predict)
    return 2 * alpha * (alpha * dsigma - sigma * dalpha) / (sigma * det**2)


def min_snr(gamma: float = 5.0) -> Weighting:
    """Return the weighting min(SNR, gamma) |x_0 error|^2 (Hang et al. 2023, arXiv 2303.09556, eq. 8).

    Raises:
      ValueError: gamma not positive (infinite ones do not cut).
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")

    def weight(process, t, predict):
        alpha, sigma, det = _terms(process, t, predict, limit=True)
        return jnp.minimum(alpha**2, gamma * sigma**2) / det**2

    return weight


def edm(sigma_data: float = 0.5) -> Weighting:
    """Return the weighting (s^2 + d^2) / (s d)^2 |x_0 error|^2 with s = sigma/alpha, d = sigma_data.

    Karras et al. 2022 (arXiv 2206.00364), table 1.

    Raises:
      ValueError: sigma_data <= 0.
    """
    check_positive(sigma_data, "sigma_data")

    def weight(process, t, predict):
        alpha, sigma, det = _terms(process, t, predict)
        return (sigma**2 + (alpha * sigma_data) ** 2) / (sigma_data * det) ** 2

    return weight


def denoising(
    keys: Key | None,
    field: Field,
    process: Process,
    x0: Array,
    t: Array,
    *,
    predict: Kind,
    weight: Weighting = unit,
    eps: Array | None = None,
) -> Array:
    """Return weight(t) mean_event |field(x_t, t) - target|^2 for each example, x_t = alpha x_0 + sigma eps.

    Denoising score matching (Vincent 2011; Song et al. 2021, arXiv 2011.13456, eq. 7), noise or data prediction, v
    prediction and flow matching are the five values of `predict`. The caller draws t (see `jdiff.times`), averages and
    masks.

    Args:
      keys: one key per example, shape (batch,), or one key; eps_i is drawn from key i alone. Not used where eps is
        given.
      field: (x, t) -> prediction.
      process: the forward process.
      x0: data in model space, shape (batch, *event).
      t: times, scalar or (batch,).
      predict: kind of the field.
      weight: the weighting.
      eps: the noise of each example, shape of x0, instead of one drawn from its key: pairs chosen by `jdiff.coupling`,
        or made by a flow (Liu et al. 2022, arXiv 2209.03003).

    Returns:
      Losses, shape (batch,).

    Raises:
      ValueError: unknown kind, shapes that disagree.
      TypeError: x0 not floating point, keys not typed threefry keys.
    """
    check_kind(predict)
    batch = check_array(x0, "x0")
    t = batch_time(t, x0)
    if eps is None:
        eps = normal_like(per_example_keys(keys, batch), x0)
    else:
        check_like(eps, x0, "eps", "x0")
    a, b = coefficients(process, t, predict)
    target = expand(a, x0) * x0 + expand(b, x0) * eps
    out = call(field, perturb(process, x0, eps, t), t)
    weights = check_per_example(weight(process, t, predict), batch, "weight")
    return weights * mean_event(widened(out - target) ** 2).astype(t.dtype)


def classification(
    keys: Key,
    logits: Callable[[Array, Array], Array],
    process: Process,
    x0: Array,
    t: Array,
    label: Array,
) -> tuple[Array, Array]:
    """Return (-log p(label | x_t), whether label is the likeliest) for each example, x_t = alpha x_0 + sigma eps.

    What trains a classifier for guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4; Song et al. 2021, arXiv
    2011.13456, appendix I.1). Noise is drawn as in `denoising`.

    Args:
      keys: one key per example, shape (batch,), or one key; eps_i is drawn from key i alone.
      logits: (x, t) -> (batch, classes), log p(y | x_t = x) up to a constant.
      process: the forward process.
      x0: data in model space, shape (batch, *event).
      t: times, scalar or (batch,).
      label: integers (batch,), in [0, classes); others give NaN.

    Returns:
      Cross entropies in nats, in at least float32, and 1 where the label has the largest logit, else 0; both (batch,).

    Raises:
      ValueError: shapes that disagree.
      TypeError: x0 not floating point, labels not integer, keys not typed threefry keys.
    """
    batch = check_array(x0, "x0")
    t = batch_time(t, x0)
    _check_label(label, batch)
    x = perturb(process, x0, normal_like(per_example_keys(keys, batch), x0), t)
    out = logits(x, t.astype(x.dtype))
    if getattr(out, "ndim", 0) != 2 or out.shape[0] != batch:
        got = getattr(out, "shape", type(out).__name__)
        raise ValueError(f"logits must have shape ({batch}, classes), got {got}")
    chosen = label_log_prob(out, label)
    best = jnp.argmax(out, axis=1)
    return -chosen, (best == label.astype(best.dtype)).astype(chosen.dtype)


def label_log_prob(logits: Array, label: Array) -> Array:
    """Return log softmax(logits)[label] of each example, (batch,), in at least float32; NaN for labels out of range.

    Args:
      logits: (batch, classes).
      label: integers (batch,).

    Raises:
      ValueError: shapes that disagree.
      TypeError: logits not floating point, labels not integer.
    """
    batch = check_array(logits, "logits")
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (batch, classes), got {logits.shape}")
    _check_label(label, batch)
    table = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    inside = jnp.where(label < 0, table.shape[1], label)  # a negative index would count from the end
    return jnp.take_along_axis(table, inside[:, None], axis=1, mode="fill")[:, 0]


def _check_label(label, batch):
    check_integers(label, "label")
    if label.shape != (batch,):
        raise ValueError(f"label must have shape ({batch},), one per example, got {label.shape}")


def _terms(process, t, predict, *, limit=False):
    """Return alpha, sigma and det; with limit a tiny alpha for 0 where det = alpha b (eps and score)."""
    t = as_floating(t)
    alpha, sigma = process.marginal(t)
    if limit and predict in ("eps", "score"):
        alpha = jnp.where(alpha == 0, 2.0**-30, alpha)  # derivatives divide by its fourth power
    a, b = coefficients(process, t, predict)
    return alpha, sigma, alpha * b - sigma * a
