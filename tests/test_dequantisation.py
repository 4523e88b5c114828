import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import jdiff
from jdiff import dequantisation
from jdiff.transforms import DataTransform, bits_per_dim

TRANSFORMS = [DataTransform(levels=17), DataTransform(levels=8, centered=False)]


def levels(transform, shape=(64, 5)):
    return jax.random.randint(jax.random.key(5), shape, 0, transform.levels)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_uniform_is_the_transform(transform):
    k = levels(transform)
    x, log_q = dequantisation.uniform(jax.random.key(0), transform, k)
    np.testing.assert_array_equal(transform.inverse(x), k)
    np.testing.assert_array_equal(x, transform.forward(transform.dequantise(jax.random.key(0), k)))
    log_p = -0.5 * jnp.sum(x**2, axis=1)
    got = dequantisation.level_bits(log_p - log_q, (5,))
    np.testing.assert_allclose(got, bits_per_dim(log_p, transform, (5,)), rtol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tau", [0.01, 0.7, 3.0, 12.0])
def test_truncated_normal_is_scipy_s(transform, tau):
    """Draws and log-density of every entry against scipy.stats.truncnorm, for a process with alpha below 1."""
    process = jdiff.VP()
    t = dequantisation.start_time(process, transform, tau)
    alpha, sigma = (float(c) for c in process.marginal(t))
    half = 0.5 * transform.width
    assert np.isclose(alpha * half / sigma, tau, rtol=1e-4)
    k = levels(transform)
    x, log_q = dequantisation.truncated_normal(jax.random.key(0), transform, k, process, t)
    c = np.asarray(transform.center(k), np.float64)
    ends = (-alpha * half / sigma, alpha * half / sigma)
    x64 = np.asarray(x, np.float64)
    # Entries at the very end may round across it.
    inside = np.clip((x64 - alpha * c) / sigma, *ends)
    law = scipy.stats.truncnorm(*ends)
    np.testing.assert_allclose(log_q, np.sum(law.logpdf(inside) - np.log(sigma), axis=1), rtol=1e-3, atol=5e-3)
    assert scipy.stats.kstest(inside.ravel(), law.cdf).pvalue > 1e-3
    np.testing.assert_array_equal(transform.inverse(x / jnp.float32(alpha)), k)


def test_a_density_of_draws_in_half_precision_is_of_float32():
    process, transform, t = jdiff.VP(), TRANSFORMS[0], 0.02
    k, key = levels(transform), jax.random.split(jax.random.key(0), len(levels(transform)))
    alpha, sigma = (float(c) for c in process.marginal(jnp.asarray(t)))
    tau = 0.5 * transform.width * alpha / sigma
    half = lambda a: jnp.asarray(a, jnp.bfloat16)
    draw = lambda key: jax.random.truncated_normal(key, half(-tau), half(tau), k.shape[1:], jnp.bfloat16)
    z = np.float64(jax.vmap(draw)(key))
    log_q = dequantisation.truncated_normal(key, transform, k, process, t, dtype=jnp.bfloat16)[1]
    norm = math.log(sigma * math.sqrt(2 * math.pi) * math.erf(float(half(tau)) / math.sqrt(2)))
    want = -0.5 * np.sum(z**2, axis=1) - k[0].size * norm
    np.testing.assert_allclose(log_q, want, rtol=1e-5)


def test_a_wide_normal_is_uniform_and_a_narrow_one_normal():
    transform, process = TRANSFORMS[0], jdiff.VE(sigma_min=1e-4, sigma_max=50.0)
    k = levels(transform)
    _, uniform = dequantisation.uniform(jax.random.key(0), transform, k)
    _, wide = dequantisation.truncated_normal(jax.random.key(0), transform, k, process, 0.99)
    np.testing.assert_allclose(wide, uniform, atol=1e-4)
    x, narrow = dequantisation.truncated_normal(jax.random.key(0), transform, k, process, 0.1)
    sigma = float(process.marginal(0.1)[1])
    want = scipy.stats.norm.logpdf(np.asarray(x), np.asarray(transform.center(k)), sigma).sum(axis=1)
    np.testing.assert_allclose(narrow, want, rtol=2e-3)


def problem():
    """One entry of level 2 of 4 under N(0.1, 0.3^2) at t: the probability of its cell is known."""
    process, transform = jdiff.VP(), DataTransform(levels=4)
    t = dequantisation.start_time(process, transform, 1.0)
    alpha = float(process.marginal(t)[0])
    log_p = lambda x: jax.scipy.stats.norm.logpdf(x[:, 0], 0.1, 0.3)
    probability = {
        "uniform": np.diff(scipy.stats.norm.cdf([0, 0.5], 0.1, 0.3))[0],
        "truncated": np.diff(scipy.stats.norm.cdf([0, alpha * 0.5], 0.1, 0.3))[0],
    }
    return process, transform, t, log_p, probability


@pytest.mark.parametrize("name", ["uniform", "truncated"])
def test_bound_is_unbiased_for_the_probability_and_rises_with_the_draws(name):
    """E[p/q] = P(k); E log of the mean of K weights rises to log P(k), by as much as quadrature says for K = 1."""
    process, transform, t, log_p, probability = problem()
    k = jnp.full((4096, 1), 2)

    @jax.jit
    def weights(key):
        if name == "uniform":
            x, log_q = dequantisation.uniform(key, transform, k)
        else:
            x, log_q = dequantisation.truncated_normal(key, transform, k, process, t)
        return log_p(x) - log_q

    w = jnp.stack([weights(jax.random.key(n)) for n in range(32)])
    ratio = np.exp(np.asarray(w, np.float64))
    log_probability = np.log(probability[name])
    assert abs(ratio.mean() - probability[name]) < 4 * ratio.std() / np.sqrt(ratio.size)
    bounds = [np.asarray(dequantisation.importance_weighted(w[:n]), np.float64) for n in (1, 2, 8, 32)]
    means = [b.mean() for b in bounds]
    assert means == sorted(means) and means[0] < log_probability - 0.01
    assert abs(means[-1] - log_probability) < 4 * bounds[-1].std() / 64 + 2e-3
    assert means[-1] < log_probability + 4 * bounds[-1].std() / 64
    np.testing.assert_array_equal(dequantisation.importance_weighted(w[:1]), w[0])
    if name == "uniform":
        u = np.linspace(0, 0.5, 10_001)
        expected = scipy.integrate.simpson(scipy.stats.norm.logpdf(u, 0.1, 0.3), x=u) / 0.5 + np.log(0.5)
        assert abs(np.mean(w) - expected) < 4 * np.std(w) / np.sqrt(w.size)


def test_example_i_depends_on_key_i():
    transform, process = TRANSFORMS[0], jdiff.SubVP()
    k, keys = levels(transform), jax.random.split(jax.random.key(0), 64)
    whole = dequantisation.truncated_normal(keys, transform, k, process, 1e-2)
    part = dequantisation.truncated_normal(keys[5:9], transform, k[5:9], process, jnp.full((4,), 1e-2))
    np.testing.assert_array_equal(whole.x[5:9], part.x)
    np.testing.assert_allclose(whole.log_q[5:9], part.log_q, rtol=1e-6)


def test_bad_arguments():
    transform, process = TRANSFORMS[0], jdiff.VP()
    with pytest.raises(TypeError, match="integer"):
        dequantisation.truncated_normal(jax.random.key(0), transform, jnp.zeros((2, 3)), process, 0.1)
    with pytest.raises(ValueError, match="tau"):
        dequantisation.start_time(process, transform, 0.0)
    with pytest.raises(ValueError, match="draws, batch"):
        dequantisation.importance_weighted(jnp.zeros(3))
