"""Exact log-likelihoods by the instantaneous change of variables along the probability flow.

d log p_t(x_t)/dt = -div v(x_t, t) (Chen et al. 2018, arXiv 1806.07366, theorem 1), so
log p_tmin(x) = log p_tmax(z) + int div v dt, with z the latent at t_max (Song et al. 2021, arXiv 2011.13456, eq. 39).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import processes
from jdiff._array import check_per_example, coefficient_dtype, flat, is_concrete
from jdiff._divergence import Divergence, check_divergence, check_points, directions, value_and_products
from jdiff._typing import Array, Field, Key, Kind, Process
from jdiff.sde import SDE, NoiseTime, in_noise_time, noise_time, probability_flow
from jdiff.solvers.adaptive import integrate_adaptive
from jdiff.solvers.tableaus import DORMAND_PRINCE, Tableau

__all__ = ["Divergence", "LogLikelihood", "log_likelihood"]


class LogLikelihood(NamedTuple):
    """Per-example results, shape (batch,) but for `latent`."""

    log_prob: Array
    """log p_tmin(x) in nats; NaN where `failed`."""
    latent: Array
    """The latent z at t_max, shape of x."""
    evaluations: Array
    """Evaluations of drift and divergence, int32."""
    probe_error: Array
    """Standard error over probes in nats; NaN for a single random probe, 0 for the exact divergence."""
    failed: Array
    """True where the integration did not reach t_max or met a non-finite value."""


def log_likelihood(
    key: Key | None,
    process: Process,
    field: Field,
    x: Array,
    *,
    predict: Kind = "score",
    divergence: Divergence = "rademacher",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    tableau: Tableau = DORMAND_PRINCE,
    max_steps: int = 4096,
    variable: Literal["t"] | NoiseTime = "t",
    t_min: float | None = None,
    prior_log_prob: Callable[[Array], Array] | None = None,
    axis_name: str | None = None,
) -> LogLikelihood:
    """Return log p(x) of a model given by a field of any kind, for each example of a batch.

    Drift and divergence come from one linearised pass (a jvp), never a forward and a backward. Each probe is fixed
    along the trajectory: the estimator is E_e[e . (dv/dx) e] (Hutchinson 1990; Grathwohl et al. 2019, arXiv
    1810.01367). The error norm of an example is the joint one of x and its log-determinants in nats.

    Args:
      key: one key or one per example; may be None for divergence="exact".
      process: the forward process.
      field: (x, t) -> prediction.
      x: data in model space, shape (batch, *event).
      predict: kind of the field.
      divergence: "rademacher" or "gaussian" probes, or "exact": all D basis vectors (D forward derivatives per
        evaluation, 16 at a time).
      probes: number of probes; the estimates are averaged and their spread is returned.
      rtol: relative tolerance of the adaptive solver.
      atol: absolute tolerance.
      tableau: the Runge-Kutta pair.
      max_steps: cap on steps per example; reaching it sets `failed`.
      variable: time in which the solver steps: t, or one of `jdiff.sde.in_noise_time`. "log_snr" and "asinh" often need
        half the evaluations or less, and are not there where alpha(t_max) = 0 (Rectified, Cosine).
      t_min: where the density is evaluated (default: process.t_min).
      prior_log_prob: z -> log-density at t_max, shape (batch,) (default: the process's prior).
      axis_name: see `integrate_adaptive`.

    Returns:
      LogLikelihood(log_prob, latent, evaluations, probe_error, failed).

    Raises:
      ValueError: unknown divergence, kind or variable, a variable that is infinite at t_min or t_max, probes < 1,
        tolerances <= 0, t_min outside [0, t_max), keys that do not fit.
      TypeError: x not floating point or below float32, keys not typed threefry keys.
    """
    x = check_points(x)
    batch = len(x)
    check_divergence(key, divergence, probes)
    if variable not in (variables := ("t", *get_args(NoiseTime))):
        raise ValueError(f"unknown variable {variable!r}; choose one of {', '.join(variables)}")
    t_min = process.t_min if t_min is None else t_min
    if not 0 <= t_min < process.t_max:
        raise ValueError(f"t_min must be in [0, {process.t_max}), got {t_min}")

    flow = probability_flow(process, field, predict=predict)
    tangents = directions(key, x, divergence, probes)

    def augmented(state, t):
        x, _ = state
        velocity, traces = value_and_products(lambda x: flow.drift(x, t), x, tangents)
        if divergence == "exact":
            traces = jnp.sum(traces, axis=1, keepdims=True)
        return velocity, traces

    # One column per probe; zeros made from x vary over devices as x does.
    logdet = jnp.zeros_like(x, shape=(batch, probes)) + 0 * flat(x)[:, :1]
    ode = SDE(augmented)
    ends: tuple[Array | float, Array | float] = t_min, process.t_max
    if variable != "t":
        # A process that is no pytree is its own leaf, and its numbers may be traced.
        numbers = int | float | np.generic | np.ndarray | jax.Array
        known = all(isinstance(leaf, numbers) and is_concrete(leaf) for leaf in jax.tree.leaves(process))
        with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
            start, stop = (noise_time(process, jnp.asarray(t, coefficient_dtype(x)), variable) for t in ends)
            ends = start, stop
        if all(map(is_concrete, ends)) and not np.isfinite(ends).all():
            raise ValueError(
                f"variable={variable!r} is not finite from t = {t_min} to {process.t_max}, where alpha or sigma is 0: "
                "integrate this process in 't' or 'angle'"
            )
        ode = in_noise_time(process, ode, variable)
    solution = integrate_adaptive(
        ode,
        (x, logdet),
        *ends,
        rtol=rtol,
        atol=atol,
        tableau=tableau,
        max_steps=max_steps,
        norm="joint",
        axis_name=axis_name,
    )
    latent, logdet = solution.x
    if prior_log_prob is None:
        end = processes.prior_log_prob(process, latent)
    else:
        end = check_per_example(prior_log_prob(latent), batch, "prior_log_prob")
    log_prob = end + jnp.mean(logdet, axis=1)
    failed = solution.failed | ~jnp.isfinite(log_prob)
    if divergence == "exact":
        probe_error = jnp.zeros_like(log_prob)
    elif probes == 1:
        probe_error = jnp.full_like(log_prob, jnp.nan)
    else:
        probe_error = jnp.std(logdet, axis=1, ddof=1) / math.sqrt(probes)
    return LogLikelihood(jnp.where(failed, jnp.nan, log_prob), latent, solution.evaluations, probe_error, failed)
