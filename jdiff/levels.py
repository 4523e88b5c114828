"""Fields for data on a grid of levels: the network says how likely each level is, the integral over its cell is exact.

Dequantised images are not smooth: an entry of level k is uniform on a cell. Given x_t, with
u = (alpha x_0 - x_t)/sigma, the posterior of x_0 is a mixture over cells of truncated normals,

    q_k ~ prior_k exp(logits_k) (Phi(b_k) - Phi(a_k)) / (b_k - a_k),    u | k ~ N(0, 1) cut to [a_k, b_k],

with [a_k, b_k] the cell's ends in u, so that E[eps] = -sum_k q_k E[u | k] and E[x_0] = sum_k q_k E[x_0 | k]. With
logits = 0 this is the exact posterior of independent entries with those priors: the network learns what the histogram
of each pixel does not know. Discrete targets for a continuous diffusion: Dieleman et al. 2022 (arXiv 2211.15089),
section 3; the cells are ours.

A cell may hold several neighbouring levels (`merged_levels`): the model is then uniform inside it, and cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from jdiff._array import batch_time, check_array, check_count, expand, widened
from jdiff._typing import Array, Field, Kind, Process
from jdiff.predictions import check_kind, coefficients

__all__ = ["level_field", "merged_levels"]

# Below this width in units of sigma the normal cdf's differences lose digits, and a series in the width takes over.
_NARROW = 0.05


def level_field(
    process: Process,
    net: Callable[[Array, Array], Array],
    log_prior: Array,
    *,
    low: float = -1.0,
    high: float = 1.0,
    edges: Array | None = None,
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
      edges: increasing ends of the cells in model space, (L + 1,), where they are not equal ones from low to high.
      predict: kind of the field returned.

    Raises:
      ValueError: unknown kind, low >= high, or a prior or edges that do not fit x.
      TypeError: log_prior not floating point.
    """
    check_kind(predict)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low must be below high, both finite; got {low} and {high}")
    dtype = getattr(log_prior, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"log_prior must be floating point, got {dtype or type(log_prior).__name__}")
    if log_prior.ndim < 1:
        raise ValueError("log_prior must be an array of shape (*event, levels), got a scalar")
    levels = log_prior.shape[-1]
    if edges is not None and edges.shape != (levels + 1,):
        raise ValueError(f"edges must have shape ({levels + 1},), one more than levels, got {edges.shape}")

    def field(x, t):
        check_array(x)
        if log_prior.shape[:-1] != x.shape[1:]:
            want = (*x.shape[1:], levels)
            raise ValueError(f"log_prior must have shape {want}, event and levels, got {log_prior.shape}")
        t, dtype, x = batch_time(t, x), x.dtype, widened(x)  # the normal distribution has no half precision
        ends = jnp.linspace(low, high, levels + 1, dtype=x.dtype) if edges is None else edges.astype(x.dtype)
        # Not the difference of rounded ends: the width of equal cells is known better.
        widths = jnp.full(levels, (high - low) / levels, x.dtype) if edges is None else jnp.diff(ends)
        centers = ends[:-1] + 0.5 * widths
        alpha, sigma = (expand(c, x) for c in process.marginal(t))
        cells = _cells(alpha[..., None], sigma[..., None], x[..., None], ends, widths)
        prior = log_prior.astype(x.dtype)[None]
        probability = jax.nn.softmax(prior, axis=-1)
        mean = jnp.sum(probability * _row(centers, prior), axis=-1)
        second = (_row(centers, prior) - mean[..., None]) ** 2 + _row(widths, prior) ** 2 / 12
        variance = jnp.sum(probability * second, axis=-1)

        def posterior(logits):
            q = jax.nn.softmax(prior + cells.log_mass + logits, axis=-1)
            x0 = jnp.sum(q * (_row(centers, q) + _row(widths, q) * cells.offset), axis=-1)
            return x0, -jnp.sum(q * cells.mean, axis=-1)

        guess, _ = posterior(jnp.zeros((), x.dtype))
        features = jnp.concatenate(
            [
                (x - alpha * mean) / jnp.sqrt(alpha**2 * variance + sigma**2),
                (guess - mean) / jnp.sqrt(variance),
            ],
            axis=-1,
        )
        logits = net(features.astype(dtype), t.astype(dtype))
        if getattr(logits, "size", None) != x.size * levels or logits.shape[:1] != x.shape[:1]:
            got = getattr(logits, "shape", type(logits).__name__)
            raise ValueError(f"the network must return {levels} logits per entry of x {x.shape}, got {got}")
        x0, eps = posterior(widened(logits).reshape(*x.shape, levels))
        a, b = (expand(c, x) for c in coefficients(process, t, predict))
        return (a * x0 + b * eps).astype(dtype)

    return field


class _Cells(NamedTuple):
    """Per cell, for u ~ N(0, 1): each of shape (batch, *event, L)."""

    log_mass: Array
    """log (P(cell) / width) + a constant of the example."""
    mean: Array
    """E[u | cell]."""
    offset: Array
    """(E[u | cell] - center) / width, in (-1/2, 1/2): where in its cell the entry is expected."""


def _cells(alpha, sigma, x, edges, widths):
    ends = (alpha * _row(edges, x) - x) / sigma
    h = alpha * _row(widths, x) / sigma
    a, b = ends[..., :-1], ends[..., 1:]
    m = 0.5 * (a + b)
    narrow = h < _NARROW

    # The series of log(P / h), up to h^2; the constant -log(sqrt(2 pi)) is left out of both branches.
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


def merged_levels(counts: np.ndarray, cells: int) -> np.ndarray:
    """Return the best cut of L levels into cells of neighbours: its edges in levels, `0 = e_0 < ... < e_cells = L`.

    Of all such cuts, the one whose histogram, uniform inside a cell, gives the counted entries the highest likelihood
    (dynamic programming over cuts, O(cells L^2)). On the host, from the counts of the training data.

    Args:
      counts: how often each level occurs, shape (L,), not negative.
      cells: number of cells, 1 ... L.

    Raises:
      ValueError: counts or cells out of range.
      TypeError: cells is no integer.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or not (counts >= 0).all() or not np.isfinite(counts).all():
        raise ValueError(f"counts must be finite, not negative and of shape (levels,), got shape {counts.shape}")
    levels = len(counts)
    check_count(cells, "cells")
    if cells > levels:
        raise ValueError(f"cells must be in 1 ... {levels}, the number of levels; got {cells}")
    before = np.concatenate([[0.0], np.cumsum(counts)])
    start, stop = np.arange(levels)[:, None], np.arange(1, levels + 1)[None]
    inside, width = before[stop] - before[start], stop - start
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(inside > 0, -inside * np.log(inside / width), 0.0)
    cost[width <= 0] = np.inf
    best, cuts = cost[0], []
    for _ in range(cells - 1):
        # best[j]: levels 0 ... j in the cells so far; the next cell starts at `start`.
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        cuts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    edges = [levels]
    for cut in reversed(cuts):
        edges.append(int(cut[edges[-1] - 1]))
    return np.asarray([0, *reversed(edges)])


def _row(values, like):
    return values.reshape((1,) * (like.ndim - 1) + values.shape)


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
