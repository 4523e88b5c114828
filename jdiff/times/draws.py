"""Training times, drawn for each position of the global batch, for every process.

Every draw raises ValueError and TypeError where `uniform` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jax.scipy.stats import norm

from jdiff._array import check_count, check_integers, check_one_key, check_positive, is_concrete
from jdiff._typing import Array, Key, Process
from jdiff.processes import log_snr, rates, time_at
from jdiff.times.grids import ends, log_snr_ends

__all__ = [
    "Draw",
    "cosmap",
    "final",
    "importance",
    "log_normal",
    "logit_normal",
    "mode",
    "shift_draws",
    "stratified",
    "uniform",
]

Draw = Callable[..., tuple[Array, Array]]
"""(key, process, index, total, *, t_min, t_max) -> (t, weight), as `uniform`."""


def uniform(
    key: Key, process: Process, index: Array, total: int, *, t_min: float | None = None, t_max: float | None = None
) -> tuple[Array, Array]:
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
      TypeError: key is not a typed threefry key, index no array of integers, total no integer.
      ValueError: t_min and t_max are not in order, key or index of another shape, total < 1.
    """
    low, high = ends(process, 1, t_min, t_max)
    t = low + (high - low) * _independent(key, index, total)
    return t, jnp.ones_like(t)


def stratified(
    key: Key, process: Process, index: Array, total: int, *, t_min: float | None = None, t_max: float | None = None
) -> tuple[Array, Array]:
    """Draw t uniformly, one in each of `total` equal strata of the global batch (arguments as in `uniform`).

    One shift u for the whole batch, t = t_min + (t_max - t_min) ((u + index/total) mod 1): Kingma et al. 2021 (arXiv
    2107.00630), appendix I.1, over the global batch rather than a device's.
    """
    low, high = ends(process, 1, t_min, t_max)
    t = low + (high - low) * _spread(key, index, total)
    return t, jnp.ones_like(t)


def importance(
    key: Key, process: Process, index: Array, total: int, *, t_min: float | None = None, t_max: float | None = None
) -> tuple[Array, Array]:
    """Draw stratified t with density proportional to g^2/sigma^2, i.e. uniform in log-SNR (arguments as in `uniform`).

    The variance-reduced times for likelihood weighting of Song et al. 2021 (arXiv 2101.09258), section 5.1: g^2/sigma^2
    = -d log-SNR/dt, so the importance-weighted likelihood loss is the eps error with a constant weight. Where log-SNR
    is infinite at an end of time (alpha(1) = 0 for Rectified and Cosine) that density has no finite mass: times with
    sigma/alpha above 1000 (or below 1/1000) are not drawn, and the estimate leaves them out.
    """
    low, high = ends(process, 1, t_min, t_max)
    most, least = log_snr_ends(process, low, high)
    t = time_at(process, least + (most - least) * _spread(key, index, total))
    t = jnp.clip(t, low, high)
    return t, (most - least) / (high - low) / _log_snr_speed(process, t)


def log_normal(
    key: Key,
    process: Process,
    index: Array,
    total: int,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    uniform: float = 0.0,
    t_min: float | None = None,
    t_max: float | None = None,
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
      ValueError: mean not finite, std not positive and finite, or uniform outside [0, 1).
    """
    _check_finite(mean, "mean")
    check_positive(std, "std")
    if not 0 <= uniform < 1:
        raise ValueError(f"uniform must be in [0, 1), got {uniform}")
    low, high = ends(process, 1, t_min, t_max)
    most, least = log_snr_ends(process, low, high)
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


def logit_normal(
    key: Key,
    process: Process,
    index: Array,
    total: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    t_min: float | None = None,
    t_max: float | None = None,
) -> tuple[Array, Array]:
    """Draw stratified t with logit(u) ~ N(mean, std^2), u = (t - t_min) / (t_max - t_min) (arguments as in `uniform`).

    Esser et al. 2024 (arXiv 2403.03206), eq. 19, who use it without the weight: a negative mean prefers the data, a
    positive one the noise. On Rectified it is `log_normal` but for the ends: logit(t) = log(sigma/alpha) there. The
    weight is unbounded towards both ends, where the density vanishes.

    Raises:
      ValueError: mean not finite, or std not positive and finite.
    """
    _check_finite(mean, "mean")
    check_positive(std, "std")
    quantile = lambda u: jax.nn.sigmoid(mean + std * ndtri(u))
    return _by_quantile(key, process, index, total, quantile, t_min, t_max)


def mode(
    key: Key,
    process: Process,
    index: Array,
    total: int,
    *,
    scale: float = 1.29,
    t_min: float | None = None,
    t_max: float | None = None,
) -> tuple[Array, Array]:
    """Draw stratified t at 1 - u - scale (cos^2(pi u / 2) - 1 + u) of the way from t_min to t_max, u uniform.

    Esser et al. 2024 (arXiv 2403.03206), eq. 20: the middle is preferred for positive scales, the ends for negative
    ones, 0 is `stratified`, and the density vanishes nowhere. Arguments as in `uniform`.

    Raises:
      ValueError: scale outside [-1, 2/(pi - 2)], where the map is not monotone.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale must be in [-1, {2 / (math.pi - 2):.6f}], got {scale}")
    quantile = lambda u: 1 - u - scale * (jnp.cos(0.5 * math.pi * u) ** 2 - 1 + u)
    return _by_quantile(key, process, index, total, quantile, t_min, t_max)


def cosmap(
    key: Key, process: Process, index: Array, total: int, *, t_min: float | None = None, t_max: float | None = None
) -> tuple[Array, Array]:
    """Draw stratified t with the density 2 / (pi (1 - 2u + 2u^2)) of u = (t - t_min) / (t_max - t_min).

    Esser et al. 2024 (arXiv 2403.03206), eqs. 21 and 22: on Rectified the signal-to-noise ratios are those of uniform
    times on the cosine schedule, u/(1 - u) = tan(pi/2 uniform). Arguments as in `uniform`.
    """

    def quantile(u):
        sin, cos = jnp.sin(0.5 * math.pi * u), jnp.cos(0.5 * math.pi * u)
        return sin / (sin + cos)

    return _by_quantile(key, process, index, total, quantile, t_min, t_max)


def final(
    key: Key, process: Process, index: Array, total: int, *, t_min: float | None = None, t_max: float | None = None
) -> tuple[Array, Array]:
    """Return t_max for every position, weight 1: no estimate of an average, but distillation into one step.

    Liu et al. 2022 (arXiv 2209.03003): the velocity at pure noise, trained on pairs of a flow, is its
    one-step sampler. Arguments as in `uniform`.
    """
    _, high = ends(process, 1, t_min, t_max)
    t = jnp.full_like(_spread(key, index, total), high)
    return t, jnp.ones_like(t)


def shift_draws(draw: Draw, shift: float) -> Draw:
    """Return the draw whose times are those of `draw`, moved towards the noise as `times.shifted` moves a grid.

    With u = (t - t_min) / (t_max - t_min) they are at shift u / (1 + (shift - 1) u), Esser et al. 2024 (arXiv
    2403.03206), eq. 23; the weight is multiplied with the derivative, so that weighted averages stay what they were.

    Raises:
      ValueError: shift not positive and finite.
    """
    check_positive(shift, "shift")

    def shifted(key, process, index, total, *, t_min=None, t_max=None):
        low, high = ends(process, 1, t_min, t_max)
        t, weight = draw(key, process, index, total, t_min=t_min, t_max=t_max)
        u = (t - low) / (high - low)
        slowed = 1 + (shift - 1) * u
        moved = low + (high - low) * shift * u / slowed
        return jnp.clip(moved, low, high), weight * shift / slowed**2

    return shifted


def _by_quantile(key, process, index, total, quantile, t_min, t_max):
    """Draw t at quantile(u) of the way from t_min to t_max, u stratified; the weight is |d quantile / du|."""
    low, high = ends(process, 1, t_min, t_max)
    u = _spread(key, index, total)
    u = jnp.maximum(u, jnp.finfo(u.dtype).epsneg)  # a normal has no quantile at 0
    fraction, slope = jax.jvp(quantile, (u,), (jnp.ones_like(u),))
    return jnp.clip(low + (high - low) * fraction, low, high), jnp.abs(slope)


def _log_snr_speed(process, t):
    alpha, sigma, dalpha, dsigma = rates(process, t)
    return 2 * (dsigma / sigma - dalpha / alpha)


def _check_finite(value, name):
    if is_concrete(value) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check(key, index, total):
    check_one_key(key)
    check_integers(index, "index")
    if index.ndim != 1:
        raise ValueError(f"index must have shape (batch,), got {index.shape}")
    if is_concrete(total):
        check_count(total, "total")


def _independent(key, index, total):
    _check(key, index, total)
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)


def _spread(key, index, total):
    _check(key, index, total)
    return (jax.random.uniform(key) + index / total) % 1
