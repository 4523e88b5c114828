"""Sampling grids and training-time draws, for every process.

Grids have n + 1 times, decreasing from t_max to t_min; reverse them (`ts[::-1]`) to encode. Draws return (t, weight):
the weighted average of f(t) estimates its mean over uniform t in [t_min, t_max] without bias, whatever the density;
leave the weight out to let the density itself be the weighting.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from jdiff._array import check_key
from jdiff._typing import Array, Key, Process
from jdiff.processes import log_snr, rates, time_at

__all__ = [
    "importance",
    "karras",
    "linear",
    "log_normal",
    "polyexponential",
    "quadratic",
    "shifted",
    "stratified",
    "subsequence",
    "uniform",
    "uniform_log_snr",
]

# Where alpha(t_max) = 0 or sigma(t_min) = 0 log-SNR is infinite: spacing in log-SNR then runs from sigma/alpha = 1000,
# or to 1/1000, and the end of time itself stays on the grid.
_LOG_SNR_CAP = 2 * math.log(1000)


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
    """Return n steps of equal length in log(alpha/sigma) (Lu et al. 2022, arXiv 2206.00927, section 3)."""
    low, high = _ends(process, n, t_min, t_max)
    most, least = _log_snr_ends(process, low, high)
    return _pin(time_at(process, least + (most - least) * _fractions(n)), low, high)


def polyexponential(
    process: Process, n: int, *, rho: float = 1.0, t_min: float | None = None, t_max: float | None = None
) -> Array:
    """Return n steps with log(sigma/alpha) = last + (first - last) (1 - i/n)^rho.

    rho = 1 is `uniform_log_snr`; larger ones put more steps at small noise, smaller ones at large noise (the
    polynomial in log sigma of Crowson's k-diffusion, 2022).

    Raises:
      ValueError: n < 1, t_min and t_max not in order, or rho <= 0.
    """
    if rho <= 0:
        raise ValueError(f"rho must be positive, got {rho}")
    low, high = _ends(process, n, t_min, t_max)
    most, least = _log_snr_ends(process, low, high)
    return _pin(time_at(process, most + (least - most) * (1 - _fractions(n)) ** rho), low, high)


def shifted(
    process: Process, n: int, *, shift: float = 3.0, t_min: float | None = None, t_max: float | None = None
) -> Array:
    """Return n steps at t_min + (t_max - t_min) shift u / (1 + (shift - 1) u), u = 1, 1 - 1/n, ..., 0: more at noise.

    Esser et al. 2024 (arXiv 2403.03206), eq. 23, for Rectified, where shift = sqrt(m/n) for m pixels instead of n (3
    for 1024x1024) keeps the uncertainty about the image, sigma/alpha over the root of the number of pixels.

    Raises:
      ValueError: n < 1, t_min and t_max not in order, or shift <= 0.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    low, high = _ends(process, n, t_min, t_max)
    u = 1 - _fractions(n)
    return _pin(low + (high - low) * shift * u / (1 + (shift - 1) * u), low, high)


def subsequence(
    process: Process,
    n: int,
    *,
    total: int = 1000,
    spacing: Literal["linspace", "leading", "trailing"] = "linspace",
    t_min: float | None = None,
    t_max: float | None = None,
) -> Array:
    """Return n steps through times of a discrete schedule of `total` steps, t_k = t_max (k + 1) / total, then t_min.

    The k of a network that was trained at k = 0 ... total - 1 are, for i = 0 ... n - 1, rounded: (total - 1) (1 - i/(n
    - 1)) ("linspace"); (n - 1 - i) floor(total/n) ("leading": Song, Meng & Ermon 2021, arXiv 2010.02502, appendix D.2,
    which starts below t_max); total (1 - i/n) - 1 ("trailing"). Lin et al. 2023 (arXiv 2305.08891), table 2.

    Raises:
      ValueError: n not in 1 ... total, unknown spacing, t_min not below the last of these times.
    """
    if not 1 <= n <= total:
        raise ValueError(f"a subsequence of {total} steps has 1 to {total} of them, got n = {n}")
    steps = np.arange(n)
    if spacing == "linspace":
        k = np.round(np.linspace(total - 1, 0, n))
    elif spacing == "leading":
        k = (n - 1 - steps) * (total // n)
    elif spacing == "trailing":
        k = np.round(total * (1 - steps / n)) - 1
    else:
        raise ValueError(f"unknown spacing {spacing!r}; choose 'linspace', 'leading' or 'trailing'")
    low, high = _ends(process, n, t_min, t_max)
    ts = high * (k + 1) / total
    if not low < ts[-1]:
        raise ValueError(f"t_min = {low} is not below the last time of the schedule, {ts[-1]}")
    return jnp.asarray(np.append(ts, low), jnp.zeros(()).dtype)


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

    The variance-reduced times for likelihood weighting of Song et al. 2021 (arXiv 2101.09258), section 5.1: g^2/sigma^2
    = -d log-SNR/dt, so the importance-weighted likelihood loss is the eps error with a constant weight. Where log-SNR
    is infinite at an end of time (alpha(1) = 0 for Rectified and Cosine) that density has no finite mass: times with
    sigma/alpha above 1000 (or below 1/1000) are not drawn, and the estimate leaves them out.
    """
    low, high = _ends(process, 1, t_min, t_max)
    most, least = _log_snr_ends(process, low, high)
    t = time_at(process, least + (most - least) * _spread(key, index, total))
    t = jnp.clip(t, low, high)
    return t, (most - least) / (high - low) / _log_snr_speed(process, t)


def log_normal(
    key: Key, process: Process, index: Array, total: int, *, mean=-1.2, std=1.2, uniform=0.0, t_min=None, t_max=None
) -> tuple[Array, Array]:
    """Draw stratified t with log(sigma/alpha) ~ N(mean, std^2), cut to [t_min, t_max] (arguments as in `uniform`).

    The training density of Karras et al. 2022 (arXiv 2206.00364), table 1, which uses it without the weight returned.
    With the weight, a share of the draws should be uniform in log-SNR: it bounds the weights in the tails of the
    normal.

    Args:
      key: as in `uniform`.
      process: as in `uniform`.
      index: as in `uniform`.
      total: as in `uniform`.
      mean: mean of log(sigma/alpha).
      std: its standard deviation.
      uniform: share of the draws that is uniform in log-SNR instead, in [0, 1).
      t_min: as in `uniform`.
      t_max: as in `uniform`.

    Returns:
      t and weight, shape (batch,).

    Raises:
      ValueError: std <= 0, or uniform outside [0, 1).
    """
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
    if not 0 <= uniform < 1:
        raise ValueError(f"uniform must be in [0, 1), got {uniform}")
    low, high = _ends(process, 1, t_min, t_max)
    most, least = _log_snr_ends(process, low, high)
    first, last = norm.cdf((-0.5 * most - mean) / std), norm.cdf((-0.5 * least - mean) / std)
    # Quantiles below `uniform` become the uniform draws, the others the normal ones: both stay stratified.
    u = _spread(key, index, total)
    flat = u < uniform
    normal = mean + std * norm.ppf(first + (last - first) * jnp.where(flat, 0.5, (u - uniform) / (1 - uniform)))
    even = -0.5 * (most + (least - most) * u / max(uniform, 1e-9))
    t = jnp.clip(time_at(process, -2 * jnp.where(flat, even, normal)), low, high)
    z = (-0.5 * log_snr(process, t) - mean) / std
    of_log_snr = 0.5 * (1 - uniform) * norm.pdf(z) / (last - first) / std + uniform / (most - least)
    return t, 1 / ((high - low) * of_log_snr * _log_snr_speed(process, t))


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
    ends = log_snr(process, jnp.asarray(low)), log_snr(process, jnp.asarray(high))
    return tuple(jnp.where(jnp.isfinite(end), end, cap) for end, cap in zip(ends, (_LOG_SNR_CAP, -_LOG_SNR_CAP)))


def _log_snr_speed(process, t):
    alpha, sigma, dalpha, dsigma = rates(process, t)
    return 2 * (dsigma / sigma - dalpha / alpha)


def _independent(key, index):
    check_key(key)
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)


def _spread(key, index, total):
    check_key(key)
    return (jax.random.uniform(key) + index / total) % 1
