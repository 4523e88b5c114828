"""Sampling grids and training-time draws, for every process.

Grids have n + 1 times, decreasing from t_max to t_min; reverse them (`ts[::-1]`) to encode. Draws return (t, weight):
the weighted average of f(t) estimates its mean over uniform t in [t_min, t_max] without bias, whatever the density;
leave the weight out to let the density itself be the weighting.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from jdiff._array import check_key
from jdiff._typing import Array, Key, Process
from jdiff.processes import log_snr, rates, time_at

__all__ = [
    "importance",
    "karras",
    "linear",
    "log_normal",
    "quadratic",
    "stratified",
    "uniform",
    "uniform_log_snr",
]

# Where alpha(t_max) = 0 log-SNR is -inf: spacing in log-SNR starts from sigma/alpha = 1000 instead, and t_max stays on
# the grid.
_LOG_SNR_FLOOR = -13.8


def linear(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Array:
    """Return n steps of equal length in t.

    Raises:
      ValueError: n < 1, or t_min and t_max are not in order.
    """
    low, high = _ends(process, n, t_min, t_max)
    return _pin(high + (low - high) * _fractions(n), low, high)


def quadratic(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Array:
    """Return n steps of equal length in sqrt(t), finer near the data.

    Song, Meng & Ermon 2021 (arXiv 2010.02502), appendix D.2.
    """
    low, high = _ends(process, n, t_min, t_max)
    return _pin((high**0.5 + (low**0.5 - high**0.5) * _fractions(n)) ** 2, low, high)


def karras(
    process: Process, n: int, *, rho: float = 7.0, t_min: float | None = None, t_max: float | None = None
) -> Array:
    """Return n steps of equal length in (sigma/alpha)^(1/rho) (Karras et al. 2022, arXiv 2206.00364, eq. 5).

    Raises:
      ValueError: n < 1, t_min and t_max not in order, or rho <= 0.
    """
    if rho <= 0:
        raise ValueError(f"rho must be positive, got {rho}")
    low, high = _ends(process, n, t_min, t_max)
    most, least = _log_snr_ends(process, low, high)
    first, last = jnp.exp(-0.5 * least / rho), jnp.exp(-0.5 * most / rho)
    ratio = first + (last - first) * _fractions(n)
    return _pin(time_at(process, -2 * rho * jnp.log(ratio)), low, high)


def uniform_log_snr(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Array:
    """Return n steps of equal length in log(alpha/sigma) (Lu et al. 2022, arXiv 2206.00927, section 4)."""
    low, high = _ends(process, n, t_min, t_max)
    most, least = _log_snr_ends(process, low, high)
    return _pin(time_at(process, least + (most - least) * _fractions(n)), low, high)


def uniform(key: Key, process: Process, index: Array, total: int, *, t_min=None, t_max=None) -> tuple[Array, Array]:
    """Draw t uniformly in [t_min, t_max], independently for each position `index` of the global batch.

    Args:
      key: one key for the training step, the same on every device.
      process: the forward process.
      index: positions in the global batch, integers of shape (batch,).
      total: size of the global batch.
      t_min: smallest time (default: process.t_min).
      t_max: largest time (default: process.t_max).

    Returns:
      t and weight (ones), shape (batch,).

    Raises:
      TypeError: key is not a typed threefry key.
      ValueError: t_min and t_max are not in order.
    """
    low, high = _ends(process, 1, t_min, t_max)
    t = low + (high - low) * _independent(key, index)
    return t, jnp.ones_like(t)


def stratified(key: Key, process: Process, index: Array, total: int, *, t_min=None, t_max=None) -> tuple[Array, Array]:
    """Draw t uniformly, one in each of `total` equal strata of the global batch (arguments as in `uniform`).

    One shift u for the whole batch, t = t_min + (t_max - t_min) ((u + index/total) mod 1): Kingma et al. 2021 (arXiv
    2107.00630), appendix I.1, over the global batch rather than a device's.
    """
    low, high = _ends(process, 1, t_min, t_max)
    t = low + (high - low) * _spread(key, index, total)
    return t, jnp.ones_like(t)


def importance(key: Key, process: Process, index: Array, total: int, *, t_min=None, t_max=None) -> tuple[Array, Array]:
    """Draw stratified t with density proportional to g^2/sigma^2, i.e. uniform in log-SNR (arguments as in `uniform`).

    The variance-reduced times for likelihood weighting of Song et al. 2021 (arXiv 2101.09258), section 4.2: g^2/sigma^2
    = -d log-SNR/dt, so the importance-weighted likelihood loss is the eps error with a constant weight.
    """
    low, high = _ends(process, 1, t_min, t_max)
    most, least = _log_snr_ends(process, low, high)
    t = time_at(process, least + (most - least) * _spread(key, index, total))
    t = jnp.clip(t, low, high)
    return t, (most - least) / (high - low) / _log_snr_speed(process, t)


def log_normal(
    key: Key, process: Process, index: Array, total: int, *, mean=-1.2, std=1.2, t_min=None, t_max=None
) -> tuple[Array, Array]:
    """Draw stratified t with log(sigma/alpha) ~ N(mean, std^2), cut to [t_min, t_max] (arguments as in `uniform`).

    The training density of Karras et al. 2022 (arXiv 2206.00364), table 1, which uses it without the weight returned.

    Raises:
      ValueError: std <= 0.
    """
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
    low, high = _ends(process, 1, t_min, t_max)
    most, least = _log_snr_ends(process, low, high)
    first, last = norm.cdf((-0.5 * most - mean) / std), norm.cdf((-0.5 * least - mean) / std)
    z = norm.ppf(first + (last - first) * _spread(key, index, total))
    t = jnp.clip(time_at(process, -2 * (mean + std * z)), low, high)
    z = (-0.5 * log_snr(process, t) - mean) / std
    density = norm.pdf(z) / (last - first) / std * 0.5 * _log_snr_speed(process, t)
    return t, 1 / ((high - low) * density)


def _ends(process, n, t_min, t_max):
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got n = {n}")
    low = process.t_min if t_min is None else t_min
    high = process.t_max if t_max is None else t_max
    if not 0 <= low < high <= process.t_max:
        raise ValueError(f"times must satisfy 0 <= t_min < t_max <= {process.t_max}, got t_min = {low}, t_max = {high}")
    return low, high


def _fractions(n):
    return jnp.arange(n + 1) / n


def _pin(ts, low, high):
    return ts.at[0].set(high).at[-1].set(low)


def _log_snr_ends(process, low, high):
    most, least = log_snr(process, jnp.asarray(low)), log_snr(process, jnp.asarray(high))
    return most, jnp.where(jnp.isfinite(least), least, _LOG_SNR_FLOOR)


def _log_snr_speed(process, t):
    alpha, sigma, dalpha, dsigma = rates(process, t)
    return 2 * (dsigma / sigma - dalpha / alpha)


def _independent(key, index):
    check_key(key)
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)


def _spread(key, index, total):
    check_key(key)
    return (jax.random.uniform(key) + index / total) % 1
