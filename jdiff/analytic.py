"""Data distributions whose diffusion is known in closed form: tests, documentation and benchmarks lean on them.

Each returns an `Analytic`: exact fields at every t, the exact log-density of x_t, and exact data samples. Its functions
raise ValueError for shapes and TypeError for kinds of numbers that do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm

from jdiff._array import batch_time, check_array, expand, per_example_keys, sum_event
from jdiff._typing import Array, Field, Key, Process

__all__ = ["Analytic", "correlated_gaussian", "gaussian", "gaussian_mixture"]


class Analytic(NamedTuple):
    """Exact functions of a data distribution under a process."""

    denoise: Field
    """(x, t) -> E[x_0 | x_t = x], the exact x0-field."""
    score: Field
    """(x, t) -> grad log p_t(x)."""
    log_prob: Callable[[Array, Array], Array]
    """(x, t) -> log p_t(x) in nats, shape (batch,)."""
    flow: Callable[[Array, Array, Array], Array]
    """(x, t, s) -> where the probability flow takes x from time t to time s."""
    sample: Callable[[Key, int], Array]
    """(key, batch) -> data x_0, shape (batch, *event)."""


def gaussian(process: Process, mean: Array, std: Array | float) -> Analytic:
    """Return the closed forms for x_0 ~ N(mean, diag(std^2)), mean of shape *event, std a scalar or of that shape.

    With s_t^2 = alpha^2 std^2 + sigma^2: x_t ~ N(alpha mean, s_t^2), E[x_0 | x_t] = mean + alpha std^2 (x_t - alpha
    mean) / s_t^2, and the flow keeps (x_t - alpha mean) / s_t (the drift is linear and elementwise).

    Raises:
      ValueError: from the functions, x whose event is not of mean's shape.
    """
    mean = jnp.asarray(mean)
    std = jnp.broadcast_to(jnp.asarray(std, mean.dtype), mean.shape)

    def moments(x, t):
        check_array(x)
        if x.shape[1:] != mean.shape:
            raise ValueError(f"x must have shape (batch, *event) with event {mean.shape}, got {x.shape}")
        alpha, sigma = (expand(c, x) for c in process.marginal(batch_time(t, x)))
        m, d = mean[None].astype(x.dtype), std[None].astype(x.dtype)
        return alpha, alpha * m, jnp.sqrt((alpha * d) ** 2 + sigma**2)

    def denoise(x, t):
        alpha, center, spread = moments(x, t)
        return mean[None].astype(x.dtype) + alpha * std[None].astype(x.dtype) ** 2 * (x - center) / spread**2

    def score(x, t):
        _, center, spread = moments(x, t)
        return -(x - center) / spread**2

    def log_prob(x, t):
        _, center, spread = moments(x, t)
        z = jnp.broadcast_to((x - center) / spread, x.shape)
        return sum_event(-0.5 * z**2 - jnp.broadcast_to(jnp.log(spread), x.shape) - 0.5 * math.log(2 * math.pi))

    def flow(x, t, s):
        _, center, spread = moments(x, t)
        _, center_s, spread_s = moments(x, s)
        return center_s + spread_s * (x - center) / spread

    def sample(key, batch):
        keys = per_example_keys(key, batch)
        return jax.vmap(lambda k: mean + std * jax.random.normal(k, mean.shape, mean.dtype))(keys)

    return Analytic(denoise, score, log_prob, flow, sample)


def correlated_gaussian(process: Process, mean: Array, covariance: Array) -> Analytic:
    """Return the closed forms for x_0 ~ N(mean, covariance), mean (D,), covariance (D, D): `gaussian` along its axes.

    Raises:
      ValueError: shapes that do not fit.
    """
    mean, covariance = jnp.asarray(mean), jnp.asarray(covariance)
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise ValueError(f"mean (D,) and covariance (D, D) are needed, got {mean.shape} and {covariance.shape}")
    variances, axes = jnp.linalg.eigh(covariance)

    def product(x, matrix):
        check_array(x)
        if x.shape[1:] != mean.shape:
            raise ValueError(f"x must have shape (batch, D) with D = {len(mean)}, got {x.shape}")
        return jnp.matmul(x, matrix.astype(x.dtype), precision="highest")

    turn, back = (lambda x: product(x, axes)), (lambda x: product(x, axes.T))
    own = gaussian(process, product(mean[None], axes)[0], jnp.sqrt(jnp.maximum(variances, 0)))
    return Analytic(
        denoise=lambda x, t: back(own.denoise(turn(x), t)),
        score=lambda x, t: back(own.score(turn(x), t)),
        log_prob=lambda x, t: own.log_prob(turn(x), t),
        flow=lambda x, t, s: back(own.flow(turn(x), t, s)),
        sample=lambda key, batch: back(own.sample(key, batch)),
    )


def gaussian_mixture(process: Process, weights: Array, means: Array, stds: Array | float) -> Analytic:
    """Return the closed forms for x_0 ~ sum_k weights_k N(means_k, stds_k^2 I).

    means has shape (components, *event), stds is a scalar or (components,). The flow is known in closed form for events
    of one entry only, by matching the cumulative distributions of x_t and x_s (bisection to the last digit).

    Raises:
      ValueError: weights do not match means; from the functions, x of another event; from `flow`, events of more than
        one entry.
    """
    means = jnp.asarray(means)
    weights = jnp.asarray(weights, means.dtype)
    if weights.shape != means.shape[:1]:
        raise ValueError(f"weights must have shape {means.shape[:1]} (one per row of means), got {weights.shape}")
    log_weights = jnp.log(weights / jnp.sum(weights))
    stds = jnp.broadcast_to(jnp.asarray(stds, means.dtype), weights.shape)
    event = means.shape[1:]
    size = math.prod(event)

    def moments(x, t):
        """Return alpha (batch, 1), centers (batch, K, *event), spreads (batch, K)."""
        check_array(x)
        if x.shape[1:] != event:
            raise ValueError(f"x must have shape (batch, *event) with event {event}, got {x.shape}")
        alpha, sigma = (c[:, None].astype(x.dtype) for c in process.marginal(batch_time(t, x)))
        centers = alpha.reshape(-1, 1, *(1,) * len(event)) * means[None].astype(x.dtype)
        return alpha, centers, jnp.sqrt((alpha * stds[None].astype(x.dtype)) ** 2 + sigma**2)

    def log_joint(x, t):
        """Return log(weight_k N_k(x_t)), shape (batch, K), and x - centers."""
        _, centers, spreads = moments(x, t)
        offsets = x[:, None] - centers
        square = jnp.sum(offsets.reshape(*offsets.shape[:2], size) ** 2, axis=-1)
        log_density = -0.5 * square / spreads**2 - size * (jnp.log(spreads) + 0.5 * math.log(2 * math.pi))
        return log_weights[None].astype(x.dtype) + log_density, offsets

    def average(x, t, of):
        """Average of(k) over the posterior of the component; of has shape (batch, K, *event)."""
        posterior = jax.nn.softmax(log_joint(x, t)[0], axis=1)
        return jnp.sum(posterior.reshape(posterior.shape + (1,) * len(event)) * of, axis=1)

    def per_component(c, like):
        return c.reshape(c.shape + (1,) * (like.ndim - 2))

    def denoise(x, t):
        alpha, _, spreads = moments(x, t)
        offsets = log_joint(x, t)[1]
        gain = alpha * stds[None].astype(x.dtype) ** 2 / spreads**2
        return average(x, t, means[None].astype(x.dtype) + per_component(gain, offsets) * offsets)

    def score(x, t):
        _, _, spreads = moments(x, t)
        offsets = log_joint(x, t)[1]
        return average(x, t, -offsets / per_component(spreads**2, offsets))

    def log_prob(x, t):
        return logsumexp(log_joint(x, t)[0], axis=1)

    def flow(x, t, s):
        if size != 1:
            raise ValueError(
                f"the flow of a mixture has a closed form for events of one entry, got event shape {event}"
            )
        shape, x = x.shape, x.reshape(-1, 1)

        def log_odds(x, t):
            """The logit of the cumulative distribution: digits in both tails."""
            _, centers, spreads = moments(x.reshape(shape), t)
            z = (x - centers.reshape(spreads.shape)) / spreads
            w = log_weights[None].astype(x.dtype)
            return (logsumexp(w + norm.logcdf(z), axis=1) - logsumexp(w + norm.logcdf(-z), axis=1))[:, None]

        target = log_odds(x, t)
        _, centers, spreads = moments(x.reshape(shape), s)
        reach = 40 * jnp.max(spreads, axis=1, keepdims=True)
        centers = centers.reshape(spreads.shape)
        ends = jnp.min(centers, axis=1, keepdims=True) - reach, jnp.max(centers, axis=1, keepdims=True) + reach

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            below = log_odds(middle, s) < target
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, 80, halve, ends)
        return (0.5 * (low + high)).reshape(shape)

    def sample(key, batch):
        def one(key):
            pick, draw = jax.random.split(key)
            k = jax.random.categorical(pick, log_weights)
            return means[k] + stds[k] * jax.random.normal(draw, event, means.dtype)

        return jax.vmap(one)(per_example_keys(key, batch))

    return Analytic(denoise, score, log_prob, flow, sample)
