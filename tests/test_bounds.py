import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import jdiff
from jdiff import analytic, bounds, predictions, times
from jdiff.transforms import DataTransform

CASES = {
    "vp": (jdiff.VP(), "score"),
    "subvp": (jdiff.SubVP(), "eps"),
    "ve": (jdiff.VE(), "v"),
    "edm": (jdiff.EDM(), "x0"),
    "cosine": (jdiff.Cosine(), "velocity"),
    "rectified": (jdiff.Rectified(), "x0"),
}
EIGHT = jdiff.VP(t_min=1e-3)
LEVELS = DataTransform(levels=4)


def mean_and_error(value):
    value = np.asarray(value, np.float64)
    return value.mean(), value.std(ddof=1) / np.sqrt(len(value))


def mixture(process):
    return analytic.gaussian_mixture(
        process, jnp.array([0.3, 0.7]), jnp.array([[-0.8, 0.2], [0.5, 0.6]]), jnp.array([0.3, 0.5])
    )


@pytest.mark.slow_but("ve", "rectified")
@pytest.mark.parametrize("name", CASES)
def test_density_bound_is_the_density_for_the_exact_field_and_end(name):
    """For every process and kind, at one x: equality with the density, and errors that say how far the draws spread."""
    process, kind = CASES[name]
    batch = 1024
    x = jnp.broadcast_to(jnp.array([[0.1, 0.7]]), (batch, 2))

    @jax.jit
    def run(key):
        data = mixture(process)
        field = predictions.reparameterise(process, data.denoise, "x0", kind)
        end = lambda z: data.log_prob(z, bounds.end_time(process))
        bound = bounds.density_bound(key, process, field, x, predict=kind, draws=256, prior_log_prob=end)
        return bound, data.log_prob(x[:1], process.t_min)

    bound, want = run(jax.random.key(0))
    mean, error = mean_and_error(bound.value)
    assert error < 0.08 and abs(mean - float(want[0])) < 4 * error
    # The reported error is that of one example; a trend between strata may add to it.
    assert 0.9 < np.sqrt(np.mean(bound.error**2)) / np.std(bound.value) < 1.15
    np.testing.assert_allclose(bound.value, bound.reconstruction - bound.prior - bound.diffusion, rtol=1e-5, atol=1e-4)


def test_density_bound_and_ode_coincide():
    """The one number by two ways: reverse SDE (bound) and probability flow, with the process's own prior."""
    process = jdiff.VP()
    data = mixture(process)
    x = jnp.tile(data.sample(jax.random.key(1), 4), (512, 1))
    bound = jax.jit(lambda key: bounds.density_bound(key, process, data.score, x, draws=256))(jax.random.key(0))
    ode = jax.jit(lambda: jdiff.log_likelihood(None, process, data.score, x[:4], divergence="exact"))()
    for i in range(4):
        mean, error = mean_and_error(bound.value[i::4])
        # The process's prior is not the exact end: the two differ by some 1e-4 nats.
        assert error < 0.12 and abs(mean - float(ode.log_prob[i])) < 4 * error + 1e-3


def linear_field(c, std, process):
    """A score c times too large for x_0 ~ N(0, std^2): not the score of any diffused data."""

    def field(x, t):
        alpha, sigma = (v[:, None] for v in process.marginal(t))
        return -c * x / (alpha**2 * std**2 + sigma**2)

    return field


def coefficients(process, t):
    """alpha, sigma, alpha'/alpha, g^2 in NumPy, VP only."""
    beta = process.beta_min + t * (process.beta_max - process.beta_min)
    b = t * (process.beta_min + 0.5 * t * (process.beta_max - process.beta_min))
    return np.exp(-b / 2), np.sqrt(-np.expm1(-b)), -beta / 2, beta


@pytest.mark.parametrize("s", [1e-3, 0.3])
def test_density_bound_of_a_wrong_field(s):
    """Its expectation is the theorem's integral by quadrature, and stays below the density of the reverse SDE.

    At s = 0.3 noise outweighs data, and the integral near s matters too.
    """
    process, c, std, x0 = EIGHT, 0.5, 0.6, 0.9
    field = linear_field(c, std, process)
    x = jnp.full((2048, 1), x0)
    bound = jax.jit(lambda key: bounds.density_bound(key, process, field, x, draws=256, t_min=s))(jax.random.key(0))
    mean, error = mean_and_error(bound.value)
    end = process.t_max
    alpha_s, sigma_s, *_ = coefficients(process, s)

    def second_moment(t):
        alpha, sigma, *_ = coefficients(process, t)
        a = alpha / alpha_s
        return (a * x0) ** 2 + sigma**2 - (a * sigma_s) ** 2

    def rate(t):
        alpha, sigma, f, g2 = coefficients(process, t)
        slope = -c / (alpha**2 * std**2 + sigma**2)
        return f - g2 * (0.5 * slope**2 * second_moment(t) + slope)

    grid = np.geomspace(s, end, 40_001)
    integral = scipy.integrate.simpson([rate(t) for t in grid], x=grid)
    expected = -0.5 * second_moment(end) - 0.5 * np.log(2 * np.pi) + integral
    assert error < 0.03 and abs(mean - expected) < 4 * error

    def variance(tau, v):
        alpha, sigma, f, g2 = coefficients(process, end - tau)
        return 2 * (-f - g2 * c / (alpha**2 * std**2 + sigma**2)) * v + g2

    v = scipy.integrate.solve_ivp(variance, (0, end - s), [1.0], rtol=1e-10, atol=1e-12, method="LSODA").y[0, -1]
    log_prob = scipy.stats.norm.logpdf(x0, scale=np.sqrt(v))
    assert expected < log_prob - 0.05 and mean + 4 * error < log_prob


def brute_force(process, ts, k, std, variance, c=1.0):
    """The T-step bound of one entry in NumPy: conditionals from joint Gaussians, expectations by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    center = lambda k: 2 * (k + 0.5) / 4 - 1
    x0, total, model_mean, model_var = center(k), 0.0, 0.0, 1.0
    for t, s in itertools.pairwise(ts):
        (at, st, *_), (as_, ss, *_) = coefficients(process, t), coefficients(process, s)
        a = at / as_
        cov = a * ss**2  # of x_s and x_t given x_0
        gain = cov / st**2
        q_var = ss**2 - cov**2 / st**2
        p_var = q_var if variance == "posterior" else st**2 - (a * ss) ** 2
        x = at * x0 + st * nodes
        slope = c * at * std**2 / (at**2 * std**2 + st**2)
        kl = 0.5 * (q_var / p_var - 1 + np.log(p_var / q_var))
        kl = kl + 0.5 * ((as_ - gain * at) * (x0 - slope * x)) ** 2 / p_var
        total += np.sum(weights * kl)
        move = as_ * slope + gain * (1 - at * slope)
        model_mean, model_var = move * model_mean, move**2 * model_var + p_var
    a0, s0, *_ = coefficients(process, ts[-1])
    aT, sT, *_ = coefficients(process, ts[0])

    def log_decode(z):
        logits = np.stack([-0.5 * ((z - a0 * center(j)) / s0) ** 2 for j in range(4)])
        return logits[k] - scipy.special.logsumexp(logits, axis=0)

    reconstruction = np.sum(weights * log_decode(a0 * x0 + s0 * nodes))
    prior = 0.5 * ((aT * x0) ** 2 + sT**2 - 1) - np.log(sT)
    z = np.linspace(-12, 12, 200_001) * np.sqrt(model_var)
    density = scipy.stats.norm.pdf(z, scale=np.sqrt(model_var))
    log_p = np.log(scipy.integrate.trapezoid(density * np.exp(log_decode(z)), z))
    return reconstruction - prior - total, prior, total, log_p


def linear_run(ts, variance="posterior", draws=None, batch=4096, c=1.0, **options):
    std = 0.6

    @jax.jit
    def run(key, ts):
        def field(x, t):
            alpha, sigma = (v[:, None] for v in EIGHT.marginal(t))
            return c * alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x

        k = jnp.full((batch, 1), 2)
        more = {} if ts is None else {"ts": ts, "variance": variance}
        return bounds.level_bound(key, EIGHT, field, k, LEVELS, predict="x0", draws=draws, **more, **options)

    return run(jax.random.key(0), ts)


@pytest.mark.slow_but("None-posterior", "2-forward")
@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("draws", [None, 2])
def test_a_few_steps_equal_brute_force(variance, draws):
    ts = jnp.array([1.0, 0.5, 0.3, 0.05])
    for c in (1.0, 0.6):
        bound = linear_run(ts, variance, draws, c=c)
        expected, prior, total, log_p = brute_force(EIGHT, np.asarray(ts, np.float64), 2, 0.6, variance, c)
        mean, error = mean_and_error(bound.value)
        assert error < 0.05 and abs(mean - expected) < 4 * error
        diffusion, error = mean_and_error(bound.diffusion)
        assert abs(diffusion - total) < 4 * error + 1e-5
        np.testing.assert_allclose(bound.prior, prior, rtol=1e-4, atol=1e-6)
        assert expected < log_p


def test_more_steps_are_better_up_to_continuous_time():
    """For the exact field of Gaussian data each refinement of the grid raises the bound; the limit is continuous."""
    exact = {}
    for n in (2, 16, 128, 256):
        grid = np.asarray(times.uniform_log_snr(EIGHT, n), np.float64)
        exact[n] = brute_force(EIGHT, grid, 2, 0.6, "posterior")[0]
        if n == 16:
            for draws in (None, 8):
                bound = linear_run(jnp.asarray(grid, jnp.float32), draws=draws)
                mean, error = mean_and_error(bound.value)
                assert abs(mean - exact[n]) < 4 * error
                assert 0.95 < np.sqrt(np.mean(bound.error**2)) / np.std(bound.value) < 1.3
    assert sorted(exact, key=exact.get) == [2, 16, 128, 256] and exact[2] < exact[256] - 1
    # The gap shrinks as 1/T: extrapolated, the steps reach the continuous bound.
    limit = 2 * exact[256] - exact[128]
    mean, error = mean_and_error(linear_run(None, draws=128).value)
    assert error < 0.02 and abs(mean - limit) < 4 * error
    assert mean > exact[256] + 4 * error


def test_level_bound_of_the_exact_field_is_the_entropy_of_its_start():
    """-prior - diffusion = -KL(q(z_tmin | x_0) || p_tmin) with the exact field and end (the chain rule of KL)."""
    process = jdiff.Rectified(t_min=0.02)
    k = jnp.broadcast_to(jnp.array([[2, 3]]), (4096, 2))

    @jax.jit
    def run(key):
        data = mixture(process)
        end = lambda z: data.log_prob(z, bounds.end_time(process))
        bound = bounds.level_bound(key, process, data.denoise, k, LEVELS, predict="x0", draws=64, prior_log_prob=end)
        x = LEVELS.center(k)
        noise = jax.random.normal(jax.random.fold_in(key, 1), x.shape)
        z = jdiff.processes.perturb(process, x, noise, process.t_min)
        log_q = jnp.sum(-0.5 * noise**2 - jnp.log(0.02) - 0.5 * jnp.log(2 * jnp.pi), axis=1)
        return -bound.prior - bound.diffusion, data.log_prob(z, process.t_min) - log_q

    (got, error), (want, other) = map(mean_and_error, run(jax.random.key(0)))
    assert np.hypot(error, other) < 0.06 and abs(got - want) < 4 * np.hypot(error, other)


def test_the_prior_s_cost_in_closed_form_is_the_estimated_one():
    """Of a prior that is wider than the data by little, so that every term of it counts."""
    process = jdiff.VE(sigma_max=1.5)
    x = jnp.broadcast_to(jnp.array([[0.9, -0.4]]), (2048, 2))
    k = jnp.broadcast_to(jnp.array([[3, 1]]), (2048, 2))

    @jax.jit
    def run(key):
        data = mixture(process)
        given = {"draws": 16, "prior_log_prob": lambda z: jdiff.processes.prior_log_prob(process, z)}
        density = lambda **more: bounds.density_bound(key, process, data.score, x, t_min=0.5, **more).prior
        level = lambda **more: bounds.level_bound(key, process, data.score, k, LEVELS, **more).prior
        return [(f(draws=2)[0], f(**given)) for f in (density, level)]

    for exact, estimates in run(jax.random.key(0)):
        mean, error = mean_and_error(estimates)
        assert error < 0.02 and abs(mean - float(exact)) < 4 * error


def test_steps_reach_the_end_where_alpha_is_zero():
    process = jdiff.Rectified(t_min=1e-3)
    data = mixture(process)
    k = jnp.zeros((4, 2), jnp.int32)
    ts = times.linear(process, 8)
    bound = bounds.level_bound(jax.random.key(0), process, data.denoise, k, LEVELS, predict="x0", draws=4, ts=ts)
    assert np.all(np.isfinite(bound.value)) and np.all(np.isfinite(bound.error))
    np.testing.assert_allclose(bound.prior, 0, atol=1e-6)


def test_decoders():
    """Both are distributions over levels; the posterior one is q(z | k) normalised, the other integrates a normal."""
    z = jnp.array([[0.3], [-0.2], [1.7]])
    t = jnp.full((3,), 0.1)
    alpha, sigma = (float(c[0]) for c in EIGHT.marginal(t))
    each = [np.full((3, 1), k, np.int32) for k in range(4)]
    decode = jax.jit(lambda k: bounds.decode(EIGHT, z, t, k, LEVELS))
    posterior = np.stack([np.exp(decode(k)) for k in each])
    centers = np.array([-0.75, -0.25, 0.25, 0.75])[:, None]
    q = scipy.stats.norm.pdf(np.asarray(z)[:, 0][None], alpha * centers, sigma)
    np.testing.assert_allclose(posterior, q / q.sum(axis=0), rtol=1e-4)
    # In half precision z alone is rounded.
    half = z.astype(jnp.bfloat16)
    found = (bounds.decode(EIGHT, z, t, each[1], LEVELS) for z in (half, half.astype(jnp.float32)))
    np.testing.assert_array_equal(*found)
    decode_cells = jax.jit(bounds.decode_cells, static_argnums=3)
    cells = np.stack([np.exp(decode_cells(z, np.full(3, 0.4, np.float32), k, LEVELS)) for k in each])
    edges = np.array([-np.inf, -0.5, 0, 0.5, np.inf])[:, None]
    want = np.diff(scipy.stats.norm.cdf(edges, np.asarray(z)[:, 0][None], 0.4), axis=0)
    np.testing.assert_allclose(cells, want, rtol=1e-4)
    far = decode_cells(
        *(np.full(shape, value, np.float32) for shape, value in (((3, 1), -0.9), (3, 0.05))), each[3], LEVELS
    )
    np.testing.assert_allclose(far, np.full(3, scipy.stats.norm.logsf(0.5, -0.9, 0.05)), rtol=1e-4)


def test_cells_decoder_uses_the_field_at_the_start():
    bound = linear_run(jnp.array([1.0, 0.5, 0.3]), decoder="cells")
    a, s, *_ = coefficients(EIGHT, 0.3)
    slope = a * 0.36 / (a**2 * 0.36 + s**2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    mean = slope * (a * 0.25 + s * nodes)
    log_p = np.log(np.diff(scipy.stats.norm.cdf([0, 0.5], mean[:, None], s / a))[:, 0])
    got, error = mean_and_error(bound.reconstruction)
    assert abs(got - np.sum(weights * log_p) / weights.sum()) < 4 * error


def test_fields_of_level_bound_see_times_of_the_images_dtype():
    seen = set()

    def field(x, t):
        seen.add((x.dtype.name, t.dtype.name, t.shape))
        return x

    options = {"predict": "x0", "decoder": "cells", "draws": 2, "dtype": jnp.bfloat16}
    bound = lambda key, k: bounds.level_bound(key, EIGHT, field, k, LEVELS, **options).value
    jax.eval_shape(bound, jax.random.key(0), jnp.zeros((3, 2), jnp.uint8))
    assert seen == {("bfloat16", "bfloat16", (3,))}


def test_examples_depend_on_their_own_key_alone():
    process = jdiff.VP()
    data = mixture(process)
    keys = jax.random.split(jax.random.key(0), 6)
    x = data.sample(jax.random.key(1), 6)
    k = LEVELS.inverse(x)
    ts = times.linear(process, 6)
    traces = []

    @jax.jit
    def run(keys, x, k):
        traces.append(1)
        return (
            bounds.density_bound(keys, process, data.score, x, draws=4),
            bounds.level_bound(keys, process, data.score, k, LEVELS, draws=4),
            bounds.level_bound(keys, process, data.score, k, LEVELS, draws=3, ts=ts),
        )

    whole, part = run(keys, x, k), run(keys[::-1], x[::-1], k[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[::-1], rtol=1e-4, atol=1e-4), whole, part)
    assert len(traces) == 1


def test_bad_arguments():
    process, key = jdiff.VP(), jax.random.key(0)
    data = mixture(process)
    x, k, ts = jnp.zeros((3, 2)), jnp.zeros((3, 2), jnp.int32), jnp.array([1.0, 0.5, 0.1])
    density = lambda x=x, key=key, **more: bounds.density_bound(key, process, data.score, x, **more)
    level = lambda k=k, **more: bounds.level_bound(key, process, data.score, k, LEVELS, **more)
    for call, match in [
        (lambda: density(draws=0), "draws"),
        (lambda: density(t_min=0.0), "t_min"),
        (lambda: density(t_min=1.0), "t_min"),
        (lambda: density(predict="noise"), "kind"),
        (lambda: level(variance="both", ts=ts), "variance"),
        (lambda: level(variance="forward"), "ancestral"),
        (lambda: level(decoder="none"), "decoder"),
        (lambda: level(draws=3, ts=ts), "draws"),
        (lambda: level(draws=2, ts=ts[::-1]), "decrease"),
        (lambda: level(draws=2, ts=ts, t_min=0.1), "t_min"),
        (lambda: level(draws=2, ts=ts - 0.1), "ts must be in"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    for call in (density, level):
        with pytest.raises(TypeError, match="draws must be an integer"):
            call(draws=None)
    with pytest.raises(TypeError, match="integer"):
        level(x)
    with pytest.raises(TypeError, match="typed key"):
        density(key=jax.random.PRNGKey(0))
