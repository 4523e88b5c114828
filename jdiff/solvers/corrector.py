"""Langevin corrector and predictor-corrector sampling, one step size per example."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff._array import (
    add_up,
    batch_time,
    call,
    check_count,
    check_positive,
    event_size,
    fold_in,
    lincomb,
    sum_event,
    widened,
)
from jdiff._typing import Array, Field
from jdiff.solvers.base import Noise, Solver, State, white

__all__ = ["langevin", "predictor_corrector"]


def langevin(
    score: Field,
    *,
    snr: float = 0.16,
    steps: int = 1,
    largest: Callable[[Array], Array] | None = None,
    noise: Noise = white,
) -> Solver:
    """Return the Langevin corrector at the new time s: x <- x + e score(x, s) + sqrt(2 e) z, `steps` times.

    The step size is per example, e = 2 (snr sqrt(D) / |score|)^2 with D entries per example: Song et al. 2021 (arXiv
    2011.13456), alg. 4, with the batch-mean norms replaced by each example's own and |z| by its expected sqrt(D), so
    that a sample does not depend on its batch mates.

    Args:
      score: a score field.
      snr: signal-to-noise ratio of a step.
      steps: Langevin steps per call.
      largest: bound on e as a function of s, (batch,) -> (batch,). Where the density is flat the score vanishes and e
        does not; sigma^2 is a bound within which a step on p_s is stable.
      noise: where unit normals come from.

    Raises:
      ValueError: snr not positive and finite, or steps < 1.
      TypeError: steps is no integer.
    """
    check_positive(snr, "snr")
    check_count(steps, "steps")

    def step(keys, state, t, s):
        x = state.x
        s = batch_time(s, x)

        def once(n, x):
            gradient = call(score, x, s)
            square = add_up(sum_event(widened(leaf) ** 2) for leaf in jax.tree.leaves(gradient)).astype(s.dtype)
            size = 2 * snr**2 * event_size(x) / jnp.maximum(square, jnp.finfo(s.dtype).tiny)
            if largest is not None:
                size = jnp.minimum(size, largest(s))
            z = noise(None if keys is None else fold_in(keys, n), x, s, s)
            return lincomb((1.0, x), (size, gradient), (jnp.sqrt(2 * size), z))

        return State(once(0, x) if steps == 1 else jax.lax.fori_loop(0, steps, once, x), state.memory)

    return Solver(State, step, 0)


def predictor_corrector(predictor: Solver, corrector: Solver) -> Solver:
    """Return a solver that steps with the predictor from t to s, then with the corrector at s.

    Song et al. 2021 (arXiv 2011.13456), alg. 1 (whose code runs them the other way round). The predictor draws from
    fold_in(key, 0), the corrector from fold_in(key, 1).
    """

    def init(x):
        return State(x, (predictor.init(x).memory, corrector.init(x).memory))

    def step(keys, state, t, s):
        first, second = (None, None) if keys is None else (fold_in(keys, 0), fold_in(keys, 1))
        predicted = predictor.step(first, State(state.x, state.memory[0]), t, s)
        corrected = corrector.step(second, State(predicted.x, state.memory[1]), s, s)
        return State(corrected.x, (predicted.memory, corrected.memory))

    return Solver(init, step, predictor.order)
