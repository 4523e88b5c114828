"""Control of the state: parts of x_t replaced on the way, starts from a given x_0, changes in the flow's latent."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jdiff._array import (
    batch_time,
    call,
    check_array,
    check_count,
    check_grid,
    check_like,
    coefficient_dtype,
    expand,
    flat,
    fold_in,
    lincomb,
    per_example_keys,
    root,
    scalars,
    select,
    sum_event,
    widened,
)
from jdiff._typing import Array, Field, Key, Process
from jdiff.operators import LinearOperator, check_example, diagonal
from jdiff.processes import perturb
from jdiff.solvers.base import Noise, Solver, integrate, white

__all__ = ["edit_latent", "repaint", "replacement", "sdedit", "slerp"]


def replacement(
    process: Process,
    solver: Solver,
    operator: LinearOperator,
    y: Array,
    std: Array | float = 0.0,
    *,
    noise: Noise = white,
) -> Solver:
    """Return a solver whose every step ends with the measured part of x_s replaced by y brought to time s.

    y_s = alpha_s y + sqrt(sigma_s^2 A A^T - alpha_s^2 std^2) z has the law of A x_s given x_0 (with y's noise), and

    x_s <- x_s + A^T (A A^T)^-1 (y_s - A x_s),

    left alone where that variance is negative (y says less than the state) and where nothing is measured. Song et al.
    2021 (arXiv 2011.13456), appendix I.2, for inpainting (where A A^T is the mask), colour and any A with diagonal
    A A^T. Biased: what is replaced hears nothing of the rest, and the rest of y only through x_s (docs/control.md).

    Args:
      process: the forward process.
      solver: of the unguided field, for decreasing t.
      operator: A, with its diagonal.
      y: the measurements; 0 where a mask hides them.
      std: of their noise, scalar or (batch,).
      noise: where unit normals come from.

    Raises:
      ValueError: an operator whose A A^T is not diagonal.
    """
    put = _replacing(process, operator, y, std, noise)

    def step(keys, state, t, s):
        state = solver.step(_fold(keys, 0), state, t, s)
        return state._replace(x=put(_fold(keys, 1), state.x, s))

    return Solver(solver.init, step, solver.order)


def repaint(
    key: Key,
    process: Process,
    solver: Solver,
    operator: LinearOperator,
    y: Array,
    x: Array,
    ts: Array,
    std: Array | float = 0.0,
    *,
    resamples: int = 10,
    jump: int = 10,
    noise: Noise = white,
) -> Array:
    """Return what `replacement` makes of x at ts[0] when every `jump` steps are gone `resamples` times.

    After each time but the last the state goes back by noise, x_t = alpha_t / alpha_s x_s + sqrt(sigma_t^2 - (alpha_t
    sigma_s / alpha_s)^2) z, so that what was replaced and what was not come to agree. Lugmayr et al. 2022 (arXiv
    2201.09865), alg. 1 with their jumps, which go back by one draw, as the law of several is. Where y is noisy, an
    example goes once only along stretches at whose end y says less than the state and is not written any more: going
    them again would forget it. Steps: (len(ts) - 1) resamples, in one `lax.scan`.

    Args:
      key: one key, or one per example, shape (batch,).
      process: the forward process.
      solver: of the unguided field, a one-step method.
      operator: A, with its diagonal.
      y: the measurements; 0 where a mask hides them.
      x: initial state at ts[0], from the prior.
      ts: decreasing times.
      std: of the measurements' noise, scalar or (batch,).
      resamples: how often each stretch is gone.
      jump: its length in steps.
      noise: where unit normals come from.

    Raises:
      ValueError: an operator whose A A^T is not diagonal, resamples or jump < 1, a grid that does not decrease, a
        solver with memory.
    """
    check_count(resamples, "resamples")
    check_count(jump, "jump")
    check_grid(ts, decreasing=True)
    keys = per_example_keys(key, check_array(x))
    check_example(x, operator)
    check_array(y, "y")
    if len(y) != len(x):
        raise ValueError(f"y must have the batch of x, {len(x)}, got shape {y.shape}")
    down = replacement(process, solver, operator, y, std, noise=noise).step
    std = jnp.asarray(std, coefficient_dtype(x))

    def back(keys, state, s, t):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = (process.marginal(batch_time(u, x)) for u in (s, t))
        ratio = alpha_t / alpha_s
        z = noise(keys, state.x, s, t)
        spread = root(sigma_t**2 - (ratio * sigma_s) ** 2)
        return state._replace(x=lincomb((ratio, state.x), (spread, z)))

    def move(state, inputs):
        n, t, s, end, again = inputs
        alpha, sigma = process.marginal(batch_time(end, x))
        written = sigma**2 * largest >= (alpha * std) ** 2
        moved = jax.lax.cond(s < t, down, back, fold_in(keys, n), state, t, s)
        return moved._replace(x=select(written | ~again, moved.x, state.x)), None

    start = solver.init(x)
    if jax.tree.leaves(start.memory):
        raise ValueError("repaint needs a solver without memory: what it remembers is gone after a jump")
    gram = jnp.broadcast_to(diagonal(operator, y), y.shape)
    largest = jnp.max(flat(gram), axis=1).astype(coefficient_dtype(x))
    walk = _walk(len(ts) - 1, resamples, jump)
    ts = jnp.asarray(ts)
    inputs = jnp.arange(len(walk)), *(ts[walk[:, i]] for i in range(3)), jnp.asarray(walk[:, 3] > 0)
    return jax.lax.scan(move, start, inputs)[0].x


def sdedit(key: Key, process: Process, solver: Solver, x0: Array, ts: Array, *, denoise: Field | None = None) -> Array:
    """Return x0 noised to ts[0] and brought back by a solver: the larger ts[0], the less is left of x0.

    Meng et al. 2022 (arXiv 2108.01073), alg. 1. With a solver of `replacement` a part of x0 is kept (alg. 2).

    Args:
      key: one key, or one per example, shape (batch,).
      process: the forward process.
      solver: of any field, conditional or guided.
      x0: what is edited, shape (batch, *event).
      ts: decreasing times from the noise level of the edit.
      denoise: an x0-field evaluated once at ts[-1].

    Raises:
      ValueError: a grid that does not decrease.
    """
    check_grid(ts, decreasing=True)
    keys = per_example_keys(key, check_array(x0, "x0"))
    ts = jnp.asarray(ts)
    start = perturb(process, x0, white(fold_in(keys, 0), x0, ts[0], ts[0]), ts[0])
    x, _ = integrate(fold_in(keys, 1), solver, start, ts)
    return x if denoise is None else call(denoise, x, ts[-1])


def edit_latent(
    encoder: Solver,
    x0: Array,
    ts: Array,
    edit: Callable[[Array], Array] = lambda latent: latent,
    *,
    decoder: Solver | None = None,
) -> Array:
    """Return x0 carried to ts[0] by a deterministic solver, changed there, and carried back.

    Song et al. 2021 (arXiv 2011.13456), section 4.3, the flow's latent; with a decoder of another condition it is
    translation (Su et al. 2022, arXiv 2203.08382, alg. 1).

    Args:
      encoder: an ODE solver that runs in both directions.
      x0: data at ts[-1], shape (batch, *event).
      ts: decreasing times, as for sampling.
      edit: latents -> latents, for example `slerp` with others.
      decoder: the way back; None: the encoder.

    Raises:
      ValueError: a grid that does not decrease, a stochastic solver, or an edit that changes the shape.
    """
    check_array(x0, "x0")
    check_grid(ts, decreasing=True)
    latent, _ = integrate(None, encoder, x0, jnp.asarray(ts)[::-1])
    edited = edit(latent)
    check_like(edited, x0, "what edit returns", "x0")
    return integrate(None, decoder or encoder, edited, ts)[0]


def slerp(a: Array, b: Array, weight: Array | float) -> Array:
    """Return (sin((1 - w) angle) a + sin(w angle) b) / sin angle, the angle that of each pair of examples.

    Interpolation on the sphere, where noise lives: Shoemake 1985; Song, Meng & Ermon 2021 (arXiv 2010.02502), appendix
    D.5. Linear where the angle is 0; where it is pi there is no one way, and the result is not finite or nearly so.

    Args:
      a: states at weight 0, shape (batch, *event).
      b: states at weight 1.
      weight: scalar or (batch,).

    Raises:
      ValueError: shapes that differ.
    """
    check_array(a, "a")
    check_like(b, a, "b", "a")
    weight = scalars(weight, a, "weight")
    # The sums of squares of noise are beyond half precision.
    norm = lambda x: lincomb((jax.lax.rsqrt(sum_event(x**2)), x))
    first, second = (norm(widened(x)) for x in (a, b))
    # From the chord and its complement: cos would lose the digits of small angles.
    root = lambda x: jnp.sqrt(sum_event(x**2))
    angle = 2 * jnp.arctan2(root(first - second), root(first + second))
    part = lambda w: w * jnp.sinc(w * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)
    return lincomb((part(1 - weight), a), (part(weight), b))


def _replacing(process, operator, y, std, noise):
    """(keys, x, s) -> x with its measured part replaced."""
    check_array(y, "y")
    std = scalars(std, y, "std")
    gram = diagonal(operator, y)

    def put(keys, x, s):
        s = batch_time(s, x)
        check_example(x, operator)
        measured = operator.forward(x)
        check_like(y, measured, "y", "a measured batch")
        alpha, sigma = (expand(c, y) for c in process.marginal(s))
        variance = sigma**2 * gram - (alpha * expand(std, y)) ** 2
        known = (variance >= 0) & (gram > 0)
        z = noise(keys, y, s, s)
        target = alpha * y + root(variance) * z
        return x + operator.adjoint(jnp.where(known, (target - measured) / jnp.where(known, gram, 1), 0))

    return put


def _walk(steps, resamples, jump):
    """Rows (from, to, end of the stretch, times it was gone before), the first three as indices of the grid.

    Each stretch of `jump` steps is gone down, and from its end back to its start.
    """
    rows = []
    for start in range(0, steps, jump):
        end = min(start + jump, steps)
        down = [(n, n + 1) for n in range(start, end)]
        for again in range(resamples):
            back = [(end, start)] if again else []
            rows += [(*pair, end, again) for pair in back + down]
    return np.asarray(rows)


def _fold(keys, n):
    return None if keys is None else fold_in(keys, n)
