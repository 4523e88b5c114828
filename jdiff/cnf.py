"""Continuous normalising flows by maximum likelihood: -log p(x) of a velocity field on a grid, made to be trained.

In one state with x run the log-determinant, dl/dt = div v (Chen et al. 2018, arXiv 1806.07366; FFJORD, Grathwohl et al.
2019, arXiv 1810.01367), and the two regularisers of RNODE (Finlay et al. 2020, arXiv 2002.02798).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import processes
from jdiff._array import batch_time, check_grid, check_per_example, flat, is_concrete, lincomb, sum_event
from jdiff._divergence import Divergence, check_divergence, check_points, directions, trace, value_and_products
from jdiff._typing import Array, Field, Key, Kind, Process
from jdiff.sde import probability_flow
from jdiff.solvers.tableaus import RK4, Tableau

__all__ = ["Terms", "maximum_likelihood"]


class Terms(NamedTuple):
    """Per-example terms of the loss, shape (batch,)."""

    nll: Array
    """-log p(x) in nats."""
    kinetic: Array
    """int |v|^2 dt along the trajectory."""
    jacobian: Array
    """int |dv/dx|_F^2 dt along it, of the same directions as the divergence: with probes E |(dv/dx) e|^2."""


def maximum_likelihood(
    key: Key | None,
    process: Process,
    field: Field,
    x: Array,
    ts: Array,
    *,
    predict: Kind = "velocity",
    divergence: Divergence = "rademacher",
    probes: int = 1,
    tableau: Tableau = RK4,
    gradient: Literal["adjoint", "discrete"] = "adjoint",
    prior_log_prob: Callable[[Array], Array] | None = None,
) -> Terms:
    """Return -log p(x) = -log p_prior(z) - int div v dt and the regularisers, for each example, to be differentiated.

    The flow carries x at ts[0] to z at ts[-1] by a fixed-step Runge-Kutta method; a probe is fixed along its
    trajectory. `log_likelihood` evaluates the same density to a tolerance. To train, minimise the mean of nll +
    a kinetic + b jacobian (Finlay et al. 2020, section 4: both 0.01 there).

    Reverse mode by `gradient`: "adjoint" solves x and the adjoint equation d(lambda)/dt = -(d(v, rates)/dx)^T lambda
    backwards on the same grid (Pontryagin 1962; Chen et al. 2018, alg. 1), in memory that does not grow with the steps
    and at an error of the method's order; "discrete" is the exact gradient of the discretised loss and stores x at each
    step. Both evaluate the field as often. Values closed over by the field have gradients; forward mode, and
    derivatives by ts, are for "discrete".

    Args:
      key: one key or one per example; may be None for divergence="exact".
      process: whose prior the flow ends in; `Rectified()` has N(0, I) at t = 1, and its velocity field is any function.
      field: (x, t) -> prediction.
      x: data in model space, shape (batch, *event).
      ts: increasing times from the data's end, such as process.t_min, to process.t_max, shape (steps + 1,).
      predict: kind of the field.
      divergence: "rademacher" or "gaussian" probes, or "exact".
      probes: number of probes, averaged.
      tableau: the Runge-Kutta method.
      gradient: see above.
      prior_log_prob: z -> log-density at t_max, shape (batch,) (default: the process's prior).

    Raises:
      ValueError: unknown divergence, kind or gradient, probes < 1, a grid that does not increase to t_max, keys that do
        not fit.
      TypeError: x not floating point or below float32, keys not typed threefry keys.
    """
    x = check_points(x)
    check_divergence(key, divergence, probes)
    if gradient not in ("adjoint", "discrete"):
        raise ValueError(f"unknown gradient {gradient!r}; choose 'adjoint' or 'discrete'")
    check_grid(ts, decreasing=False)
    if is_concrete(ts) and not np.isclose(last := np.asarray(ts)[-1], process.t_max):
        raise ValueError(f"ts must end at the prior's time t_max = {process.t_max}, got {last}")
    drift = probability_flow(process, field, predict=predict).drift
    tangents = directions(key, x, divergence, probes)
    ts, exact = jnp.asarray(ts, x.dtype), divergence == "exact"
    # Zeros made from values vary over devices as these do.
    zeros = jnp.zeros((len(x), 3), x.dtype) + 0 * flat(x)[:, :1]
    if gradient == "discrete":
        z, totals = _integrate(_rates(drift, tangents, exact=exact), tableau, x, zeros, ts)
    else:
        drift, values, constants = _hoisted(drift, x, jnp.broadcast_to(ts[0], x.shape[:1]))
        z, totals = _adjoint(drift, tableau, exact, (x, zeros), values, (constants, tangents, ts))
    if prior_log_prob is None:
        end = processes.prior_log_prob(process, z)
    else:
        end = check_per_example(prior_log_prob(z), len(x), "prior_log_prob")
    log_det, kinetic, jacobian = totals.T
    return Terms(-end - log_det, kinetic, jacobian)


def _rates(drift, tangents, *, exact):
    """Return (x, t) -> (v, rates of the totals), these of shape (batch, 3): div v, |v|^2 and |dv/dx|_F^2."""
    reduce = jnp.sum if exact else jnp.mean

    def rates(x, t):
        t = batch_time(t, x)
        products = lambda e, derivative: (trace(e, derivative), sum_event(derivative**2))
        velocity, (traces, norms) = value_and_products(lambda x: drift(x, t), x, tangents, products)
        found = reduce(traces, axis=1), sum_event(velocity**2), reduce(norms, axis=1)
        return velocity, jnp.stack(found, axis=1)

    return rates


def _integrate(rates, tableau, state, totals, ts):
    """Return state and totals at ts[-1]; rates(state, t) are those of both, and do not depend on the totals.

    Stages are turns of a loop, so that the field is compiled once, not once a stage. Each step is recomputed when
    differentiated.
    """
    count = len(tableau.b)
    rows, b, c = (jnp.asarray(numbers, ts.dtype) for numbers in (tableau.matrix, tableau.b, tableau.c))

    def moved(state, h, weights, slopes):
        def leaf(x, k):
            w = (h * weights).astype(x.dtype).reshape(-1, *(1,) * x.ndim)
            return x + jnp.sum(w * k, axis=0)

        return jax.tree.map(leaf, state, slopes)

    @jax.checkpoint
    def step(carry, ends):
        state, totals = carry
        t, h = ends[0], ends[1] - ends[0]

        def stage(carry, inputs):
            slopes, totals = carry
            i, row, b, c = inputs
            slope, found = rates(moved(state, h, row, slopes), t + c * h)
            slopes = jax.tree.map(lambda all_, k: all_.at[i].set(k), slopes, slope)
            return (slopes, lincomb((1.0, totals), (h * b, found))), None

        slopes = jax.tree.map(lambda x: jnp.zeros_like(x, shape=(count, *x.shape)) + 0 * x[None], state)
        (slopes, totals), _ = jax.lax.scan(stage, (slopes, totals), (jnp.arange(count), rows, b, c))
        return (moved(state, h, b, slopes), totals), None

    return jax.lax.scan(step, (state, totals), (ts[:-1], ts[1:]))[0]


def _hoisted(drift, x, t):
    """Return drift(x, t, values, constants), and what it closed over: floating-point values, and all else.

    `jax.closure_convert` leaves integers, such as labels, in the closure, out of which an enclosing scan's would leak.
    """
    traced = jax.make_jaxpr(drift)(x, t)
    floating = [jnp.issubdtype(value.dtype, jnp.floating) for value in traced.consts]

    def converted(x, t, values, constants):
        values, constants = iter(values), iter(constants)
        closed_over = [next(values) if is_float else next(constants) for is_float in floating]
        return jax.core.eval_jaxpr(traced.jaxpr, closed_over, x, t)[0]

    split = ([value for value, is_float in zip(traced.consts, floating) if is_float == wanted] for wanted in (1, 0))
    return converted, *split


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _adjoint(drift, tableau, exact, start, values, constants):
    """Integrate x and the totals over the grid; differentiated by the adjoint equation in x and the values."""
    x, totals = start
    return _integrate(_closed(drift, exact, values, constants), tableau, x, totals, constants[-1])


def _closed(drift, exact, values, constants):
    constants, tangents, _ = constants
    return _rates(lambda x, t: drift(x, t, values, constants), tangents, exact=exact)


def _forwards(drift, tableau, exact, start, values, constants):
    end = _adjoint(drift, tableau, exact, start, values, constants)
    return end, (end[0], values, constants)


def _backwards(drift, tableau, exact, residuals, cotangents):
    z, values, constants = residuals
    of_z, of_totals = cotangents  # that of the totals is constant in time

    def rates(state, t):
        x, of_x = state
        forwards = lambda x, values: _closed(drift, exact, values, constants)(x, t)
        (velocity, _), pull = jax.vjp(forwards, x, values)
        slope, of_values = jax.tree.map(jnp.negative, pull((of_x, of_totals)))
        return (velocity, slope), of_values

    zeros = jax.tree.map(lambda value: 0 * value, values)
    (_, of_x), of_values = _integrate(rates, tableau, (z, of_z), zeros, constants[-1][::-1])
    return (of_x, of_totals), of_values, None


_adjoint.defvjp(_forwards, _backwards)
