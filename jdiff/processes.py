"""Forward processes p(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), and what follows from alpha and sigma alone.

A process is a frozen dataclass with one method, `marginal(t) -> (alpha, sigma)`. Drift, diffusion, log-SNR, priors and
perturbations are functions of any object with that method, so a user's process needs nothing else.

Times are in [0, t_max]; values elsewhere mean nothing. Functions of times raise TypeError where these are not real.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jdiff._array import (
    as_floating,
    batch_time,
    check_array,
    check_like,
    check_shape,
    expand,
    normal_like,
    per_example_keys,
    sum_event,
    widened,
)
from jdiff._pytree import register_dataclass
from jdiff._typing import Array, Key, Process

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "Rates",
    "Rectified",
    "SubVP",
    "log_snr",
    "perturb",
    "prior_log_prob",
    "prior_sample",
    "prior_std",
    "rates",
    "squared_diffusion",
    "time_at",
]


_Class = TypeVar("_Class", bound=type)


def _static(*, default: float) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(_static,))
def _process(cls: _Class) -> _Class:
    dataclasses.dataclass(frozen=True)(cls)
    return register_dataclass(cls)


def _integrated_beta(process, t):
    return t * (process.beta_min + 0.5 * t * (process.beta_max - process.beta_min))


def _one_minus_exp(b):
    """Return 1 - exp(-b); the derivative of expm1 is expm1 + 1 in JAX and loses all digits for large b."""
    return jnp.where(b < 1, -jnp.expm1(-jnp.minimum(b, 1)), 1 - jnp.exp(-b))


def _time_of_integrated_beta(process, b):
    slope = process.beta_max - process.beta_min
    # The root written without a difference: exact for b -> 0 and for slope = 0.
    return 2 * b / (process.beta_min + jnp.sqrt(process.beta_min**2 + 2 * slope * b))


@_process
class VP:
    """Variance-preserving process, beta(t) = beta_min + t (beta_max - beta_min), B = int_0^t beta.

    alpha = exp(-B/2), sigma^2 = 1 - exp(-B); dx = -beta/2 x dt + sqrt(beta) dw; prior N(0, I).
    Song et al. 2021 (arXiv 2011.13456), eqs. 11, 32, 33.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = _static(default=1e-5)
    t_max: float = _static(default=1.0)
    prior_std = 1.0

    def marginal(self, t: Array) -> tuple[Array, Array]:
        """Return alpha(t), sigma(t)."""
        b = _integrated_beta(self, t)
        return jnp.exp(-0.5 * b), jnp.sqrt(_one_minus_exp(b))

    def time_at(self, log_snr: Array) -> Array:
        """Return t at a given log alpha^2/sigma^2."""
        return _time_of_integrated_beta(self, jax.nn.softplus(-log_snr))


@_process
class SubVP:
    """Sub-VP process: alpha as in VP, sigma = 1 - exp(-B), below VP's at every t; prior N(0, I).

    dx = -beta/2 x dt + sqrt(beta (1 - exp(-2 B))) dw. Song et al. 2021 (arXiv 2011.13456), eqs. 14, 29.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = _static(default=1e-5)
    t_max: float = _static(default=1.0)
    prior_std = 1.0

    def marginal(self, t: Array) -> tuple[Array, Array]:
        """Return alpha(t), sigma(t)."""
        b = _integrated_beta(self, t)
        return jnp.exp(-0.5 * b), _one_minus_exp(b)

    def time_at(self, log_snr: Array) -> Array:
        """Return t at a given log alpha^2/sigma^2: sigma/alpha = 2 sinh(B/2)."""
        return _time_of_integrated_beta(self, 2 * jnp.arcsinh(0.5 * jnp.exp(-0.5 * log_snr)))


@_process
class VE:
    """Variance-exploding process: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t; prior N(0, sigma_max^2 I).

    dx = sigma sqrt(2 log(sigma_max / sigma_min)) dw. Song et al. 2021 (arXiv 2011.13456), eqs. 9, 30, 31.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = _static(default=1e-5)
    t_max: float = _static(default=1.0)

    def marginal(self, t: Array) -> tuple[Array, Array]:
        """Return alpha(t), sigma(t)."""
        ratio = jnp.log(self.sigma_max / self.sigma_min)
        return jnp.ones_like(t), self.sigma_min * jnp.exp(t * ratio.astype(jnp.result_type(t)))

    def time_at(self, log_snr: Array) -> Array:
        """Return t at a given log alpha^2/sigma^2."""
        low, high = (jnp.log(jnp.asarray(s, log_snr.dtype)) for s in (self.sigma_min, self.sigma_max))
        return (-0.5 * log_snr - low) / (high - low)


@_process
class EDM:
    """EDM process: alpha = 1, sigma = t for t in [sigma_min, sigma_max]; prior N(0, sigma_max^2 I).

    Its two numbers are the ends of time and therefore static. Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    sigma_min: float = _static(default=0.002)
    sigma_max: float = _static(default=80.0)

    @property
    def t_min(self) -> float:
        """The smallest noise level."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """The largest noise level."""
        return self.sigma_max

    def marginal(self, t: Array) -> tuple[Array, Array]:
        """Return alpha(t), sigma(t)."""
        return jnp.ones_like(t), t

    def time_at(self, log_snr: Array) -> Array:
        """Return t at a given log alpha^2/sigma^2."""
        return jnp.exp(-0.5 * log_snr)


@_process
class Cosine:
    """Cosine process: tan(angle) = tan(pi t/2) / shift, alpha = cos(angle), sigma = sin(angle); alpha(1) = 0.

    shift = 1 is Nichol & Dhariwal 2021 (arXiv 2102.09672) without its offset, in the continuous form of Salimans & Ho
    2022 (arXiv 2202.00512); shift = 64/d adds noise for images of d pixels a side, log-SNR + 2 log shift (Hoogeboom et
    al. 2023, arXiv 2301.11093, eq. 4).
    """

    shift: float = 1.0
    t_min: float = _static(default=1e-4)
    t_max: float = _static(default=1.0)

    def marginal(self, t: Array) -> tuple[Array, Array]:
        """Return alpha(t), sigma(t)."""
        # sin of the complement: exactly 0 at t = 1, where cos(pi/2) is not.
        signal, noise = self.shift * jnp.sin(0.5 * jnp.pi * (1 - t)), jnp.sin(0.5 * jnp.pi * t)
        norm = jnp.sqrt(signal**2 + noise**2)
        return signal / norm, noise / norm

    def time_at(self, log_snr: Array) -> Array:
        """Return t at a given log alpha^2/sigma^2."""
        return 2 / jnp.pi * jnp.arctan(self.shift * jnp.exp(-0.5 * log_snr))


@_process
class Rectified:
    """Straight paths: x_t = (1 - t) x_0 + t eps, the Gaussian path of flow matching; alpha(1) = 0.

    Liu et al. 2022 (arXiv 2209.03003); Lipman et al. 2022 (arXiv 2210.02747), with data at t = 0.
    """

    t_min: float = _static(default=1e-5)
    t_max: float = _static(default=1.0)

    def marginal(self, t: Array) -> tuple[Array, Array]:
        """Return alpha(t), sigma(t)."""
        return 1 - t, t

    def time_at(self, log_snr: Array) -> Array:
        """Return t at a given log alpha^2/sigma^2."""
        return jax.nn.sigmoid(-0.5 * log_snr)


class Rates(NamedTuple):
    """Marginal coefficients and their time derivatives, each shaped like t."""

    alpha: Array
    sigma: Array
    dalpha: Array
    dsigma: Array


def rates(process: Process, t: Array | float) -> Rates:
    """Return alpha, sigma, d alpha/dt, d sigma/dt at t, by one jvp of the marginal."""
    t = as_floating(t)
    (alpha, sigma), (dalpha, dsigma) = jax.jvp(process.marginal, (t,), (jnp.ones_like(t),))
    return Rates(alpha, sigma, dalpha, dsigma)


def log_snr(process: Process, t: Array | float) -> Array:
    """Return log(alpha^2 / sigma^2) at t; it decreases with t, to -inf where alpha = 0.

    Where it is infinite its derivative is 0.
    """
    alpha, sigma = process.marginal(as_floating(t))
    # A derivative of log at 0 would be infinite, and NaN where it meets the fixed end of a grid.
    log = lambda c: jnp.where(c == 0, -jnp.inf, jnp.log(jnp.where(c == 0, 1, c)))
    return 2 * (log(alpha) - log(sigma))


def time_at(process: Process, log_snr_value: Array | float) -> Array:
    """Return the time in [0, t_max] at which log(alpha^2/sigma^2) has the given value.

    Uses `process.time_at` where there is one, else 64 bisections and one Newton step, which also carries the
    derivatives (the bisection itself is held constant).
    """
    target = as_floating(log_snr_value, "log_snr_value")
    if hasattr(process, "time_at"):
        return jnp.clip(process.time_at(target), 0, process.t_max)

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        too_early = log_snr(process, middle) > target
        return jnp.where(too_early, middle, low), jnp.where(too_early, high, middle)

    ends = jnp.zeros_like(target), jnp.full_like(target, process.t_max)
    t = jax.lax.stop_gradient(jax.lax.fori_loop(0, 64, halve, ends)[1])
    value, slope = jax.jvp(lambda t: log_snr(process, t), (t,), (jnp.ones_like(t),))
    step = (value - target) / jax.lax.stop_gradient(slope)
    # At the ends of time log-SNR may be infinite, and the bracket is already exact.
    return jnp.clip(t - jnp.where(jnp.isfinite(step), step, 0), 0, process.t_max)


def squared_diffusion(process: Process, t: Array | float) -> Array:
    """Return g^2 = 2 sigma (sigma' - alpha'/alpha sigma) at t, infinite where alpha = 0.

    The diffusion of the linear SDE with these marginals: Kingma et al. 2021 (arXiv 2107.00630), eq. 2 in time t; for
    VP, SubVP and VE it is Song et al. 2021's g^2.
    """
    # At t = 0 sigma' may be infinite where g is not (VP: g^2 = beta_min): the limit is taken from above.
    alpha, sigma, dalpha, dsigma = rates(process, jnp.maximum(as_floating(t), 1e-12 * process.t_max))
    return 2 * sigma * (dsigma - dalpha / alpha * sigma)


def perturb(process: Process, x0: Array, eps: Array, t: Array | float) -> Array:
    """Return x_t = alpha_t x_0 + sigma_t eps for x0, eps of shape (batch, *event) and t scalar or (batch,).

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_array(x0, "x0")
    check_like(eps, x0, "eps", "x0")
    alpha, sigma = process.marginal(batch_time(t, x0))
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def prior_std(process: Process) -> Array | float:
    """Return the standard deviation of the prior: `process.prior_std`, or sigma(t_max)."""
    if hasattr(process, "prior_std"):
        return process.prior_std
    return process.marginal(jnp.asarray(process.t_max))[1]


def prior_sample(key: Key, process: Process, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Draw from the prior N(0, prior_std^2 I); shape is (batch, *event), key one key or one per example.

    Raises:
      ValueError: shape has no batch axis or no entries, or keys of another number.
      TypeError: key is not a typed threefry key.
    """
    check_shape(shape)
    noise = normal_like(per_example_keys(key, shape[0]), jax.ShapeDtypeStruct(shape, dtype))
    return expand(prior_std(process), noise) * noise


def prior_log_prob(process: Process, x: Array) -> Array:
    """Return log N(x; 0, prior_std^2 I) in nats, shape (batch,), for x of shape (batch, *event).

    Raises:
      ValueError: x has no batch axis.
      TypeError: x is not floating point.
    """
    check_array(x)
    x = widened(x)
    std = jnp.asarray(prior_std(process), x.dtype)
    size = math.prod(x.shape[1:])
    return -0.5 * sum_event((x / std) ** 2) - size * (jnp.log(std) + 0.5 * math.log(2 * math.pi))
