"""Langevin's corrector by example, and predictor-corrector pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import (
    KEY,
    PROCESSES,
    close,
    denoise,
    one_step,
    score_of,
    state,
)

from jdiff import processes, solvers
from jdiff._array import fold_in, normal_like


def test_langevin_step_is_per_example(x64):
    """e = 2 (snr sqrt(D) / |score|)^2 with each example's own norm, over all arrays of its state."""
    x = {"a": state(3, 4) * jnp.array([0.1, 1.0, 9.0])[:, None], "b": state(3, 2)}
    score = lambda x, t: jax.tree.map(lambda leaf: -leaf / (1 + t[:, None]) ** 2, x)
    keys, snr, s = jax.random.split(KEY, 3), 0.2, 0.4
    noises = [normal_like(fold_in(keys, n), x) for n in range(2)]
    want = jax.tree.map(np.asarray, x)
    for z in noises:
        gradient = {name: -leaf / (1 + s) ** 2 for name, leaf in want.items()}
        for i in range(3):
            norm = np.sqrt(sum(np.sum(leaf[i] ** 2) for leaf in gradient.values()))
            e = 2 * (snr * np.sqrt(6) / norm) ** 2
            for name in want:
                want[name] = np.array(want[name])
                want[name][i] += e * gradient[name][i] + np.sqrt(2 * e) * np.asarray(z[name][i])
    got = one_step(solvers.langevin(score, snr=snr, steps=2), x, 0.9, s, keys)
    for name in want:
        close(got[name], want[name], 1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_langevin_finds_and_keeps_the_target(scale, x64):
    """On N(0, d^2) a step is x (1 - e/d^2) + sqrt(2 e) z with e = 2 snr^2 d^2: its variance is d^2 / (1 - snr^2)."""
    batch, size, d, snr = 64, 256, 0.7, 0.25
    solver = solvers.langevin(lambda x, t: -x / d**2, snr=snr, steps=100)
    keys = jax.random.split(KEY, batch)
    x = scale * d * normal_like(fold_in(keys, 7), jnp.zeros((batch, size)))
    after_one = one_step(solvers.langevin(lambda x, t: -x / d**2, snr=snr), x, 0.5, 0.5, keys)
    if scale != 1:
        before, after = jnp.mean(x**2), jnp.mean(after_one**2)
        assert (after - before) * (d**2 - before) > 0
    got = jnp.mean(jax.jit(solver.step)(keys, solver.init(x), 0.5, 0.5).x ** 2)
    # Four standard errors of the mean of 2^14 squares.
    assert got / d**2 == pytest.approx(1 / (1 - snr**2), abs=4 * np.sqrt(2 / batch / size))


def test_predictor_then_corrector_at_the_new_time(x64):
    """Keys: the predictor draws from fold_in(key, 0), the corrector from fold_in(key, 1); memories stay apart."""
    process, x = PROCESSES["VP"], state()
    keys, ts = jax.random.split(KEY, 3), processes.time_at(process, jnp.array([-4.0, -2.0, 0.0, 1.0]))
    score = score_of(process)
    corrector = solvers.langevin(score, snr=0.2)
    for predictor in (solvers.dpmpp_2m(process, denoise), solvers.ancestral(process, denoise)):
        both = solvers.predictor_corrector(predictor, corrector)
        assert both.order == predictor.order
        got, _ = solvers.integrate(keys, both, x, ts)
        memory, want = predictor.init(x).memory, x
        for n, (t, s) in enumerate(itertools.pairwise(ts)):
            step_keys = fold_in(keys, n)
            predicted = predictor.step(fold_in(step_keys, 0), solvers.State(want, memory), t, s)
            memory = predicted.memory
            want = corrector.step(fold_in(step_keys, 1), solvers.State(predicted.x), t, s).x
        close(got, want, 1e-12)


def test_langevin_bounds_its_step_where_the_score_vanishes():
    """A flat density has no score: without a bound the step is infinite, with one it is that bound."""
    x, bound = jnp.zeros((3, 4)), jnp.array([0.5, 2.0, 8.0])
    unit = lambda keys, x, t, s: jnp.ones_like(x)
    solver = solvers.langevin(lambda x, t: jnp.full_like(x, 1e-12), largest=lambda s: bound * s, noise=unit)
    moved = solver.step(None, solver.init(x), 1.0, 0.5).x
    np.testing.assert_allclose(moved, jnp.sqrt(2 * 0.5 * bound)[:, None] * jnp.ones((1, 4)), rtol=1e-6)
    # At sigma = 0.05 a score of 3072 entries has a square of 1.2e6, which is no number of float16.
    moved = solvers.langevin(lambda x, t: jnp.full_like(x, 20), noise=unit)
    moved = moved.step(None, solvers.State(jnp.zeros((3, 3072), jnp.float16)), 1.0, 0.5).x
    step = 2 * (0.16 / 20) ** 2
    np.testing.assert_allclose(moved, np.full((3, 3072), 20 * step + np.sqrt(2 * step)), rtol=2e-3)
    # Unsaid, it is one step at the 0.16 of Song et al. 2021.
    moved = solvers.langevin(lambda x, t: -x, noise=unit).step(None, solver.init(x + 1), 1.0, 0.5).x
    np.testing.assert_allclose(moved, jnp.full((3, 4), 1 - 2 * 0.16**2 + 2 * 0.16), rtol=1e-6)
