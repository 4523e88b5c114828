"""Fields for data on a grid of levels: the network says how likely each level is, the integral over its cell is exact.

Dequantised images are not smooth: an entry of level k is uniform on a cell of width w = (high - low)/L. Given x_t, with
u = (alpha x_0 - x_t)/sigma, the posterior of x_0 is a mixture over cells of truncated normals,

    q_k ~ prior_k exp(logits_k) (Phi(b_k) - Phi(a_k)),    u | k ~ N(0, 1) cut to [a_k, b_k], the cell's ends in u,

so that E[eps] = -sum_k q_k E[u | k] and E[x_0] = sum_k q_k E[x_0 | k]. With logits = 0 this is the exact posterior of
independent entries with those priors: the network learns what the histogram of each pixel does not know. Discrete
targets for a continuous diffusion: Dieleman et al. 2022 (arXiv 2211.15089), section 3; the cells are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from jdiff._array import batch_time, check_array, expand
from jdiff._typing import Array, Field, Kind, Process
from jdiff.predictions import check_kind, coefficients

__all__ = ["level_field"]

# Below this width in units of sigma the normal cdf's differences lose digits, and a series in the width takes over.
_NARROW = 0.05


def level_field(
    process: Process,
    net: Callable[[Array, Array], Array],
    log_prior: Array,
    *,
    low: float = -1.0,
    high: float = 1.0,
    predict: Kind = "x0",
) -> Field:
    """Return the field of a network that predicts the level of every entry.

    Args:
      process: the forward process.
      net: (features, t) -> logits. Features, (batch, *event[:-1], 2 channels), are x_t standardised by the prior's
        mean and variance, and E[x_0 | x_t] under the prior alone, likewise; logits have shape
        (batch, *event[:-1], channels L).
      log_prior: log-probabilities of the levels, (*event, L), for example from the histogram of each pixel.
      low: lower end of level 0 in model space.
      high: upper end of level L - 1 in model space.
      predict: kind of the field returned.

    Raises:
      ValueError: unknown kind, low >= high, or a prior that does not fit x.
    """
    check_kind(predict)
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    levels = log_prior.shape[-1]
    width = (high - low) / levels

    def field(x, t):
        check_array(x)
        if log_prior.shape[:-1] != x.shape[1:]:
            want = (*x.shape[1:], levels)
            raise ValueError(f"log_prior must have shape {want}, event and levels, got {log_prior.shape}")
        t = batch_time(t, x)
        edges = jnp.linspace(low, high, levels + 1, dtype=x.dtype)
        centers = edges[:-1] + 0.5 * jnp.asarray(width, x.dtype)
        alpha, sigma = (expand(c, x) for c in process.marginal(t))
        cells = _cells(alpha[..., None], sigma[..., None], x[..., None], edges, width)
        prior = log_prior.astype(x.dtype)[None]
        probability = jax.nn.softmax(prior, axis=-1)
        mean = jnp.sum(probability * _row(centers, prior), axis=-1)
        variance = jnp.sum(probability * (_row(centers, prior) - mean[..., None]) ** 2, axis=-1) + width**2 / 12

        def posterior(logits):
            q = jax.nn.softmax(prior + cells.log_mass + logits, axis=-1)
            x0 = jnp.sum(q * (_row(centers, q) + width * cells.offset), axis=-1)
            return x0, -jnp.sum(q * cells.mean, axis=-1)

        guess, _ = posterior(jnp.zeros((), x.dtype))
        features = jnp.concatenate(
            [
                (x - alpha * mean) / jnp.sqrt(alpha**2 * variance + sigma**2),
                (guess - mean) / jnp.sqrt(variance),
            ],
            axis=-1,
        )
        logits = net(features, t.astype(x.dtype))
        if logits.size != x.size * levels:
            raise ValueError(f"the network must return {levels} logits per entry of x {x.shape}, got {logits.shape}")
        x0, eps = posterior(logits.reshape(*x.shape, levels))
        a, b = (expand(c, x) for c in coefficients(process, t, predict))
        return a * x0 + b * eps

    return field


class _Cells(NamedTuple):
    """Per cell, for u ~ N(0, 1): each of shape (batch, *event, L)."""

    log_mass: Array
    """log P(cell) + a constant of the example."""
    mean: Array
    """E[u | cell]."""
    offset: Array
    """(E[u | cell] - center) / width, in (-1/2, 1/2): where in its cell the entry is expected."""


def _cells(alpha, sigma, x, edges, width):
    ends = (alpha * _row(edges, x) - x) / sigma
    h = alpha * width / sigma
    a, b = ends[..., :-1], ends[..., 1:]
    m = 0.5 * (a + b)
    narrow = h < _NARROW

    # The series, up to h^2; the constant log(h / sqrt(2 pi)) of all cells is left out of both branches.
    thin = jnp.where(narrow, h, 0)
    series_mass = -0.5 * m**2 + jnp.log1p(thin**2 * (m**2 - 1) / 24)
    series_offset = -thin * m / 12

    # Differences of the cdf, taken in the lower tail (by symmetry), where they keep their digits.
    thick = jnp.where(narrow, 1, h)
    flip = m > 0
    lo, hi = jnp.where(flip, -b, a), jnp.where(flip, -a, b)
    lo = jnp.where(narrow, hi - 1, lo)
    log_hi = log_ndtr(hi)
    log_mass = log_hi + jnp.log(-jnp.expm1(log_ndtr(lo) - log_hi))
    lower_mean = jnp.exp(-0.5 * lo**2 - _HALF_LOG_2PI - log_mass) - jnp.exp(-0.5 * hi**2 - _HALF_LOG_2PI - log_mass)
    mean = jnp.where(flip, -lower_mean, lower_mean)
    offset = (mean - m) / thick

    offset = jnp.where(narrow, series_offset, offset)
    return _Cells(
        log_mass=jnp.where(narrow, series_mass, log_mass - jnp.log(thick) + _HALF_LOG_2PI),
        mean=jnp.where(narrow, m + h * series_offset, mean),
        offset=offset,
    )


def _row(values, like):
    return values.reshape((1,) * (like.ndim - 1) + values.shape)


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
