"""Adaptive Runge-Kutta integration on the device, with one step size and one error norm per example."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff._array import batch_time, call, check_state, expand, full_like_batch, is_concrete, lincomb, mean_event
from jdiff._typing import Array, PyTree
from jdiff.sde import SDE
from jdiff.solvers.ode import check_ode
from jdiff.solvers.tableaus import BOGACKI_SHAMPINE, DORMAND_PRINCE, TSITOURAS, Tableau

__all__ = ["BOGACKI_SHAMPINE", "DORMAND_PRINCE", "TSITOURAS", "Solution", "integrate_adaptive"]

# Proportional-integral step control, Gustafsson 1991 (ACM TOMS 17(4)); exponents over the order of the error estimate.
_PROPORTIONAL, _INTEGRAL = 0.7, 0.4
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
_FIRST_EVALUATIONS = 2


class Solution(NamedTuple):
    """Result of an adaptive solve; statistics have shape (batch,)."""

    x: PyTree
    """State at t1; where `failed`, the last accepted state."""
    evaluations: Array
    """Evaluations of the drift, int32."""
    accepted: Array
    """Accepted steps, int32."""
    failed: Array
    """True where t1 was not reached: too many steps, a step below the resolution of t, or a non-finite drift."""


class _Carry(NamedTuple):
    x: PyTree
    slope: PyTree
    t: Array
    h: Array
    error: Array
    evaluations: Array
    accepted: Array
    active: Array
    failed: Array


def integrate_adaptive(
    ode: SDE,
    x: PyTree,
    t0: Array | float,
    t1: Array | float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    tableau: Tableau = DORMAND_PRINCE,
    max_steps: int = 4096,
    axis_name: str | None = None,
) -> Solution:
    """Integrate an ODE from t0 to t1, in either direction, with a step size for each example of the batch.

    A step is accepted where the error norm is at most 1; the norm of an example is the largest, over the arrays of its
    state, of RMS(error / (atol + rtol max(|x|, |x_new|))). An example's result therefore does not depend on its batch
    mates. All examples advance in one `while_loop`, which ends with the slowest; examples that are done are held.

    Forward-mode derivatives hold the step sizes constant; reverse mode needs a fixed grid (`integrate`) or an adjoint
    (`to_diffrax`).

    Args:
      ode: drift only.
      x: state at t0, arrays of shape (batch, *event).
      t0: start, scalar or (batch,).
      t1: end, scalar or (batch,).
      rtol: relative tolerance.
      atol: absolute tolerance.
      tableau: a pair with an error estimate (BOGACKI_SHAMPINE, DORMAND_PRINCE, TSITOURAS).
      max_steps: cap on the steps of one example, accepted and rejected; reaching it sets `failed`.
      axis_name: inside shard_map or pmap, for a drift that itself communicates: all devices then do the same number of
        iterations.

    Returns:
      Solution(x, evaluations, accepted, failed).

    Raises:
      ValueError: tolerances or max_steps not positive, an ODE with a diffusion, a tableau without an error estimate, t0
        = t1.
      TypeError: x is not floating point.
    """
    check_state(x)
    check_ode(ode)
    check_tolerances(rtol, atol)
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if tableau.error is None or not tableau.fsal:
        raise ValueError("the tableau must have an error estimate and its last stage first in the next step (fsal)")
    t0, t1 = batch_time(t0, x), batch_time(t1, x)
    if is_concrete(t0) and is_concrete(t1) and bool((t0 == t1).any()):
        raise ValueError("t0 and t1 must differ")
    # Adding a zero of x makes every carry vary over devices as x does, which shard_map checks, whatever the drift is.
    zero = sum(full_like_batch(leaf, 0).astype(t0.dtype) for leaf in jax.tree.leaves(x))
    t0, t1 = t0 + zero, t1 + zero
    x = _add(x, zero)
    direction = jnp.sign(t1 - t0)
    exponent, eps = 1 / tableau.order, jnp.finfo(t0.dtype).eps

    def norm(error, x, x_new):
        def leaf(e, a, b):
            scale = atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))
            return jnp.sqrt(mean_event((e / scale).astype(t0.dtype) ** 2))

        ratios = [leaf(*leaves) for leaves in zip(*(jax.tree.leaves(tree) for tree in (error, x, x_new)))]
        largest = jax.lax.stop_gradient(jnp.max(jnp.stack(ratios), axis=0))
        # A non-finite stage is an error too large to accept, not a NaN to carry.
        return jnp.where(jnp.isfinite(largest), largest, jnp.inf)

    def drift(x, t):
        return _add(call(ode.drift, x, t), zero)

    slope, h = _first_step(drift, tableau, norm, x, t0, t1, direction)
    # Where the first slope is not finite no step is small enough.
    sound = jnp.all(jnp.stack([_finite(leaf) for leaf in jax.tree.leaves(slope)]), axis=0)
    counter = zero.astype(jnp.int32)

    def any_active(carry):
        anyone = jnp.any(carry.active)
        return anyone if axis_name is None else jax.lax.pmax(anyone.astype(jnp.int32), axis_name) > 0

    def body(carry):
        remaining = t1 - carry.t
        # Take the end exactly, and do not leave a sliver behind it.
        last = jnp.abs(remaining) <= 1.01 * jnp.abs(carry.h)
        h = jnp.where(carry.active, jnp.where(last, remaining, carry.h), 0)
        slopes = _stages(drift, tableau, carry.x, carry.t, h, carry.slope)
        x_new = lincomb((1.0, carry.x), (h, _weighted(tableau.b, slopes)))
        error = norm(lincomb((h, _weighted(tableau.error, slopes))), carry.x, x_new)
        accept = carry.active & (error <= 1)
        safe = jnp.clip(error, 1e-8, 1e8)
        factor = _SAFETY * safe ** (-_PROPORTIONAL * exponent) * carry.error ** (_INTEGRAL * exponent)
        # After a rejection the integral term speaks of another step: use the error alone, and never grow.
        shrink = jnp.clip(_SAFETY * safe**-exponent, _SHRINK, _SAFETY)
        factor = jnp.where(accept, jnp.clip(factor, _SHRINK, _GROW), shrink)
        h_next = jax.lax.stop_gradient(h * factor)
        t_new = jnp.where(accept, jnp.where(last, t1, carry.t + h), carry.t)
        # Near t = 0 times are fine without end: a step of eps^2 of the way is taken for none.
        resolution = 4 * eps * jnp.maximum(jnp.abs(carry.t), eps * jnp.abs(t1 - t0))
        evaluations = carry.evaluations + jnp.where(carry.active, len(tableau.b) - 1, 0)
        stuck = carry.active & ~accept & (jnp.abs(h_next) < resolution)
        full = evaluations >= _FIRST_EVALUATIONS + (len(tableau.b) - 1) * max_steps
        arrived = accept & last
        failed = carry.failed | stuck | (carry.active & full & ~arrived)
        return _Carry(
            x=_select(accept, x_new, carry.x),
            slope=_select(accept, jax.tree.map(lambda k: k[-1], slopes), carry.slope),
            t=t_new,
            h=jnp.where(carry.active, h_next, carry.h),
            error=jnp.where(accept, jax.lax.stop_gradient(jnp.maximum(safe, 1e-4)), carry.error),
            evaluations=evaluations,
            accepted=carry.accepted + accept.astype(jnp.int32),
            active=carry.active & ~arrived & ~failed,
            failed=failed,
        )

    start = _Carry(
        x=x,
        slope=slope,
        t=t0,
        h=h,
        error=jnp.ones_like(t0),
        evaluations=counter + _FIRST_EVALUATIONS,
        accepted=counter,
        active=sound,
        failed=~sound,
    )
    end = jax.lax.while_loop(any_active, body, start)
    return Solution(end.x, end.evaluations, end.accepted, end.failed)


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise ValueError unless both tolerances, where their values are known, are positive and finite."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if is_concrete(value) and not 0 < float(value) < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _first_step(drift, tableau, norm, x, t0, t1, direction):
    """Return the first slope and a first step per example (Hairer, Norsett & Wanner 1993, section II.4)."""
    zeros = jax.tree.map(jnp.zeros_like, x)

    def length(slope):
        size, speed = norm(x, x, zeros), norm(slope, x, zeros)
        small = (size < 1e-5) | (speed < 1e-5) | ~jnp.isfinite(speed)
        h = jnp.minimum(jnp.where(small, 1e-6, 0.01 * size / jnp.where(small, 1, speed)), jnp.abs(t1 - t0))
        return h, speed

    # The slope at t0 and the one a little ahead, as two turns of a loop: the drift is compiled once.
    def turn(n, slopes):
        h = n * length(slopes[0])[0] * direction
        slope = drift(lincomb((1.0, x), (h, slopes[0])), t0 + h)
        return jax.tree.map(lambda new, old: jnp.where(n == 0, new, old), slope, slopes[0]), slope

    slope, ahead = jax.lax.fori_loop(0, _FIRST_EVALUATIONS, turn, (zeros, zeros))
    h0, speed = length(slope)
    bend = norm(lincomb((1.0, ahead), (-1.0, slope)), x, zeros) / h0
    largest = jnp.maximum(speed, bend)
    flat = (largest <= 1e-15) | ~jnp.isfinite(largest)
    h1 = jnp.where(flat, jnp.maximum(1e-6, h0 * 1e-3), (0.01 / jnp.where(flat, 1, largest)) ** (1 / tableau.order))
    h = jnp.minimum(jnp.minimum(100 * h0, h1), jnp.abs(t1 - t0))
    return slope, jax.lax.stop_gradient(h * direction)


def _stages(drift, tableau, x, t, h, first):
    """Return the slopes of one step, stacked along a new first axis; `first` is known.

    A loop over the stages, so that the drift is compiled once and not once a stage: that is most of the compile time.
    """
    count = len(tableau.b)
    table = np.zeros((count, count))
    for i, row in enumerate(tableau.a):
        table[i + 1, : i + 1] = row
    rows, c = jnp.asarray(table, t.dtype), jnp.asarray(tableau.c, t.dtype)
    slopes = jax.tree.map(lambda k: jnp.zeros_like(k, shape=(count, *k.shape)).at[0].set(k), first)

    def stage(i, slopes):
        slope = drift(lincomb((1.0, x), (h, _weighted(rows[i], slopes))), t + c[i] * h)
        return jax.tree.map(lambda all_, k: all_.at[i].set(k), slopes, slope)

    return jax.lax.fori_loop(1, count, stage, slopes)


def _weighted(weights, slopes):
    """Return sum_i weights_i slopes_i. Not a dot product: accelerators would round its inputs."""

    def leaf(k):
        w = jnp.asarray(weights, k.dtype).reshape(-1, *(1,) * (k.ndim - 1))
        return jnp.sum(w * k, axis=0)

    return jax.tree.map(leaf, slopes)


def _add(x, zero):
    return jax.tree.map(lambda leaf: leaf + expand(zero, leaf), x)


def _finite(x):
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


def _select(where, new, old):
    return jax.tree.map(lambda a, b: jnp.where(expand(where, a).astype(bool), a, b), new, old)
