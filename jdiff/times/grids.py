"""Sampling grids, for every process.

All raise ValueError for n below 1 and for t_min and t_max that are not in order within [0, process.t_max], and
TypeError for an n that is no integer.
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jdiff._array import check_count, check_positive
from jdiff._typing import Array, Process
from jdiff.processes import log_snr, time_at

__all__ = [
    "karras",
    "linear",
    "polyexponential",
    "quadratic",
    "shifted",
    "subsequence",
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
    low, high = ends(process, n, t_min, t_max)
    return _pin(high + (low - high) * _fractions(n), low, high)


def quadratic(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Array:
    """Return n steps of equal length in sqrt(t), finer near the data.

    Song, Meng & Ermon 2021 (arXiv 2010.02502), appendix D.2.
    """
    low, high = ends(process, n, t_min, t_max)
    return _pin((high**0.5 + (low**0.5 - high**0.5) * _fractions(n)) ** 2, low, high)


def karras(
    process: Process, n: int, *, rho: float = 7.0, t_min: float | None = None, t_max: float | None = None
) -> Array:
    """Return n steps of equal length in (sigma/alpha)^(1/rho) (Karras et al. 2022, arXiv 2206.00364, eq. 5).

    Raises:
      ValueError: n < 1, t_min and t_max not in order, or rho not positive and finite.
    """
    check_positive(rho, "rho")
    low, high = ends(process, n, t_min, t_max)
    most, least = log_snr_ends(process, low, high)
    first, last = jnp.exp(-0.5 * least / rho), jnp.exp(-0.5 * most / rho)
    ratio = first + (last - first) * _fractions(n)
    return _pin(time_at(process, -2 * rho * jnp.log(ratio)), low, high)


def uniform_log_snr(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Array:
    """Return n steps of equal length in log(alpha/sigma) (Lu et al. 2022, arXiv 2206.00927, section 3)."""
    low, high = ends(process, n, t_min, t_max)
    most, least = log_snr_ends(process, low, high)
    return _pin(time_at(process, least + (most - least) * _fractions(n)), low, high)


def polyexponential(
    process: Process, n: int, *, rho: float = 1.0, t_min: float | None = None, t_max: float | None = None
) -> Array:
    """Return n steps with log(sigma/alpha) = last + (first - last) (1 - i/n)^rho.

    rho = 1 is `uniform_log_snr`; larger ones put more steps at small noise, smaller ones at large noise (the
    polynomial in log sigma of Crowson's k-diffusion, 2022).

    Raises:
      ValueError: n < 1, t_min and t_max not in order, or rho not positive and finite.
    """
    check_positive(rho, "rho")
    low, high = ends(process, n, t_min, t_max)
    most, least = log_snr_ends(process, low, high)
    return _pin(time_at(process, most + (least - most) * (1 - _fractions(n)) ** rho), low, high)


def shifted(
    process: Process, n: int, *, shift: float = 3.0, t_min: float | None = None, t_max: float | None = None
) -> Array:
    """Return n steps at t_min + (t_max - t_min) shift u / (1 + (shift - 1) u), u = 1, 1 - 1/n, ..., 0: more at noise.

    Esser et al. 2024 (arXiv 2403.03206), eq. 23, for Rectified, where shift = sqrt(m/n) for m pixels instead of n (3
    for 1024x1024) keeps the uncertainty about the image, sigma/alpha over the root of the number of pixels.

    Raises:
      ValueError: n < 1, t_min and t_max not in order, or shift not positive and finite.
    """
    check_positive(shift, "shift")
    low, high = ends(process, n, t_min, t_max)
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
    check_count(n, "n", 0)
    check_count(total, "total")
    if not 1 <= n <= total:
        raise ValueError(f"a subsequence of {total} steps has 1 to {total} of them, got n = {n}")
    steps = np.arange(n)
    k: np.ndarray
    if spacing == "linspace":
        k = np.round(np.linspace(total - 1, 0, n))
    elif spacing == "leading":
        k = (n - 1 - steps) * (total // n)
    elif spacing == "trailing":
        k = np.round(total * (1 - steps / n)) - 1
    else:
        raise ValueError(f"unknown spacing {spacing!r}; choose 'linspace', 'leading' or 'trailing'")
    low, high = ends(process, n, t_min, t_max)
    ts = high * (k + 1) / total
    if not low < ts[-1]:
        raise ValueError(f"t_min = {low} is not below the last time of the schedule, {ts[-1]}")
    return jnp.asarray(np.append(ts, low), jnp.zeros(()).dtype)


def ends(process: Process, n: int, t_min: float | None, t_max: float | None) -> tuple[float, float]:
    """Return t_min and t_max with the process's for None.

    Raises:
      ValueError: n < 1, or they are not in order.
      TypeError: n is no integer.
    """
    check_count(n, "n")
    low = process.t_min if t_min is None else t_min
    high = process.t_max if t_max is None else t_max
    if not 0 <= low < high <= process.t_max:
        raise ValueError(f"times must satisfy 0 <= t_min < t_max <= {process.t_max}, got t_min = {low}, t_max = {high}")
    return low, high


def _fractions(n):
    return jnp.arange(n + 1) / n


def _pin(ts, low, high):
    return ts.at[0].set(high).at[-1].set(low)


def log_snr_ends(process: Process, low: float, high: float) -> tuple[Array, Array]:
    """Return the log-SNR at both ends, the cap where it is infinite."""
    values = log_snr(process, jnp.asarray(low)), log_snr(process, jnp.asarray(high))
    most, least = (jnp.where(jnp.isfinite(end), end, cap) for end, cap in zip(values, (_LOG_SNR_CAP, -_LOG_SNR_CAP)))
    return most, least
