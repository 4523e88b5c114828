"""A solver is two pure functions; `integrate` runs one over a grid inside one `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff._array import check_grid, check_key, check_state, fold_in, normal_like, per_example_keys
from jdiff._typing import Array, Key, PyTree

__all__ = ["Noise", "Solver", "State", "integrate", "white"]

Noise = Callable[[Key | None, PyTree, Array, Array], PyTree]
"""(keys, x, t, s) -> unit normals like x for the step from t to s; keys has shape (batch,)."""


class State(NamedTuple):
    """What a solver carries: the state x and, for multistep methods, its history."""

    x: PyTree
    memory: PyTree = ()


class Solver(NamedTuple):
    """One-step map of a solver, for any pair of times in either direction.

    init(x) -> State; step(keys, state, t, s) -> State from t to s, with keys of shape (batch,) or None and times scalar
    or (batch,). `order` is the order of convergence (weak order for stochastic solvers): data for tests and
    documentation.
    """

    init: Callable[[PyTree], State]
    step: Callable[[Key | None, State, Array, Array], State]
    order: int = 1


def white(keys: Key | None, x: PyTree, t: Array, s: Array) -> PyTree:
    """Draw independent unit normals like x, example i from keys[i] alone: the default `Noise`.

    Raises:
      ValueError: keys is None, or not one key per example.
      TypeError: keys are not typed threefry keys.
    """
    if keys is None:
        raise ValueError("this solver is stochastic: it needs a key, got None")
    batch = check_state(x)
    if check_key(keys).shape != (batch,):
        raise ValueError(f"keys must be one key per example, shape {(batch,)}, got shape {keys.shape}")
    return normal_like(keys, x)


def integrate(
    key: Key | None, solver: Solver, x: PyTree, ts: Array, *, path: bool = False, remat: bool = False
) -> tuple[PyTree, PyTree | None]:
    """Run a solver over a time grid: one step for each pair of neighbours, in either direction.

    Args:
      key: one key, or one per example, shape (batch,); None for deterministic solvers. Step n of example i draws from
        fold_in(key_i, n).
      solver: the solver.
      x: initial state at ts[0], arrays of shape (batch, *event).
      ts: strictly monotone times, shape (steps + 1,).
      path: also return the states at all of ts.
      remat: recompute each step in the backward pass instead of storing its intermediates.

    Returns:
      The state at ts[-1], and the states at ts stacked along a new first axis (or None).

    Raises:
      ValueError: a grid that is not monotone, states without a common batch axis, a stochastic solver without a key.
      TypeError: wrong dtypes, or keys that are not typed threefry keys.
    """
    batch = check_state(x)
    check_grid(ts)
    keys = None if key is None else per_example_keys(key, batch)

    def step(state, inputs):
        n, t, s = inputs
        state = solver.step(None if keys is None else fold_in(keys, n), state, t, s)
        return state, (state.x if path else None)

    ts = jnp.asarray(ts)
    inputs = jnp.arange(len(ts) - 1), ts[:-1], ts[1:]
    state, states = jax.lax.scan(jax.checkpoint(step) if remat else step, solver.init(x), inputs)
    if path:
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x, states)
    return state.x, states
