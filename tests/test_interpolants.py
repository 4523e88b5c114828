import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import logsumexp as np_logsumexp

import jdiff
from jdiff import interpolants, losses, solvers

PATHS = {
    "linear": interpolants.linear(),
    "bridge": interpolants.linear(interpolants.bridge(0.8)),
    "smooth": interpolants.linear(interpolants.sine_squared),
    "trigonometric": interpolants.trigonometric(),
    "trigonometric bridge": interpolants.trigonometric(interpolants.bridge()),
    "encoding-decoding": interpolants.encoding_decoding(),
}
NOISY = [name for name in PATHS if name not in ("linear", "trigonometric")]
# Mixtures of one dimension: weights, means, standard deviations.
END0 = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.3, 0.6])
END1 = np.array([0.5, 0.5]), np.array([0.0, 2.5]), np.array([0.8, 0.4])


def _by_hand(name, t):
    """(a, b, gamma) and their derivatives, in NumPy."""

    def path(t):
        gamma = {
            "bridge": lambda: 0.8 * np.sqrt(t * (1 - t)),
            "smooth": lambda: np.sin(np.pi * t) ** 2,
            "trigonometric bridge": lambda: np.sqrt(2 * t * (1 - t)),
            "encoding-decoding": lambda: np.sin(np.pi * t) ** 2,
        }.get(name, lambda: np.zeros_like(t))()
        if name == "encoding-decoding":
            return np.where(t < 0.5, np.cos(np.pi * t) ** 2, 0), np.where(t < 0.5, 0, np.cos(np.pi * t) ** 2), gamma
        if name.startswith("trig"):
            r = np.sqrt(1 - gamma**2)
            return r * np.cos(np.pi * t / 2), r * np.sin(np.pi * t / 2), gamma
        return 1 - t, t, gamma

    h = 1e-6
    return np.array([*path(t), *((ahead - behind) / (2 * h) for ahead, behind in zip(path(t + h), path(t - h)))])


def _exact(name):
    """Closed forms between END0 and END1, independent ends: fields of shape (batch, 1) and the distribution function.

    x_t is a mixture over pairs of components; given the pair everything is jointly normal.
    """
    (w0, m0, s0), (w1, m1, s1) = (tuple(np.repeat(v, 2) for v in END0), tuple(np.tile(v, 2) for v in END1))

    def given(t):
        a, b, gamma = (c[:, None] for c in PATHS[name](t))
        return a, b, gamma, a * m0[None] + b * m1[None], (a * s0[None]) ** 2 + (b * s1[None]) ** 2 + gamma**2

    def log_joint(x, t):
        _, _, _, center, variance = given(t)
        return jnp.log(w0 * w1)[None] - 0.5 * (x - center) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)

    def mean(x, t, which):
        """E[a' x0 + b' x1 + gamma' z | x_t = x] for the scalars (a', b', gamma') of `which`."""
        a, b, gamma, center, variance = given(t)
        posterior = jax.nn.softmax(log_joint(x, t), axis=1)
        da, db, dgamma = (c[:, None] for c in which(t))
        covariance = da * a * s0[None] ** 2 + db * b * s1[None] ** 2 + dgamma * gamma
        means = da * m0[None] + db * m1[None] + covariance / variance * (x - center)
        return jnp.sum(posterior * means, axis=1, keepdims=True)

    velocity = lambda x, t: mean(x, t, lambda t: interpolants.coefficients(PATHS[name], t)[3:])
    noise = lambda x, t: mean(x, t, lambda t: (jnp.zeros_like(t), jnp.zeros_like(t), jnp.ones_like(t)))
    log_prob = lambda x, t: jax.scipy.special.logsumexp(log_joint(x, t), axis=1)

    def log_odds(x, t):
        """Of the distribution function at one time, in NumPy."""
        _, _, _, center, variance = given(jnp.full(1, t))
        z = (np.asarray(x)[:, None] - np.asarray(center)) / np.sqrt(np.asarray(variance))
        w = np.log(w0 * w1)
        tails = (np_logsumexp(w + scipy.stats.norm.logcdf(sign * z), axis=1) for sign in (1, -1))
        return np.subtract(*tails)

    return velocity, noise, log_prob, log_odds


def _draw(end, n, seed):
    rng, (weights, means, stds) = np.random.default_rng(seed), end
    k = rng.choice(2, size=n, p=weights)
    return (means[k] + stds[k] * rng.normal(size=n))[:, None]


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_their_formulas(x64, name):
    t = np.array([0.05, 0.3, 0.49, 0.62, 0.97])
    np.testing.assert_allclose(np.array(interpolants.coefficients(PATHS[name], t)), _by_hand(name, t), atol=1e-8)
    for end, want in ((0.0, (1, 0, 0)), (1.0, (0, 1, 0))):
        np.testing.assert_allclose(np.array(PATHS[name](jnp.asarray(end))), want, atol=1e-15)


def test_moments_on_the_way(x64):
    """Normal ends that are correlated with each other: mean and covariance of x_t and of its velocity."""
    n, rng = 20_000, np.random.default_rng(0)
    root = rng.normal(size=(4, 4)) / 2
    joint = np.array([1.0, -1.0, 0.5, 2.0]) + rng.normal(size=(n, 4)) @ root.T
    x0, x1 = jnp.asarray(joint[:, :2]), jnp.asarray(joint[:, 2:])
    z = jnp.asarray(rng.normal(size=(n, 2)))
    mean, cov = np.array([1.0, -1.0, 0.5, 2.0]), root @ root.T
    for name, path in PATHS.items():
        for t in (0.1, 0.37, 0.8):
            a, b, gamma, da, db, dgamma = _by_hand(name, np.array(t))
            both = np.concatenate(
                [interpolants.interpolate(path, x0, x1, z, t), interpolants.velocity(path, x0, x1, z, t)], axis=1
            )
            ends = np.block([[a * np.eye(2), b * np.eye(2)], [da * np.eye(2), db * np.eye(2)]])
            noise = np.kron([[gamma], [dgamma]], np.eye(2))
            want = ends @ cov @ ends.T + noise @ noise.T
            error = np.sqrt(np.diag(want) / n)
            # 4.5 standard errors: p = 7e-6 an entry.
            np.testing.assert_array_less(np.abs(both.mean(0) - ends @ mean), 4.5 * error + 1e-9)
            error = np.sqrt((np.outer(np.diag(want), np.diag(want)) + want**2) / n)
            np.testing.assert_array_less(np.abs(np.cov(both.T) - want), 4.5 * error + 1e-9)


@pytest.mark.parametrize("name", ["VP", "Rectified"])
def test_one_sided_paths_are_the_processes(x64, name):
    """The same noise, times and field give the losses of `losses.denoising` to the last digits."""
    process, keys = getattr(jdiff, name)(), jax.random.split(jax.random.key(0), 5)
    path = interpolants.one_sided(process)
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)))
    t = jnp.array([0.01, 0.3, 0.5, 0.8, 0.99])
    field = lambda x, t: jnp.sin(x) + t[:, None, None]
    for ours, theirs in (("velocity", "velocity"), ("noise", "eps")):
        got = interpolants.loss(keys, field, path, x0, jnp.full_like(x0, jnp.nan_to_num(jnp.inf)), t, predict=ours)
        want = losses.denoising(keys, field, process, x0, t, predict=theirs)
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "bridge", "encoding-decoding"])
def test_losses_are_least_at_the_conditional_means(x64, name):
    n = 20_000
    velocity, noise, _, _ = _exact(name)
    x0, x1 = (jnp.asarray(_draw(end, n, seed)) for seed, end in enumerate((END0, END1)))
    t = jnp.asarray(np.random.default_rng(3).uniform(0.05, 0.95, n))

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(predict):
        """How each example's loss changes when the field moves along some functions of (x, t)."""
        exact = velocity if predict == "velocity" else noise
        moved = lambda c: interpolants.loss(
            jax.random.key(5),
            lambda x, t: exact(x, t) + c[0] + c[1] * x + c[2] * jnp.sin(3 * x) + c[3] * x * t[:, None],
            PATHS[name],
            x0,
            x1,
            t,
            predict=predict,
        )
        return jax.jacfwd(moved)(jnp.zeros(4))

    for predict in ("velocity", "noise") if name in NOISY else ("velocity",):
        values = np.asarray(slopes(predict))
        assert np.all(np.abs(values.mean(0)) < 4 * values.std(0) / np.sqrt(n)), (predict, values.mean(0))


@pytest.mark.parametrize("name", PATHS)
def test_the_velocity_carries_each_end_to_the_other(x64, name):
    """In one dimension the flow keeps the distribution function: mixture to mixture, and back."""
    velocity, _, _, log_odds = _exact(name)
    x0 = jnp.linspace(-2.0, 2.0, 9)[:, None]
    margin = 1e-3 if "bridge" in name else 0.0  # gamma' is infinite at the ends
    # Finer where the bridge begins: t = sin^2.
    ts = margin + (1 - 2 * margin) * jnp.sin(0.5 * jnp.pi * jnp.linspace(0.0, 1.0, 401)) ** 2
    run = jax.jit(lambda x, ts: solvers.integrate(None, solvers.rk4(jdiff.SDE(velocity)), x, ts)[0])
    x1 = run(x0, ts)
    np.testing.assert_allclose(log_odds(x1[:, 0], 1 - margin), log_odds(x0[:, 0], margin), atol=1e-5)
    np.testing.assert_allclose(run(x1, ts[::-1]), x0, atol=1e-6)


@pytest.mark.parametrize("name", NOISY)
def test_the_score_is_the_gradient_of_the_density(x64, name):
    _, noise, log_prob, _ = _exact(name)
    x, t = jnp.linspace(-2, 3, 8)[:, None], jnp.linspace(0.1, 0.9, 8)
    want = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
    np.testing.assert_allclose(interpolants.score(PATHS[name], noise)(x, t), want, rtol=1e-9)


@pytest.mark.slow_but("bridge-x1", "encoding-decoding-x0")
@pytest.mark.parametrize("towards", ["x0", "x1"])
@pytest.mark.parametrize("name", ["bridge", "encoding-decoding"])
def test_sdes_arrive_at_both_ends(x64, name, towards):
    """Samples of the one end become samples of the other, with the default noise and with more of it."""
    n, margin = 4000, 1e-3
    velocity, noise, _, log_odds = _exact(name)
    ts = jnp.linspace(margin, 1 - margin, 201)
    begin, ts = (END0, ts) if towards == "x1" else (END1, ts[::-1])
    x = jnp.asarray(_draw(begin, n, 7))
    gamma = interpolants.stochastic(PATHS[name], velocity, noise, diffusion=lambda t: PATHS[name](t)[2])
    plain, t = interpolants.stochastic(PATHS[name], velocity, noise), jnp.linspace(0.1, 0.9, n)
    np.testing.assert_allclose(plain.drift(x, t), gamma.drift(x, t), rtol=1e-9)
    for w in (None, lambda t: 1.5 * jnp.sqrt(t * (1 - t))):
        sde = interpolants.stochastic(PATHS[name], velocity, noise, towards=towards, diffusion=w)
        run = jax.jit(lambda key, x, sde=sde: solvers.integrate(key, solvers.euler_maruyama(sde), x, ts)[0])
        end = np.asarray(run(jax.random.key(1), x))[:, 0]
        u = 1 / (1 + np.exp(-log_odds(end, float(ts[-1]))))
        # 0.026 is passed by a true sample of this size once in a hundred times; a wrong sign is above 0.1.
        assert scipy.stats.kstest(u, "uniform").statistic < 0.026
        assert np.corrcoef(end, np.asarray(x)[:, 0])[0, 1] < 0.95


def test_a_loss_in_half_precision_is_of_float32():
    x0 = jnp.full((3, 2), 300, jnp.float16)
    got = interpolants.loss(jax.random.key(0), lambda x, t: jnp.zeros_like(x), interpolants.linear(), x0, -x0, 0.5)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full(3, 360_000))


def test_bad_input():
    x, path, key = jnp.ones((3, 2)), interpolants.linear(), jax.random.key(0)
    run = lambda keys=key, x1=x, **options: interpolants.loss(keys, lambda x, t: x, path, x, x1, 0.5, **options)
    with pytest.raises(ValueError, match="'eps'; choose velocity or noise"):
        run(predict="eps")
    with pytest.raises(ValueError, match=r"x1 must have the shape of x0, \(3, 2\); got \(3, 1\)"):
        run(x1=x[:, :1])
    with pytest.raises(TypeError, match="x1 must be floating point"):
        run(x1=x.astype(jnp.int32))
    with pytest.raises(TypeError, match="typed key"):
        run(keys=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="towards must be 'x0' or 'x1', got 'noise'"):
        interpolants.stochastic(path, None, None, towards="noise")
    with pytest.raises(ValueError, match="sigma must be positive and finite, got 0"):
        interpolants.bridge(0)
