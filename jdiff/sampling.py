"""Sampling: a prior draw, a solver over a grid, and one optional last denoising step."""

from __future__ import annotations

from typing import Literal, overload

import jax.numpy as jnp
import numpy as np

from jdiff._array import call, check_grid, check_shape, fold_in, is_concrete, per_example_keys
from jdiff._typing import Array, Field, Key, Process
from jdiff.processes import prior_sample
from jdiff.solvers.base import Solver, integrate

__all__ = ["sample"]


@overload
def sample(
    key: Key,
    process: Process,
    solver: Solver,
    shape: tuple[int, ...],
    ts: Array,
    *,
    denoise: Field | None = None,
    path: Literal[False] = False,
) -> Array: ...


@overload
def sample(
    key: Key,
    process: Process,
    solver: Solver,
    shape: tuple[int, ...],
    ts: Array,
    *,
    denoise: Field | None = None,
    path: Literal[True],
) -> tuple[Array, Array]: ...


def sample(
    key: Key,
    process: Process,
    solver: Solver,
    shape: tuple[int, ...],
    ts: Array,
    *,
    denoise: Field | None = None,
    path: bool = False,
) -> tuple[Array, Array] | Array:
    """Draw samples: x ~ prior at ts[0], then the solver down to ts[-1].

    Sample i depends on its key (and the fields) alone: not on the batch size, its batch mates or the mapping over
    devices.

    Args:
      key: one key, or one per example, shape (batch,).
      process: the forward process.
      solver: any solver, built from the process and a field.
      shape: (batch, *event).
      ts: decreasing times, for example from `jdiff.times`; its dtype is that of the samples.
      denoise: an x0-field evaluated once at ts[-1], in place of the noise that is left there.
      path: also return the states at all of ts (before the denoising).

    Returns:
      Samples of the given shape, or (samples, path) with path of shape (len(ts), *shape).

    Raises:
      ValueError: a grid that does not decrease or leaves [0, t_max], a shape without a batch, keys of another number.
      TypeError: keys that are not typed threefry keys.
    """
    check_grid(ts, decreasing=True)
    if is_concrete(ts):
        first, *_, last = np.asarray(ts, float).tolist()
        if not 0 <= last < first <= process.t_max * (1 + 1e-6):
            raise ValueError(f"ts must lie in the range of the process, 0 to {process.t_max}: got {first} to {last}")
    check_shape(shape, 1)
    ts = jnp.asarray(ts)
    keys = per_example_keys(key, shape[0])
    x = prior_sample(fold_in(keys, 0), process, shape, ts.dtype)
    x, states = integrate(fold_in(keys, 1), solver, x, ts, path=path)
    if denoise is not None:
        x = call(denoise, x, ts[-1])
    return x if states is None else (x, states)
