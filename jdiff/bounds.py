"""Evidence lower bounds on the weights of any field, as unbiased Monte-Carlo estimates for each example, in nats.

A bound speaks of the reverse *SDE* with the field's score (or of T ancestral steps), `log_likelihood` of the
probability flow: with the exact field both have the density of the data, with a trained one they are two models.

`density_bound` bounds log p_tmin(x), the number `log_likelihood` returns for the same x. `level_bound` bounds the
log-probability of integer levels, whose images enter the diffusion without dequantisation, through a discrete decoder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jdiff import losses
from jdiff._array import (
    call,
    check_array,
    check_count,
    check_grid,
    check_per_example,
    coefficient_dtype,
    event_size,
    expand,
    fold_in,
    full_like_batch,
    is_concrete,
    normal_like,
    per_example_keys,
    rademacher_like,
    sum_event,
)
from jdiff._decoders import decode, decode_cells
from jdiff._typing import Array, Field, Key, Kind, Process
from jdiff.predictions import check_kind, coefficients, reparameterise
from jdiff.processes import log_snr, perturb, prior_std, time_at
from jdiff.transforms import DataTransform, check_images

__all__ = ["Bound", "decode", "decode_cells", "density_bound", "end_time", "level_bound"]

# Where alpha(t_max) = 0 the bound ends at sigma/alpha = 1000 instead, with the prior there.
_LOG_SNR_CAP = -2 * math.log(1000)
# In log-SNR from t_min: before it the target of denoising from t_min is too noisy, and a divergence takes its place.
_NEAR = 1.0
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Bound(NamedTuple):
    """Per-example results in nats, shape (batch,): value = reconstruction - prior - diffusion."""

    value: Array
    """An unbiased estimate of a lower bound of the log-likelihood."""
    error: Array
    """Standard error of `value` over the draws (never too small on average); NaN for a single draw."""
    prior: Array
    """What the end of the process costs."""
    diffusion: Array
    """What the times in between cost."""
    reconstruction: Array
    """What the start gives back."""


def end_time(process: Process) -> Array:
    """Return where the bounds end: t_max, or where sigma/alpha = 1000 if alpha(t_max) = 0 (Rectified, Cosine)."""
    end = log_snr(process, jnp.asarray(process.t_max))
    return jnp.where(jnp.isfinite(end), process.t_max, time_at(process, jnp.full_like(end, _LOG_SNR_CAP)))


def density_bound(
    key: Key,
    process: Process,
    field: Field,
    x: Array,
    *,
    predict: Kind = "score",
    draws: int = 64,
    t_min: float | None = None,
    prior_log_prob: Callable[[Array], Array] | None = None,
) -> Bound:
    """Return the continuous-time bound of log p_tmin(x), x at t_min as in `log_likelihood`.

    With x_t drawn from the forward process started in x at s = t_min, x_t = a x + v e, a = alpha_t/alpha_s, v^2 =
    sigma_t^2 - a^2 sigma_s^2, and the field as an eps-field,

        log p_s(x) >= E log p_T(x_T) + D log a_T - int E[|eps|^2 / 2 - sigma_t div eps] d log-SNR,

    with equality for the exact field and end (Song et al. 2021, arXiv 2101.09258, theorem 3; Huang et al. 2021, arXiv
    2106.02808). Far from s the integrand takes its denoising form, the same in expectation and less noisy: |eps - c
    e|^2 / 2 - D c^2 / 2, c = sigma_t/v. Near s, where c is infinite, it stays as written, with one Rademacher probe.
    Times are uniform in log-SNR, the density g^2/sigma^2, one in each of `draws` equal strata.

    In the result `prior` is -E log p_T, `diffusion` the integral and `reconstruction` D log a_T.

    Args:
      key: one key or one per example.
      process: the forward process.
      field: (x, t) -> prediction.
      x: data in model space, shape (batch, *event).
      predict: kind of the field.
      draws: number of times far from t_min, one evaluation each; max(2, draws // 8) more, with a jvp, are near it.
      t_min: where the density is bounded (default: process.t_min), above 0.
      prior_log_prob: z -> log-density at `end_time(process)`, shape (batch,) (default: the process's prior, whose
        expectation is taken in closed form).

    Raises:
      ValueError: unknown kind, draws < 1, t_min outside (0, t_max), keys that do not fit.
      TypeError: x not floating point, draws no integer, keys not typed threefry keys.
    """
    check_kind(predict)
    keys = per_example_keys(key, check_array(x))
    check_count(draws, "draws")
    start = _start(process, t_min)
    # t stays in float32 where x is not, for what is made of it here.
    eps_field = reparameterise(process, functools.partial(call, field), predict, "eps")
    size, dtype = event_size(x), coefficient_dtype(x)
    alpha_s, _ = process.marginal(jnp.asarray(start, dtype))
    most, least = (log_snr(process, jnp.asarray(t, dtype)) for t in (start, end_time(process)))
    middle = most - jnp.minimum(_NEAR, 0.5 * (most - least))

    def kernel(t):
        alpha, sigma = process.marginal(t)
        # v^2 / sigma^2 = 1 - SNR_t / SNR_s, without a difference of squares.
        v = sigma * jnp.sqrt(-jnp.expm1(jnp.minimum(log_snr(process, t) - most, 0)))
        return alpha / alpha_s, sigma, v

    def far(keys, t):
        a, sigma, v = kernel(t)
        e = normal_like(keys, x)
        residual = eps_field(expand(a, x) * x + expand(v, x) * e, t) - expand(sigma / v, x) * e
        return 0.5 * _square(residual, dtype) - 0.5 * size * (sigma / v) ** 2

    def near(keys, t):
        a, sigma, v = kernel(t)
        state = expand(a, x) * x + expand(v, x) * normal_like(fold_in(keys, 0), x)
        probe = rademacher_like(fold_in(keys, 1), x)
        eps, derivative = jax.jvp(lambda x: eps_field(x, t), (state,), (probe,))
        return 0.5 * _square(eps, dtype) - sigma * sum_event(probe * derivative).astype(dtype)

    pieces = [
        _integrate(fold_in(keys, 0), process, far, x, draws, middle, least),
        _integrate(fold_in(keys, 1), process, near, x, max(2, draws // 8), most, middle),
    ]
    diffusion = sum(mean for mean, _ in pieces)
    variance = sum(variance for _, variance in pieces)
    a, _, v = kernel(full_like_batch(x, end_time(process)))
    if prior_log_prob is None:
        std = jnp.asarray(prior_std(process), dtype)
        prior = 0.5 * (_square(expand(a, x) * x, dtype) + size * v**2) / std**2 + size * (jnp.log(std) + _HALF_LOG_2PI)
    else:
        prior_of = _per_example(prior_log_prob, dtype)
        at_end = lambda n: -prior_of(expand(a, x) * x + expand(v, x) * normal_like(fold_in(keys, n), x))
        prior, spread = _average(jax.lax.map(at_end, 2 + jnp.arange(draws)))
        variance = variance + spread
    reconstruction = size * jnp.log(a)
    return Bound(reconstruction - prior - diffusion, jnp.sqrt(variance), prior, diffusion, reconstruction)


def level_bound(
    key: Key,
    process: Process,
    field: Field,
    levels: Array,
    transform: DataTransform,
    *,
    predict: Kind = "score",
    draws: int | None = 64,
    ts: Array | None = None,
    t_min: float | None = None,
    variance: Literal["posterior", "forward"] = "posterior",
    decoder: Literal["posterior", "cells"] = "posterior",
    prior_log_prob: Callable[[Array], Array] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Bound:
    """Return the bound of log P(levels) in continuous time, or of T = len(ts) - 1 ancestral steps.

    With x_0 the middle of the levels' cells, x_t = alpha x_0 + sigma e and d the error of the predicted x_0,

        log P(k) >= E log p(k | x_tmin) - KL(q(x_tmax | x_0) || p) - L,
        L = 1/2 int E|eps - e|^2 d log-SNR,    or    L_T = sum KL(q(x_s | x_t, x_0) || p(x_s | x_t)),
        KL = 1/2 (SNR_s - SNR_t) E|d|^2    for variance="posterior".

    Kingma et al. 2021 (arXiv 2107.00630), section 4 and appendix A. variance="forward" is the larger of the two of
    Ho et al. 2020 (arXiv 2006.11239), section 3.2: sigma_t|s^2, with r = sigma_s^2/sigma_t^2 each KL is r times the
    above plus D/2 (r - 1 - log r). Continuous times are drawn as in `density_bound`.

    Args:
      key: one key or one per example.
      process: the forward process.
      field: (x, t) -> prediction.
      levels: integer levels, (batch, *event).
      transform: the levels and their cells.
      predict: kind of the field.
      draws: number of times, one evaluation each; with `ts`, the number of steps drawn, one in each of as many strata,
        and None for every step once. The decoder sees as many draws of its own.
      ts: the grid of a T-step bound, decreasing as those of `jdiff.times`; its ends are those of the bound.
      t_min: start of the continuous bound (default: process.t_min), above 0.
      variance: of the ancestral steps.
      decoder: "posterior" is `decode`, "cells" is `decode_cells` at the field's x_0 (one more evaluation a draw).
      prior_log_prob: as in `density_bound`, at ts[0] where there are steps; its divergence is then estimated.
      dtype: the floating-point type of images.

    Raises:
      ValueError: unknown kind, variance or decoder, draws out of range, a grid that does not decrease
        from t_max or below to above 0, a dtype too coarse for the levels.
      TypeError: levels not integer, draws no integer, keys not typed threefry keys.
    """
    check_kind(predict)
    if variance not in ("posterior", "forward"):
        raise ValueError(f"unknown variance {variance!r}; choose 'posterior' or 'forward'")
    if variance != "posterior" and ts is None:
        raise ValueError("variance='forward' is of ancestral steps: give their times, ts")
    if decoder not in ("posterior", "cells"):
        raise ValueError(f"unknown decoder {decoder!r}; choose 'posterior' or 'cells'")
    if ts is None:
        check_count(draws, "draws")  # type: ignore[arg-type]  # which None is not
        start, end = _start(process, t_min), end_time(process)
    else:
        check_grid(ts, decreasing=True)
        ts_given, ts = ts, jnp.asarray(ts)
        if t_min is not None:
            raise ValueError(f"t_min is the last of ts where there are steps, got both, t_min = {t_min}")
        if is_concrete(ts_given):
            last, first = np.asarray(ts_given)[[-1, 0]]
            if not 0 < last < first <= process.t_max:
                raise ValueError(f"ts must be in (0, {process.t_max}], got {first:g} to {last:g}")
        steps = ts.shape[0] - 1
        if draws is not None:
            check_count(draws, "draws")
            if draws > steps:
                raise ValueError(f"draws must be None or in 1 ... {steps}, the number of steps; got {draws}")
        start, end = ts[-1], ts[0]
    check_images(levels, transform.levels, "levels")
    x = transform.center(levels, dtype=dtype)
    keys, size, real = per_example_keys(key, x.shape[0]), event_size(x), coefficient_dtype(x)
    noise_keys = fold_in(keys, 0)

    if ts is None:
        most, least = (log_snr(process, jnp.asarray(t, real)) for t in (start, end))

        def error(keys, t):
            return 0.5 * size * losses.denoising(keys, field, process, x, t, predict=predict, weight=losses.snr)

        diffusion, spread = _integrate(noise_keys, process, error, x, draws, most, least)
    else:

        def step(keys, index):
            t, s = ts[index].astype(real), ts[index + 1].astype(real)
            loss = losses.denoising(keys, field, process, x, t, predict=predict, weight=_x0_error)
            gain = jnp.exp(log_snr(process, s)) * -jnp.expm1(log_snr(process, t) - log_snr(process, s))
            kl = 0.5 * size * gain * loss
            if variance == "posterior":
                return kl
            log_ratio = 2 * (jnp.log(process.marginal(s)[1]) - jnp.log(process.marginal(t)[1]))
            return jnp.exp(log_ratio) * kl + 0.5 * size * (jnp.expm1(log_ratio) - log_ratio)

        diffusion, spread = _sum_steps(noise_keys, step, steps, draws)

    t_start, t_end = full_like_batch(x, start), full_like_batch(x, end)

    def reconstruct(n):
        z = perturb(process, x, normal_like(fold_in(fold_in(keys, 1), n), x), t_start)
        if decoder == "posterior":
            return decode(process, z, t_start, levels, transform)
        alpha, sigma = process.marginal(t_start)
        mean = reparameterise(process, functools.partial(call, field), predict, "x0")(z, t_start)
        return decode_cells(mean, sigma / alpha, levels, transform)

    count = draws or steps
    reconstruction, noise = _average(jax.lax.map(reconstruct, jnp.arange(count)))
    spread = spread + noise
    alpha, sigma = process.marginal(t_end)
    if prior_log_prob is None:
        std = jnp.asarray(prior_std(process), real)
        moment = _square(expand(alpha, x) * x, real) + size * sigma**2
        prior = 0.5 * (moment / std**2 - size) - size * jnp.log(sigma / std)
    else:

        def divergence(n):
            z = perturb(process, x, normal_like(fold_in(fold_in(keys, 2), n), x), t_end)
            return -_per_example(prior_log_prob, real)(z) - size * (0.5 + _HALF_LOG_2PI + jnp.log(sigma))

        prior, noise = _average(jax.lax.map(divergence, jnp.arange(count)))
        spread = spread + noise
    return Bound(reconstruction - prior - diffusion, jnp.sqrt(spread), prior, diffusion, reconstruction)


def _integrate(keys, process, integrand, x, draws, most, least):
    """Integrate over log-SNR from least to most, one independent draw in each of equal strata: mean and variance."""

    def draw(n):
        step_keys = fold_in(keys, n)
        u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0), dtype=most.dtype))(step_keys)
        t = time_at(process, most - (most - least) * (n.astype(u.dtype) + u) / draws)
        return (most - least) * integrand(fold_in(step_keys, 1), t)

    return _average(jax.lax.map(draw, jnp.arange(draws)))


def _sum_steps(keys, step, steps, draws):
    """Sum all steps once, or estimate the sum from one step drawn in each stratum: sum and variance."""
    if draws is None:
        terms = jax.lax.map(lambda n: step(fold_in(fold_in(keys, n), 1), jnp.full(keys.shape, n)), jnp.arange(steps))
    else:

        def draw(n):
            step_keys = fold_in(keys, n)
            u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0)))(step_keys)
            index = jnp.minimum((steps * (n.astype(u.dtype) + u) / draws).astype(jnp.int32), steps - 1)
            return step(fold_in(step_keys, 1), index)

        terms = jax.lax.map(draw, jnp.arange(draws))
    mean, variance = _average(terms)
    return steps * mean, steps**2 * variance


def _average(values):
    """Return the mean over draws, in the order of their strata, and its variance.

    The variance inside a stratum comes from differences of neighbours (von Neumann), which count a trend between
    strata too, but once and not as often as the spread around the mean would.
    """
    n = values.shape[0]
    if n == 1:
        return values[0], jnp.full_like(values[0], jnp.nan)
    return jnp.mean(values, axis=0), jnp.sum(jnp.diff(values, axis=0) ** 2, axis=0) / (2 * n * (n - 1))


def _square(x, dtype):
    return sum_event(x.astype(dtype) ** 2)


def _x0_error(process, t, predict):
    """Return the weight of |x_0 error|^2: (sigma / det)^2."""
    alpha, sigma = process.marginal(t)
    a, b = coefficients(process, t, predict)
    return (sigma / (alpha * b - sigma * a)) ** 2


def _per_example(log_prob, dtype):
    return lambda z: check_per_example(log_prob(z), len(z), "prior_log_prob").astype(dtype)


def _start(process, t_min):
    t_min = process.t_min if t_min is None else t_min
    if not 0 < t_min < process.t_max:
        raise ValueError(f"t_min must be in (0, {process.t_max}), where log-SNR is finite; got {t_min}")
    return t_min
