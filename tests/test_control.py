"""Guidance by measurements on Gaussian data, whose posteriors are closed forms; formulas against jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import analytic, control, operators, solvers

PROCESSES = [jdiff.VP(), jdiff.SubVP(), jdiff.VE(), jdiff.EDM(), jdiff.Cosine(), jdiff.Rectified()]
MEAN = np.array([0.5, -0.3, 0.2, 0.0])
ROOT = np.array([[0.9, 0, 0, 0], [0.6, 0.5, 0, 0], [-0.3, 0.4, 0.6, 0], [0.2, 0.3, -0.4, 0.3]])
COVARIANCE = ROOT @ ROOT.T
MATRIX = np.array([[1.0, 0.5, 0.0, -0.5], [0.0, 1.0, 1.0, 0.3]])
STD = 0.3
Y = np.array([0.8, -0.6])
OPERATOR = operators.linear(lambda x: x @ jnp.asarray(MATRIX, x.dtype).T, (4,))


def posterior(matrix, y, std, mean=MEAN, covariance=COVARIANCE):
    """Mean and covariance of x_0 given y = matrix x_0 + std n, by the textbook."""
    gain = covariance @ matrix.T @ np.linalg.inv(matrix @ covariance @ matrix.T + std**2 * np.eye(len(matrix)))
    return mean + gain @ (y - matrix @ mean), covariance - gain @ matrix @ covariance


def states(process, t, batch=3):
    alpha, sigma = (float(c) for c in process.marginal(jnp.asarray(t)))
    x = np.sqrt(alpha**2 + sigma**2) * jax.random.normal(jax.random.key(0), (batch, 4), jnp.float64)
    return x, jnp.full((batch,), t)


def repeated(batch):
    return jnp.tile(jnp.asarray(Y)[None], (batch, 1))


@pytest.mark.parametrize(
    "process, kind",
    [*zip(PROCESSES, ["eps", "score", "v", "x0", "velocity", "velocity"]), (PROCESSES[-1], "score")],
    ids=lambda p: p if isinstance(p, str) else type(p).__name__,
)
def test_moment_matching_is_the_posterior_of_gaussian_data(x64, process, kind):
    data = analytic.correlated_gaussian(process, MEAN, COVARIANCE)
    exact = analytic.correlated_gaussian(process, *posterior(MATRIX, Y, STD))
    field = jdiff.reparameterise(process, data.denoise, "x0", kind)
    x0_field = jdiff.reparameterise(process, field, kind, "x0")
    guided = control.moment_matching(process, x0_field, OPERATOR, repeated(3), STD, iterations=2)
    guided, score = jax.jit(guided), jax.jit(jdiff.reparameterise(process, guided, "x0", "score"))
    for t in (process.t_min, process.t_max, 0.03 * process.t_max, 0.3 * process.t_max, 0.7 * process.t_max):
        x, times = states(process, t)
        alpha, sigma = (float(c) for c in process.marginal(jnp.asarray(t)))
        # Where there is less signal than `least`, the answer is that of a time with as little as that.
        loose = alpha < 1e-3 * sigma
        np.testing.assert_allclose(guided(x, times), exact.denoise(x, times), atol=5e-3 if loose else 1e-6)
        if not loose:
            np.testing.assert_allclose(sigma**2 * score(x, times), sigma**2 * exact.score(x, times), atol=1e-6)


def test_moment_matching_with_a_mask_and_a_noise_level_per_example(x64):
    process = jdiff.VP()
    data = analytic.correlated_gaussian(process, MEAN, COVARIANCE)
    known = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    y = known * np.array([[0.3, -1.0, 9, 9], [9, 0.4, 9, 0.1], [9, 9, 9, 9]])
    std = np.array([0.0, 0.5, 0.2])
    operator = operators.mask(jnp.asarray(known), (4,))
    guided = control.moment_matching(process, data.denoise, operator, jnp.asarray(y), jnp.asarray(std))
    x, times = states(process, 0.4)
    for n in range(3):
        rows = np.eye(4)[known[n] == 1]
        exact = analytic.correlated_gaussian(process, *posterior(rows, rows @ y[n], std[n]))
        want = exact.denoise(x, times)[n]
        np.testing.assert_allclose(guided(x, times)[n], want, atol=1e-6)


@pytest.mark.parametrize("process", [jdiff.VP(), jdiff.VE(), jdiff.Rectified()], ids=lambda p: type(p).__name__)
def test_pseudoinverse_is_the_posterior_of_isotropic_data(x64, process):
    spread = 0.6
    data = analytic.gaussian(process, jnp.asarray(MEAN), spread)
    exact = analytic.correlated_gaussian(process, *posterior(MATRIX, Y, STD, covariance=spread**2 * np.eye(4)))
    guided = control.pseudoinverse(process, data.denoise, OPERATOR, repeated(3), STD, sigma_data=spread)
    wrong = control.pseudoinverse(process, data.denoise, OPERATOR, repeated(3), STD)
    for share in (0.05, 0.4):
        x, times = states(process, share * process.t_max)
        want = exact.denoise(x, times)
        np.testing.assert_allclose(guided(x, times), want, atol=1e-6)
        assert float(jnp.abs(wrong(x, times) - want).max()) > 1e-3 or share < 0.1  # a deviation of 1 is not 0.6


def test_pseudoinverse_formula(x64):
    """On a mixture, where nothing is exact: the vjp of the weighted residual, with VP's r = sigma."""
    process, field = jdiff.VP(), _mixture(jdiff.VP())
    x, times = states(process, 0.35)
    guided = control.pseudoinverse(process, field, OPERATOR, repeated(3), STD, scale=jnp.array([0.0, 1.0, 2.0]))
    got = jax.jit(guided)(x, times)
    alpha, sigma = (float(c) for c in process.marginal(jnp.asarray(0.35)))
    one = lambda x, t: field(x[None], t[None])[0]
    values, jacobians = field(x, times), jax.jit(jax.vmap(jax.jacfwd(one)))(x, times)
    for n, scale in enumerate((0.0, 1.0, 2.0)):
        x0, jacobian = np.asarray(values[n]), np.asarray(jacobians[n])
        u = np.linalg.solve(sigma**2 * MATRIX @ MATRIX.T + STD**2 * np.eye(2), Y - MATRIX @ x0)
        np.testing.assert_allclose(got[n], x0 + scale * sigma**2 / alpha * jacobian.T @ MATRIX.T @ u)


def _mixture(process):
    means = jnp.asarray([[1.0, 0.5, 0.0, -0.5], [-0.6, 0.2, 0.3, 0.8]])
    return analytic.gaussian_mixture(process, jnp.array([0.3, 0.7]), means, 0.4).denoise


@pytest.mark.parametrize("process", [jdiff.SubVP(), jdiff.Rectified()], ids=lambda p: type(p).__name__)
def test_dps_adds_the_gradient_of_the_gaussian_likelihood(x64, process):
    """For a measurement that is not linear; the score form by jax.grad of the log-likelihood itself."""
    measure = lambda x: jnp.stack([jnp.sin(x[:, 0] * x[:, 1]), x[:, 2] ** 2 + x[:, 3]], axis=1)
    field, std, scale = _mixture(process), jnp.array([0.3, 0.5, 1.0]), jnp.array([1.0, 0.5, 2.0])
    guided = control.dps(process, field, measure, repeated(3), std, scale=scale)
    x, times = states(process, 0.4)
    log_likelihood = lambda x: -0.5 * jnp.sum((repeated(3) - measure(field(x, times))) ** 2, axis=1) / std**2
    plain = jdiff.reparameterise(process, field, "x0", "score")(x, times)
    want = plain + scale[:, None] * jax.grad(lambda x: log_likelihood(x).sum())(x)
    got = jdiff.reparameterise(process, guided, "x0", "score")(x, times)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_dps_sampler_is_algorithm_one(x64):
    """Ancestral sampling in the notation of the paper, and a step against the gradient of the distance."""
    process, field = jdiff.VP(), _mixture(jdiff.VP())
    x, t, s = states(process, 0.4)[0], jnp.asarray(0.4), jnp.asarray(0.35)
    key, scale = jax.random.split(jax.random.key(1), 3), jnp.array([0.0, 0.3, 1.0])
    step = control.dps_sampler(process, field, OPERATOR.forward, repeated(3), scale).step
    bar_t, bar_s = (float(process.marginal(u)[0]) ** 2 for u in (t, s))
    alpha = bar_t / bar_s
    x0 = field(x, jnp.full((3,), t))
    mean = np.sqrt(alpha) * (1 - bar_s) / (1 - bar_t) * x + np.sqrt(bar_s) * (1 - alpha) / (1 - bar_t) * x0
    z = solvers.white(key, x, t, s)
    ancestral = mean + np.sqrt((1 - bar_s) / (1 - bar_t) * (1 - alpha)) * z
    distance = lambda x: jnp.sqrt(jnp.sum((Y[None] - field(x, jnp.full((3,), t)) @ MATRIX.T) ** 2, axis=1))
    want = ancestral - scale[:, None] * jax.grad(lambda x: distance(x).sum())(x)
    np.testing.assert_allclose(step(key, solvers.State(x), t, s).x, want, rtol=1e-9, atol=1e-9)


def test_dps_sampler_in_half_precision_has_a_distance():
    """Each of 4 entries is 300 away: the gradient of their distance of 600 is 1/2 in each."""
    x = jnp.zeros((2, 4), jnp.float16)
    solver = control.dps_sampler(jdiff.VP(), lambda x, t: x, lambda x: x, x + 300, eta=0.0)
    np.testing.assert_allclose(solver.step(None, solvers.State(x), 0.5, 0.4).x, np.full((2, 4), 0.5), rtol=1e-3)


@pytest.mark.parametrize("method", ["dps", "dps_sampler", "pseudoinverse", "moment_matching"])
def test_one_forward_pass_and_one_vjp_a_step(method):
    """Counted in the program: each sin is a forward pass of the network, each tanh a vjp."""

    @jax.custom_vjp
    def network(x):
        return jnp.sin(x)

    network.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.tanh(x),))
    process, field, y = jdiff.Rectified(), lambda x, t: network(x), jnp.zeros((2, 2))
    if method == "dps_sampler":
        solver = control.dps_sampler(process, field, OPERATOR.forward, y)
    else:
        guided = {
            "dps": lambda: control.dps(process, field, OPERATOR.forward, y, 0.5),
            "pseudoinverse": lambda: control.pseudoinverse(process, field, OPERATOR, y, 0.5),
            "moment_matching": lambda: control.moment_matching(process, field, OPERATOR, y, 0.5, iterations=7),
        }[method]()
        solver = solvers.ddim(process, guided, 1.0)
    run = lambda key, x: solvers.integrate(key, solver, x, jnp.linspace(1, 0.1, 5))[0]
    text = str(jax.make_jaxpr(run)(jax.random.key(0), jnp.ones((2, 4))))
    assert text.count("= sin ") == 1
    # The one in the loop of the conjugate gradients runs 7 times.
    assert text.count("= tanh ") == (2 if method == "moment_matching" else 1)


def _samples(guided, process, number, eta=0.0, steps=200):
    """Samples of a guided x0-field, with ends that are the prior's own."""
    ts = jdiff.times.uniform_log_snr(process, steps, t_min=1e-4)
    flow = solvers.heun(jdiff.probability_flow(process, guided, predict="x0"))
    solver = solvers.ddim(process, guided, eta) if eta else flow
    return jax.jit(lambda key: jdiff.sample(key, process, solver, (number, 4), ts))(jax.random.key(3))


def standard_errors(x, mean, covariance):
    """How many standard errors the samples' mean and covariance are from the given ones, the worst entry of each."""
    n = len(x)
    mean_error = np.sqrt(np.diag(covariance) / n)
    covariance_error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / n)
    return (
        np.abs((x.mean(axis=0) - mean) / mean_error).max(),
        np.abs((np.cov(x.T) - covariance) / covariance_error).max(),
    )


@pytest.mark.slow_but("0.0")
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_moment_matching_samples_the_posterior(x64, eta):
    process = jdiff.VP()
    data = analytic.correlated_gaussian(process, MEAN, COVARIANCE)
    guided = control.moment_matching(process, data.denoise, OPERATOR, repeated(4000), STD, iterations=2)
    x = np.asarray(_samples(guided, process, 4000, eta, 400 if eta else 100))
    mean, covariance = standard_errors(x, *posterior(MATRIX, Y, STD))
    assert mean < 4 and covariance < 4


@pytest.mark.slow
def test_dps_and_pseudoinverse_are_biased(x64):
    """Of correlated data neither samples the posterior; DPS is overconfident (docs/control.md has numbers)."""
    process = jdiff.VP()
    data = analytic.correlated_gaussian(process, MEAN, COVARIANCE)
    mean, covariance = posterior(MATRIX, Y, STD)
    y, spread = repeated(2000), lambda c: np.trace(MATRIX @ c @ MATRIX.T)
    pseudoinverse = control.pseudoinverse(process, data.denoise, OPERATOR, y, STD)
    assert max(standard_errors(np.asarray(_samples(pseudoinverse, process, 2000)), mean, covariance)) > 6
    x = np.asarray(_samples(control.dps(process, data.denoise, OPERATOR.forward, y, STD), process, 2000))
    assert 0.01 < spread(np.cov(x.T)) / spread(covariance) < 0.04


def test_mistakes_are_named():
    process, field = jdiff.VP(), lambda x, t: x
    with pytest.raises(ValueError, match=r"y must have the shape of a measured batch, \(3, 2\); got \(1, 2\)"):
        control.dps(process, field, OPERATOR.forward, jnp.zeros((1, 2)), 1.0)(jnp.zeros((3, 4)), jnp.ones(3))
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        control.moment_matching(process, field, OPERATOR, jnp.zeros((1, 2)), iterations=0)
    with pytest.raises(ValueError, match="std must be positive, got 0"):
        control.dps(process, field, OPERATOR.forward, jnp.zeros((1, 2)), 0.0)
    with pytest.raises(ValueError, match="least must be positive and finite, got 0"):
        control.pseudoinverse(process, field, OPERATOR, jnp.zeros((1, 2)), least=0)
