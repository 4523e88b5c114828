"""Distances between samples and Gaussians, against closed forms, SciPy and permutations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats

from jdiff import metrics


def gaussians(size=3):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(2, size))
    roots = rng.normal(size=(2, size, size))
    return means, roots @ roots.swapaxes(1, 2) + 0.3 * np.eye(size)


def test_energy_distance_is_its_definition(x64):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(37, 2, 2)), rng.normal(size=(23, 2, 2)) + 0.5
    flat = x.reshape(37, -1), y.reshape(23, -1)
    within = [scipy.spatial.distance.pdist(part).mean() for part in flat]
    want = 2 * scipy.spatial.distance.cdist(*flat).mean() - sum(within)
    assert float(metrics.energy_distance(jnp.array(x), jnp.array(y))) == pytest.approx(want, rel=1e-12)


def test_energy_distance_without_bias(x64):
    """Of two normals in one dimension it is known; over 200 draws the mean agrees within four standard errors."""
    rng = np.random.default_rng(2)
    distance = jax.jit(metrics.energy_distance)
    for shift in (0.0, 0.7):
        got = [float(distance(*(jnp.array(rng.normal(size=(40, 1)) + s) for s in (0.0, shift)))) for _ in range(200)]
        spread = scipy.stats.norm(0, np.sqrt(2))
        # E|N(m, 2)| by quadrature.
        mean_abs = lambda m: scipy.stats.norm(m, np.sqrt(2)).expect(abs, lb=-20, ub=20)
        want = 2 * mean_abs(shift) - 2 * spread.expect(abs, lb=-20, ub=20)
        assert np.mean(got) == pytest.approx(want, abs=4 * np.std(got) / np.sqrt(200))


def test_energy_distance_has_a_gradient(x64):
    x, y = (jnp.array(np.random.default_rng(seed).normal(size=(5, 2))) for seed in (0, 1))
    gradient = jax.grad(metrics.energy_distance)(x, y)
    nudge = jnp.zeros_like(x).at[2, 1].set(1e-6)
    difference = (metrics.energy_distance(x + nudge, y) - metrics.energy_distance(x - nudge, y)) / 2e-6
    assert float(gradient[2, 1]) == pytest.approx(float(difference), rel=1e-5)


def test_gaussian_w2_against_the_matrix_root(x64):
    means, covariances = gaussians()
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    want = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances.sum(axis=0) - 2 * root)
    got = metrics.gaussian_w2(means[0], jnp.array(covariances[0]), means[1], jnp.array(covariances[1]))
    assert float(got) == pytest.approx(want, rel=1e-10)
    assert float(metrics.gaussian_w2(means[0], covariances[0], means[0], covariances[0])) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_samples(x64):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(50, 4)), rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4))
    want = metrics.gaussian_w2(x.mean(axis=0), np.cov(x.T), y.mean(axis=0), np.cov(y.T))
    assert float(metrics.frechet_distance(jnp.array(x), jnp.array(y))) == pytest.approx(float(want), rel=1e-10)
    # One feature: (m - m')^2 + (s - s')^2.
    a, b = x[:, :1], y[:, :1]
    want = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert float(metrics.frechet_distance(jnp.array(a), jnp.array(b))) == pytest.approx(want, rel=1e-10)


def test_gaussian_kl_against_samples(x64):
    means, covariances = gaussians()
    laws = [scipy.stats.multivariate_normal(m, c) for m, c in zip(means, covariances)]
    x = laws[0].rvs(200_000, random_state=0)
    ratio = laws[0].logpdf(x) - laws[1].logpdf(x)
    got = float(metrics.gaussian_kl(means[0], covariances[0], means[1], covariances[1]))
    assert got == pytest.approx(ratio.mean(), abs=4 * ratio.std() / np.sqrt(len(x)))
    assert float(metrics.gaussian_kl(means[0], covariances[0], means[0], covariances[0])) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("function", [metrics.energy_distance, metrics.frechet_distance])
def test_bad_input(function):
    with pytest.raises(ValueError, match="of one shape"):
        function(jnp.ones((3, 2)), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="at least two"):
        function(jnp.ones((1, 2)), jnp.ones((3, 2)))
    for other in (metrics.gaussian_w2, metrics.gaussian_kl):
        with pytest.raises(ValueError, match="two means"):
            other(jnp.ones(3), jnp.ones(3), jnp.ones(3), jnp.eye(3))
    with pytest.raises(TypeError, match="floating point"):
        function(jnp.ones((3, 2), int), jnp.ones((3, 2)))


def test_psnr(x64):
    x = jnp.array([[[0.0, 1.0]], [[1.0, 1.0]]])
    y = jnp.array([[[0.1, 0.9]], [[1.0, 0.0]]])
    np.testing.assert_allclose(metrics.psnr(x, y, 1.0), [20.0, 10 * np.log10(2)])
    np.testing.assert_allclose(metrics.psnr(2 * x, 2 * y, 2.0), metrics.psnr(x, y, 1.0))
    half = metrics.psnr(jnp.full((2, 3), 300, jnp.float16), jnp.zeros((2, 3), jnp.float16), 300)
    np.testing.assert_array_equal(half, [0, 0])  # whose squares are above all numbers of float16
    with pytest.raises(ValueError, match="the shape of x"):
        metrics.psnr(x, y[:1], 1.0)
