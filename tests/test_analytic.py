import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import jdiff
from jdiff import analytic

PROCESSES = [jdiff.VP(), jdiff.SubVP(), jdiff.VE(), jdiff.EDM(), jdiff.Cosine(), jdiff.Rectified()]
WEIGHTS, MEANS, STDS = np.array([0.2, 0.5, 0.3]), np.array([[-1.5], [0.2], [1.0]]), np.array([0.3, 0.5, 0.1])


def times(process):
    return process.t_max * np.array([0.01, 0.2, 0.6, 0.98])


def numbers(process, t):
    alpha, sigma = process.marginal(t)
    return float(alpha), float(sigma)


def integral(x, t, process, moment):
    """int x_0^moment p(x_0) N(x_t; alpha x_0, sigma^2) dx_0 for the mixture, by quadrature."""
    alpha, sigma = numbers(process, t)

    def integrand(x0):
        prior = sum(w * scipy.stats.norm.pdf(x0, m[0], s) for w, m, s in zip(WEIGHTS, MEANS, STDS))
        return x0**moment * prior * scipy.stats.norm.pdf(x, alpha * x0, sigma)

    # Where either factor peaks, the quadrature must look.
    points = sorted([*MEANS[:, 0], *([x / alpha] if alpha > 0.05 and abs(x / alpha) < 8 else [])])
    return scipy.integrate.quad(integrand, -8, 8, points=points, epsabs=1e-13, epsrel=1e-11, limit=400)[0]


@pytest.mark.slow_but("process0", "process2", "process5")
@pytest.mark.parametrize("process", PROCESSES)
def test_mixture_against_quadrature(x64, process):
    """The density of x_t and the posterior mean of x_0 by their defining integrals; the score by differentiation."""
    data = analytic.gaussian_mixture(process, WEIGHTS, MEANS, STDS)
    t = times(process)
    x = np.array([[0.4], [-0.9], [0.7], [-0.3]])
    mass = np.array([integral(*pair, process, 0) for pair in zip(x[:, 0], t)])
    first = np.array([integral(*pair, process, 1) for pair in zip(x[:, 0], t)])
    np.testing.assert_allclose(data.log_prob(x, t), np.log(mass), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(data.denoise(x, t)[:, 0], first / mass, rtol=1e-7, atol=1e-8)
    gradient = jax.grad(lambda x: jnp.sum(data.log_prob(x, t)))(x)
    np.testing.assert_allclose(data.score(x, t), gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES)
def test_mixture_of_images(x64, process):
    """Event axes, per-example times and scalar times: against scipy, example by example, and Tweedie's formula."""
    rng = np.random.default_rng(0)
    means, stds, weights = rng.normal(size=(3, 2, 4)), np.array([0.3, 0.6, 1.1]), np.array([1.0, 2.0, 5.0])
    data = analytic.gaussian_mixture(process, weights, means, stds)
    x, t = rng.normal(size=(4, 2, 4)), times(process)
    got = data.log_prob(x, t)
    for i in range(4):
        alpha, sigma = numbers(process, t[i])
        want = 0.0
        for weight, mean, std in zip(weights / weights.sum(), means, stds):
            want += weight * np.exp(scipy.stats.norm.logpdf(x[i], alpha * mean, np.hypot(alpha * std, sigma)).sum())
        np.testing.assert_allclose(got[i], np.log(want), rtol=1e-10)
    alpha, sigma = (np.asarray(c)[:, None, None] for c in process.marginal(t))
    np.testing.assert_allclose(data.denoise(x, t), (x + sigma**2 * data.score(x, t)) / alpha, rtol=1e-7, atol=1e-8)
    gradient = jax.grad(lambda x: jnp.sum(data.log_prob(x, t)))(x)
    np.testing.assert_allclose(data.score(x, t), gradient, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(data.score(x, t[1])[1], data.score(x, t)[1], rtol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
def test_gaussian(x64, process):
    rng = np.random.default_rng(1)
    mean, std = rng.normal(size=(2, 3)), rng.uniform(0.1, 2, size=(2, 3))
    data = analytic.gaussian(process, mean, std)
    x, t = rng.normal(size=(4, 2, 3)), times(process)
    alpha, sigma = (np.asarray(c)[:, None, None] for c in process.marginal(t))
    spread = np.sqrt((alpha * std) ** 2 + sigma**2)
    want = scipy.stats.norm.logpdf(x, alpha * mean, spread).sum((1, 2))
    np.testing.assert_allclose(data.log_prob(x, t), want, rtol=1e-11)
    np.testing.assert_allclose(data.score(x, t), -(x - alpha * mean) / spread**2, rtol=1e-12)
    np.testing.assert_allclose(data.denoise(x, t), (x + sigma**2 * data.score(x, t)) / alpha, rtol=1e-7, atol=1e-9)
    # The mixture of one component is the Gaussian.
    one = analytic.gaussian_mixture(process, [1.0], mean[None], 0.7)
    same = analytic.gaussian(process, mean, 0.7)
    for name in ("denoise", "score", "log_prob"):
        np.testing.assert_allclose(getattr(one, name)(x, t), getattr(same, name)(x, t), rtol=1e-10)


@pytest.mark.slow_but("process0")
@pytest.mark.parametrize("process", [jdiff.VP(), jdiff.EDM(), jdiff.Rectified()])
def test_flow_maps_solve_the_probability_flow(x64, process):
    """Against SciPy's DOP853 on dx/dt = alpha' x_0 + sigma' eps, with the denoiser tested above."""
    mixture = analytic.gaussian_mixture(process, WEIGHTS, MEANS, STDS)
    gaussian = analytic.gaussian(process, np.array([0.5]), 0.4)
    t, s = 0.05 * process.t_max, 0.9 * process.t_max
    x = np.array([[0.4], [-0.9]])
    for data in (mixture, gaussian):

        @jax.jit
        def velocity(t, x, data=data):
            (alpha, sigma), (dalpha, dsigma) = jax.jvp(process.marginal, (t,), (jnp.ones_like(t),))
            x0 = data.denoise(x[:, None], t)[:, 0]
            return dalpha * x0 + dsigma * (x - alpha * x0) / sigma

        flow = scipy.integrate.solve_ivp(velocity, (t, s), x[:, 0], method="DOP853", rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(data.flow(x, t, s)[:, 0], flow.y[:, -1], rtol=1e-8)
        np.testing.assert_allclose(data.flow(data.flow(x, t, s), s, t), x, rtol=1e-7)
        np.testing.assert_allclose(data.flow(x, t, t), x, rtol=1e-12)


def test_flow_of_a_mixture_holds_in_the_tails_in_float32():
    """Ten standard deviations out the cumulative distribution is 0 or 1 in float32, its logit is not."""
    process = jdiff.VP()
    data = analytic.gaussian_mixture(process, jnp.array([0.5, 0.5]), jnp.array([[-1.0], [1.0]]), jnp.array([0.1, 0.1]))
    x = jnp.array([[2.0], [-2.0], [0.3]])
    with jax.enable_x64(True):
        want = jax.jit(data.flow)(np.float64(x), 1e-3, 1.0)
    got = jax.jit(data.flow)(x, 1e-3, 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got[0], -got[1], rtol=1e-5)


def test_samples_follow_their_distribution():
    mean, std = jnp.array([0.5, -1.0]), jnp.array([0.3, 2.0])
    draws = analytic.gaussian(jdiff.VP(), mean, std).sample(jax.random.key(0), 4096)
    for i in range(2):
        want = scipy.stats.norm(float(mean[i]), float(std[i]))
        assert scipy.stats.kstest(np.asarray(draws[:, i]), want.cdf).pvalue > 1e-3
    mixture = analytic.gaussian_mixture(jdiff.VP(), *(jnp.asarray(a, jnp.float32) for a in (WEIGHTS, MEANS, STDS)))
    draws = mixture.sample(jax.random.key(1), 4096)
    cdf = lambda x: sum(w * scipy.stats.norm.cdf(x, m[0], s) for w, m, s in zip(WEIGHTS, MEANS, STDS))
    assert draws.shape == (4096, 1) and scipy.stats.kstest(np.asarray(draws[:, 0]), cdf).pvalue > 1e-3
    keys = jax.random.split(jax.random.key(2), 4)
    np.testing.assert_allclose(mixture.sample(keys, 4)[2:], mixture.sample(keys[2:], 2), rtol=1e-6)


def test_closed_forms_are_exact_where_alpha_is_zero():
    """All of x is noise there: the posterior is the prior."""
    for process in (jdiff.Rectified(), jdiff.Cosine()):
        data = analytic.gaussian_mixture(process, *(jnp.asarray(a, jnp.float32) for a in (WEIGHTS, MEANS, STDS)))
        x = jnp.array([[0.3], [-2.0]])
        np.testing.assert_allclose(data.denoise(x, 1.0), np.full((2, 1), WEIGHTS @ MEANS[:, 0]), rtol=1e-5)
        np.testing.assert_allclose(data.score(x, 1.0), -x, rtol=1e-6)
        np.testing.assert_allclose(data.log_prob(x, 1.0), scipy.stats.norm.logpdf(x[:, 0]), rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\).*got \(2,\)"):
        analytic.gaussian_mixture(jdiff.VP(), np.ones(2, np.float32), np.zeros((3, 1), np.float32), 1.0)
    mixture = analytic.gaussian_mixture(jdiff.VP(), np.ones(2, np.float32), np.zeros((2, 3), np.float32), 1.0)
    with pytest.raises(ValueError, match=r"events of one entry, got event shape \(3,\)"):
        mixture.flow(jnp.ones((2, 3)), 0.1, 0.2)
    with pytest.raises(TypeError, match="typed key"):
        mixture.sample(jax.random.PRNGKey(0), 2)


def test_correlated_gaussian_against_scipy_and_its_diagonal_case(x64):
    """log_prob by SciPy, the score by its derivative, the denoiser by Tweedie, the flow by conserved probability."""
    process, root = jdiff.SubVP(), np.array([[0.8, 0.0], [0.5, 0.3]])
    mean, covariance = np.array([0.4, -0.2]), root @ root.T
    data = analytic.correlated_gaussian(process, mean, covariance)
    x = np.random.default_rng(0).normal(size=(3, 2))
    by_derivative = jax.jit(jax.grad(lambda x, t: data.log_prob(x, t).sum()))
    for t in (0.05, 0.6):
        alpha, sigma = numbers(process, t)
        law = scipy.stats.multivariate_normal(alpha * mean, alpha**2 * covariance + sigma**2 * np.eye(2))
        np.testing.assert_allclose(data.log_prob(x, jnp.asarray(t)), law.logpdf(x))
        score = by_derivative(x, jnp.asarray(t))
        np.testing.assert_allclose(data.score(x, jnp.asarray(t)), score, rtol=1e-9)
        np.testing.assert_allclose(data.denoise(x, jnp.asarray(t)), (x + sigma**2 * score) / alpha, rtol=1e-7)
    moved = lambda x: data.flow(x[None], jnp.asarray(0.05), jnp.asarray(0.6))[0]
    ends, slopes = jax.jit(jax.vmap(lambda x: (moved(x), jax.jacfwd(moved)(x))))(x)
    log_det = np.linalg.slogdet(np.asarray(slopes))[1]
    change = data.log_prob(x, jnp.asarray(0.05)) - data.log_prob(ends, jnp.asarray(0.6))
    np.testing.assert_allclose(change, log_det, rtol=1e-9)
    samples = np.asarray(data.sample(jax.random.key(1), 4000))
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=4 * covariance.max() * np.sqrt(2 / 4000))
    with pytest.raises(ValueError, match="covariance"):
        analytic.correlated_gaussian(process, mean, np.eye(3))
