"""Good sampling grids for a given field and number of steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jdiff._array import (
    call,
    check_array,
    check_count,
    check_grid,
    check_like,
    check_positive,
    is_concrete,
    zero_like_batch,
)
from jdiff._typing import Array, Field, Process
from jdiff.processes import log_snr
from jdiff.solvers.base import Solver, integrate

__all__ = ["best_grid", "refine_grid", "step_costs"]

# Levenberg-Marquardt: dampings tried in every iteration.
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)


def best_grid(process: Process, denoise: Field, path: Array, ts: Array, n: int, *, power: float = 0.25) -> Array:
    """Return the n steps with the least sum of `step_costs`: n + 1 of the times ts, both ends among them.

    Sabour et al. 2024 ('Align Your Steps', arXiv 2404.14507) lower such a sum by a search over candidates, one time of
    the grid after the other. With one fine set of candidates for all times it has its global minimum by dynamic
    programming, for every n, from one evaluation of the field for each state of the path.

    Args:
      process: the forward process.
      denoise: an x0-field.
      path: states of some samples at ts, shape (len(ts), batch, *event), of a fine solve, such as `sample(...,
        path=True)` returns; of the reverse SDE for stochastic solvers.
      ts: candidates, decreasing; `times.uniform_log_snr(process, 128)` is a good set.
      n: number of steps, at most len(ts) - 1.
      power: of the signal-to-noise ratio in the cost. 1 is the KL divergence, whose best grids spend most steps near
        the data; on the two targets tried samples were better with the default (docs/solvers.md).

    Raises:
      ValueError: n out of range, a grid that does not decrease or ends where sigma = 0, shapes that do not fit, power
        not positive.
      TypeError: path is not floating point.
    """
    costs = step_costs(process, denoise, path, ts, power=power)
    count = len(ts)
    check_count(n, "n")
    if n >= count:
        raise ValueError(f"n must be from 1 to {count - 1}, the number of candidate steps; got {n}")
    # best[j]: least cost of the way from 0 to j with the steps so far.
    start = jnp.where(jnp.arange(count) == 0, 0, jnp.inf).astype(costs.dtype) + 0 * costs[0, -1]

    def one_more(best, _):
        ways = best[:, None] + costs
        return jnp.min(ways, axis=0), jnp.argmin(ways, axis=0)

    _, before = jax.lax.scan(one_more, start, length=n)
    last = jnp.full_like(before[0, 0], count - 1) + 0 * before[0, 0]
    _, chosen = jax.lax.scan(lambda j, before: (before[j], before[j]), last, before, reverse=True)
    return jnp.append(jnp.asarray(ts)[chosen], ts[-1])


def step_costs(process: Process, denoise: Field, path: Array, ts: Array, *, power: float = 0.25) -> Array:
    """Return what a step from ts[i] to ts[j] costs, shape (len(ts), len(ts)); infinite unless i < j.

    1/2 int |x_0(t) - x_0(ts[i])|^2 SNR^power d(log SNR), averaged over samples, for a step that holds x_0. With power =
    1 it is the KL divergence in nats of the stochastic sampler's path (eta = 1) from the reverse SDE's, by Girsanov's
    theorem; Sabour et al. 2024 (arXiv 2404.14507), section 3. By the trapezoidal rule on ts.

    Args:
      process: as in `best_grid`.
      denoise: as in `best_grid`.
      path: as in `best_grid`.
      ts: as in `best_grid`.
      power: as in `best_grid`.

    Raises:
      ValueError: as `best_grid`.
      TypeError: as `best_grid`.
    """
    check_positive(power, "power")
    check_grid(ts, decreasing=True)
    check_array(path, "path")
    if path.ndim < 2 or len(path) != len(ts) or path.shape[1] < 1:
        raise ValueError(f"path must have shape (len(ts), batch, *event) with len(ts) = {len(ts)}, got {path.shape}")
    ts = jnp.asarray(ts)
    along = jnp.exp(power * log_snr(process, ts)) / power
    if is_concrete(along) and not bool(jnp.isfinite(along[-1])):
        raise ValueError(f"the grid must end where sigma > 0, got t = {float(ts[-1])}")
    values = jax.lax.map(lambda pair: call(denoise, *pair), (path, ts)).reshape(len(ts), -1).astype(along.dtype)
    place = jnp.arange(len(ts) - 1)

    def row(i):
        # From differences, and summed from i on: next to an SNR of 1e10 inner products or whole sums lose all digits.
        apart = jnp.sum((values - values[i][None]) ** 2, axis=1) / path.shape[1]
        pieces = jnp.where(place >= i, 0.25 * (apart[1:] + apart[:-1]) * jnp.diff(along), 0)
        return jnp.append(0, jnp.cumsum(pieces))

    costs = jax.lax.map(row, jnp.arange(len(ts)))
    return jnp.where(jnp.triu(jnp.ones(costs.shape, bool), 1), costs, jnp.inf)


def refine_grid(solver: Solver, x: Array, target: Array, ts: Array, *, iterations: int = 8) -> Array:
    """Return the grid near ts on which a solver comes closest to known ends: least squares over the inner times.

    Minimises sum |x_n(ts) - target|^2 by Levenberg-Marquardt in the logarithms of the step lengths; derivatives by
    forward mode, one for each step. The objective is the solver's own error, cancellations between steps included, as
    in Tong et al. 2024 ('LD3', arXiv 2405.15506, where it is minimised by gradients). It has local minima: begin with a
    usual grid. It can be fitted too well: the fewer the samples, the less others gain. An iteration costs about
    2 n (n + 4) evaluations for n steps.

    Args:
      solver: a deterministic solver.
      x: states at ts[0], shape (batch, *event).
      target: where a fine solve takes them at ts[-1], shape of x.
      ts: the grid to begin with, shape (n + 1,); its ends stay.
      iterations: of Levenberg-Marquardt.

    Returns:
      Times, shape (n + 1,); never a worse grid than ts for these states.

    Raises:
      ValueError: shapes that do not fit, a grid that is not monotone, iterations < 1, a stochastic solver.
      TypeError: states that are not floating point.
    """
    check_grid(ts)
    check_array(x)
    check_like(target, x, "target")
    check_count(iterations, "iterations")
    ts = jnp.asarray(ts)
    n, steps = len(ts) - 1, jnp.abs(jnp.diff(ts))
    sign = jnp.sign(ts[0] - ts[-1])

    def times(logs):
        """From logarithms of steps, scaled to the whole; summed from the end, which keeps the digits of fine steps."""
        lengths = jax.nn.softmax(logs) * jnp.sum(steps)
        return (ts[-1] + sign * jnp.cumsum(lengths[::-1])[::-1])[1:]

    def residual(logs):
        inner = jnp.concatenate([ts[:1], times(logs), ts[-1:]])
        end, _ = integrate(None, solver, x, inner)
        return ((end - target) / jnp.sqrt(jnp.asarray(x.size, x.dtype))).ravel()

    def iterate(logs, _):
        value, push = jax.linearize(residual, logs)
        columns = jax.lax.map(push, jnp.eye(n, dtype=logs.dtype))
        product = lambda a, b: jnp.matmul(a, b, precision="highest")
        square, slope = product(columns, columns.T), product(columns, value)

        def move(damping):
            # The sum of all lengths is fixed, so the square is singular: what is added makes it regular.
            added = damping * jnp.diag(jnp.diag(square)) + 1e-6 * jnp.trace(square) * jnp.eye(n, dtype=square.dtype)
            new = logs - jnp.clip(jnp.linalg.solve(square + added, slope), -1, 1)
            loss = jnp.sum(residual(new) ** 2)
            return new, jnp.where(jnp.isfinite(loss), loss, jnp.inf)

        moved, losses = jax.lax.map(move, jnp.asarray(_DAMPINGS, logs.dtype))
        best = jnp.argmin(losses)
        return jnp.where(losses[best] < jnp.sum(value**2), moved[best], logs), None

    # The zero makes the carry vary over devices as x does, as shard_map asks.
    begin = jnp.log(steps) + zero_like_batch(x, steps.dtype)[0]
    logs, _ = jax.lax.scan(iterate, begin, length=iterations)
    return jnp.concatenate([ts[:1], times(logs), ts[-1:]])
