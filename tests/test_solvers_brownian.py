"""Brownian noise: unit normals that add up along one path per example, whatever the grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jdiff import analytic, processes, sampling, sde, solvers, times
from jdiff._array import fold_in

PROCESSES = {"VP": processes.VP(), "EDM": processes.EDM(), "Rectified": processes.Rectified()}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
KEY = jax.random.key(3)


def draw(process, ts, size=20_000):
    """The noises of the steps of a grid, (steps, size)."""
    return draw_between(process, ts[:-1], ts[1:], size)


def draw_between(process, starts, ends, size):
    x = jnp.zeros((1, size))
    noise = solvers.brownian(KEY, process)
    return jax.jit(jax.vmap(lambda t, s: noise(None, x, t, s)[0]))(starts, ends)


def clock(process, ts):
    alpha, sigma = process.marginal(ts)
    return np.arctan2(np.asarray(sigma, np.float64), np.asarray(alpha, np.float64))


@pytest.mark.slow_but("Rectified")
@every_process
def test_steps_are_independent_unit_normals(process):
    z = np.asarray(draw(process, times.karras(process, 6)))
    size = z.shape[1]
    for row in z:
        assert stats.kstest(row, "norm").pvalue > 1e-3
    # Four standard errors of a correlation, of variances' sample errors.
    np.testing.assert_allclose(z @ z.T / size, np.eye(6), atol=4 * np.sqrt(2 / size))


@pytest.mark.slow_but("VP")
@every_process
def test_short_steps_add_up_to_long_ones(process):
    fine = times.uniform_log_snr(process, 12)
    lengths = np.abs(np.diff(clock(process, fine)))
    increments = np.asarray(draw(process, fine, 50)) * np.sqrt(lengths)[:, None]
    long = np.abs(np.diff(clock(process, fine[::4])))
    want = increments.reshape(3, 4, 50).sum(axis=1) / np.sqrt(long)[:, None]
    np.testing.assert_allclose(draw(process, fine[::4], 50), want, atol=2e-3)


def test_an_example_follows_its_own_key():
    process, x = PROCESSES["VP"], jnp.zeros((3, 5))
    keys = jax.random.split(KEY, 3)
    whole = solvers.brownian(keys, process)(None, x, 0.7, 0.3)
    for i in (0, 2):
        alone = solvers.brownian(keys[i : i + 1], process)(None, x[i : i + 1], 0.7, 0.3)
        np.testing.assert_allclose(alone[0], whole[i], rtol=1e-6)
    # The solver's own keys are not looked at, and one key stands for its split.
    again = solvers.brownian(KEY, process)(fold_in(keys, 9), x, jnp.full(3, 0.7), 0.3)
    np.testing.assert_allclose(again, whole, rtol=1e-6)
    assert len(np.unique(np.asarray(whole))) == 15
    # The path goes from t_max to t_min: what is outside is as at the ends.
    short = solvers.brownian(KEY, process, t_min=0.3, t_max=0.7)
    np.testing.assert_allclose(short(keys, x, 0.8, 0.4), short(keys, x, 0.7, 0.4), rtol=1e-6)
    np.testing.assert_allclose(short(keys, x, 0.5, 0.2), short(keys, x, 0.5, 0.3), rtol=1e-6)
    with pytest.raises(TypeError, match="typed"):
        solvers.brownian(jnp.zeros(2, jnp.uint32), process)(None, x, 0.7, 0.3)


@pytest.mark.slow
def test_more_steps_approach_the_same_image():
    """Twice the steps halve the distance to a fine solve of the same path; white noise draws another image."""
    process = PROCESSES["VP"]
    exact = analytic.gaussian(process, jnp.array([0.3, -0.5]), 0.6)
    reverse = sde.reverse(process, exact.denoise, predict="x0")
    end = {}
    for kind, noise in {"brownian": solvers.brownian(jax.random.key(8), process), "white": solvers.white}.items():
        solver = solvers.euler_maruyama(reverse, noise=noise)
        draw = jax.jit(lambda ts, solver=solver: sampling.sample(KEY, process, solver, (100, 2), ts))
        for n in (20, 40, 80, 640):
            ts = times.uniform_log_snr(process, n)
            end[kind, n] = np.asarray(draw(ts))
    apart = {k: np.sqrt(np.mean((v - end[k[0], 640]) ** 2)) for k, v in end.items()}
    rate = np.log2([apart["brownian", 20] / apart["brownian", 40], apart["brownian", 40] / apart["brownian", 80]])
    assert np.all(rate > 0.7)
    assert apart["brownian", 40] < 0.1 and apart["white", 40] > 0.5


def test_steps_of_a_few_leaves_are_unit_normals_too(x64):
    """Leaves are 2^-20 of the path; the variance of 40,000 draws is within 4 standard errors, 0.03 (p = 6e-5)."""
    starts = jnp.asarray([0.2001, 0.4003, 0.6007, 0.8011])
    z = np.asarray(draw_between(PROCESSES["Rectified"], starts, starts - 3e-6, 10_000))
    assert abs(z.var() - 1) < 0.03


def test_the_ends_of_the_path_have_derivatives(x64):
    """Of the first step and the last, by the process, against differences within a leaf of 1e-6."""
    x, h = jnp.zeros((1, 3)), 1e-9

    def steps(beta):
        process = processes.VP(beta_max=beta)
        noise = solvers.brownian(KEY, process)
        return jnp.stack([noise(None, x, process.t_max, 0.5), noise(None, x, 0.5, process.t_min)])

    run = jax.jit(lambda beta: jax.jvp(steps, (beta,), (1.0,)))
    (_, slope), (above, _), (below, _) = (run(beta) for beta in (15.0, 15 + h, 15 - h))
    np.testing.assert_allclose(slope, (above - below) / (2 * h), rtol=1e-3)
