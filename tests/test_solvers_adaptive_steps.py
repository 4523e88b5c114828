"""The step sizes of the adaptive integrator against their sources, from the times at which a drift is asked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import sde, solvers


def test_the_first_step_is_that_of_hairer(x64):
    """Hairer, Norsett & Wanner 1993, section II.4, read off the times at which the drift is asked for."""
    # x, slope k, its change m in time, and the end, from t = 0, of drifts k + m t; the last one is infinite for t > 0.
    cases = np.array(
        [
            [1.0, 2.0, 0.0, 10.0],
            [1.0, 0.001, 50.0, 1000.0],  # bent
            [0.0, 1.0, 0.0, 10.0],  # from the origin: a millionth ahead, and a hundred times that at most
            [1.0, 1e-9, 0.0, -10.0],  # nearly still
            [1.0, 0.0, 0.0, 10.0],  # still
            [1e6, 1.0, 0.0, 0.05],  # no further than the end
            [1.0, 0.5, np.inf, 10.0],
        ]
    )
    x, k, m, end = cases.T
    asked = []

    def drift(x, t):
        jax.debug.callback(lambda t: asked.append(np.asarray(t)), t, ordered=True)
        return (jnp.asarray(k) + jnp.where(t == 0, 0, m * t))[:, None]

    ode, tableau = sde.SDE(drift), solvers.DORMAND_PRINCE
    solvers.integrate_adaptive(ode, jnp.asarray(x)[:, None], 0.0, jnp.asarray(end), rtol=1e-30, atol=0.01, max_steps=1)
    jax.effects_barrier()
    size, speed, bend = np.abs(x) / 0.01, np.abs(k) / 0.01, np.abs(m) / 0.01
    with np.errstate(divide="ignore"):
        ahead = np.minimum(np.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed), np.abs(end))
        largest = np.maximum(speed, bend)
        length = (0.01 / largest) ** (1 / 5)
    length = np.where((largest <= 1e-15) | np.isinf(largest), np.maximum(1e-6, ahead * 1e-3), length)
    first = np.minimum(np.minimum(100 * ahead, length), np.abs(end))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    close(asked[0], np.zeros(len(x)))
    close(asked[1], np.sign(end) * ahead)
    close(asked[2], np.sign(end) * first * tableau.c[1])


def test_steps_follow_their_errors(x64):
    """Gustafsson 1991's control, literally: shrinks after refusals, and looks one error back after acceptance.

    The drift is a function of time alone, so that the error of a step is a sum over the times that were asked for; 64
    jumps, so dense that some errors lie just above one.
    """
    tableau, size, asked = solvers.DORMAND_PRINCE, np.geomspace(1e-3, 1e4, 64), []
    slope = lambda t: 1 + t + size * (t > 0.05).astype(float)  # a jump within the first step

    def drift(x, t):
        jax.debug.callback(lambda t: asked.append(np.asarray(t)), t, ordered=True)
        return slope(t)[:, None]

    ode = sde.SDE(drift)
    solvers.integrate_adaptive(ode, jnp.ones((64, 1)), 0.0, 100.0, rtol=1e-30, atol=0.01, max_steps=4)
    jax.effects_barrier()
    c, t, before, refused = np.array(tableau.c), np.zeros(64), np.ones(64), 0
    h = asked[2] / c[1]
    for n in range(4):
        np.testing.assert_allclose(asked[2 + 6 * n], t + c[1] * h, rtol=1e-6)
        error = np.maximum(np.abs(h * sum(e * slope(t + ci * h) for e, ci in zip(tableau.error, c))) / 0.01, 1e-8)
        kept = error <= 1
        grown = np.clip(0.9 * error**-0.14 * before**0.08, 0.2, 10)
        shrunk = np.clip(0.9 * error**-0.2, 0.2, 0.9)
        t, h = np.where(kept, t + h, t), h * np.where(kept, grown, shrunk)
        before, refused = np.where(kept, np.maximum(error, 1e-4), before), refused + ~kept
    assert refused.min() == 0 and refused.max() >= 2
