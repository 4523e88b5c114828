"""Replacement, RePaint, SDEdit and edits in the latent, on Gaussian data whose every law is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import analytic, editing, operators, solvers
from tests.test_control import COVARIANCE, MEAN, posterior, standard_errors

PROCESS = jdiff.VP()
DATA = lambda: analytic.correlated_gaussian(PROCESS, MEAN, COVARIANCE)
KNOWN = np.array([1, 1, 0, 0])
SEEN = np.array([1.2, -0.5, 0.0, 0.0])


def inpainting(batch):
    return operators.mask(jnp.asarray(KNOWN)[None], (4,)), jnp.tile(jnp.asarray(SEEN)[None], (batch, 1))


def grid(steps):
    return jdiff.times.uniform_log_snr(PROCESS, steps, t_min=1e-4)


def drawn(solver, number, steps):
    return np.asarray(jax.jit(lambda k: jdiff.sample(k, PROCESS, solver, (number, 4), grid(steps)))(jax.random.key(5)))


def test_replacement_of_one_step(x64):
    """The measured part of x_s is y at time s; the rest is the solver's; noise that is none leaves y alone."""
    operator, y = inpainting(3)
    inner = solvers.ddim(PROCESS, DATA().denoise, 1.0)
    std = jnp.array([0.0, 0.2, 5.0])
    wrapped = editing.replacement(PROCESS, inner, operator, y, std)
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64)
    keys = jax.random.split(jax.random.key(1), 3)
    folded = [jax.vmap(jax.random.fold_in, (0, None))(keys, n) for n in (0, 1)]
    t, s = jnp.asarray(0.5), jnp.asarray(0.45)
    got = wrapped.step(keys, solvers.State(x), t, s).x
    plain = np.asarray(inner.step(folded[0], solvers.State(x), t, s).x)
    alpha, sigma = (float(c) for c in PROCESS.marginal(s))
    z = np.asarray(solvers.white(folded[1], y, s, s))
    for n, variance in enumerate((sigma**2, sigma**2 - 0.04 * alpha**2)):
        np.testing.assert_allclose(got[n, :2], alpha * SEEN[:2] + np.sqrt(variance) * z[n, :2], rtol=1e-12)
        np.testing.assert_allclose(got[n, 2:], plain[n, 2:], rtol=1e-12)
    np.testing.assert_allclose(got[2], plain[2], rtol=1e-12)  # noisier than the state: it says less than the state
    # d/dstd sqrt(sigma^2 - alpha^2 std^2) z; nothing where nothing is written, nor where sigma and std are 0.
    put = lambda std, s: editing.replacement(PROCESS, inner, operator, y, std).step(keys, solvers.State(x), t, s).x
    by_std = jax.jit(lambda s: jax.jvp(lambda std: put(std, s), (std,), (jnp.ones(3),))[1])
    np.testing.assert_array_equal(by_std(0.0), 0)
    slope = np.asarray(by_std(s))
    want = -(alpha**2) * 0.2 / np.sqrt(sigma**2 - 0.04 * alpha**2) * z[1, :2]
    np.testing.assert_allclose(slope[1, :2], want, rtol=1e-12)
    np.testing.assert_array_equal(np.delete(slope.ravel(), [4, 5]), 0)


def test_replacement_through_an_operator(x64):
    """What is measured of x_s is replaced, and what is orthogonal to it is left alone."""
    shape = (2, 2, 3)
    operator = operators.grey(shape)
    y = jax.random.normal(jax.random.key(0), (2, 2, 2, 1), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, *shape), jnp.float64)
    none = solvers.Solver(solvers.State, lambda keys, state, t, s: state)
    keys, s = jax.random.split(jax.random.key(2), 2), jnp.asarray(0.3)
    got = editing.replacement(PROCESS, none, operator, y).step(keys, solvers.State(x), jnp.asarray(0.4), s).x
    alpha, sigma = (float(c) for c in PROCESS.marginal(s))
    weights = np.array([0.299, 0.587, 0.114])
    z = solvers.white(jax.vmap(jax.random.fold_in, (0, None))(keys, 1), y, s, s)
    want = alpha * y + sigma * np.linalg.norm(weights) * z
    np.testing.assert_allclose(operator.forward(got), want, rtol=1e-12)
    across = np.cross(weights, [1.0, 0.0, 0.0])
    np.testing.assert_allclose(got @ across, x @ across, rtol=1e-12)


def test_replacement_samples_the_posterior_of_independent_entries(x64):
    """The rest then hears nothing of y, rightly; with noise in y the last stretch is the solver's own."""
    mean, stds, std = np.array([0.5, -0.3]), np.array([0.8, 0.6]), 0.4
    data = analytic.gaussian(PROCESS, jnp.asarray(mean), jnp.asarray(stds))
    operator, y = operators.mask(jnp.array([[1, 0]]), (2,)), jnp.tile(jnp.array([[1.2, 0.0]]), (4000, 1))
    solver = editing.replacement(PROCESS, solvers.ddim(PROCESS, data.denoise, 1.0), operator, y, std)
    x = jax.jit(lambda k: jdiff.sample(k, PROCESS, solver, (4000, 2), grid(400)))(jax.random.key(5))
    wanted = posterior(np.array([[1.0, 0.0]]), np.array([1.2]), std, mean, np.diag(stds**2))
    assert max(standard_errors(np.asarray(x), *wanted)) < 4


@pytest.mark.slow
def test_repaint_comes_nearer_to_the_posterior_than_replacement(x64):
    """Correlated entries: replacement is biased, and going back and forth removes most of it, not all."""
    operator, y = inpainting(2000)
    inner = solvers.ddim(PROCESS, DATA().denoise, 1.0)
    mean, covariance = posterior(np.eye(4)[:2], SEEN[:2], 0.0)
    replaced = drawn(editing.replacement(PROCESS, inner, operator, y), 2000, 40)

    @jax.jit
    def again(key):
        start, own = (jax.vmap(jax.random.fold_in, (0, None))(jax.random.split(key, 2000), n) for n in (0, 1))
        x = jdiff.processes.prior_sample(start, PROCESS, (2000, 4), jnp.float64)
        return editing.repaint(own, PROCESS, inner, operator, y, x, grid(40), resamples=10, jump=5)

    repainted = np.asarray(again(jax.random.key(6)))
    np.testing.assert_allclose(repainted[:, :2].mean(axis=0), SEEN[:2], atol=0.01)
    rest = lambda x: np.abs(x[:, 2:].mean(axis=0) - mean[2:]).max()
    error = np.sqrt(covariance[2:, 2:].max() / 2000)
    assert rest(replaced) > 0.1 > 4 * error + 0.02
    assert rest(repainted) < 0.5 * rest(replaced)


def test_repaint_without_a_measurement_keeps_the_law_of_x_t(x64):
    """Between two times in the middle, from an exact start: a wrong ratio or spread on the way back would be seen."""
    operator, y = operators.mask(jnp.zeros((1, 4)), (4,)), jnp.zeros((4000, 4))
    solver = solvers.heun(jdiff.probability_flow(PROCESS, DATA().denoise, predict="x0"))
    ts = jnp.linspace(0.5, 0.25, 25)

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 4000)
        x0, eps = DATA().sample(keys, 4000), solvers.white(jax.random.split(keys[0], 4000), y, ts[0], ts[0])
        x = jdiff.processes.perturb(PROCESS, x0, eps, ts[0])
        return editing.repaint(keys, PROCESS, solver, operator, y, x, ts, resamples=4, jump=12)

    alpha, sigma = (float(c) for c in PROCESS.marginal(ts[-1]))
    law = alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * np.eye(4)
    assert max(standard_errors(np.asarray(run(jax.random.key(0))), *law)) < 4


def test_the_walk_of_repaint():
    walk = editing._walk(5, 2, 2).tolist()
    want = "01 12 20 01 12 23 34 42 23 34 45 54 45"
    assert " ".join(f"{a}{b}" for a, b, *_ in walk) == want
    assert "".join(f"{end}" for *_, end, _ in walk) == "2222244444555"
    assert "".join(f"{again}" for *_, again in walk) == "0011100111011"
    assert editing._walk(3, 1, 2).tolist() == [[0, 1, 2, 0], [1, 2, 2, 0], [2, 3, 3, 0]]


def test_repaint_goes_once_where_a_noisy_measurement_is_not_written(x64):
    """One independent entry: with std 0.5 the posterior, as replacement alone has it; going on would forget y."""
    data = analytic.gaussian(PROCESS, jnp.array([0.3]), 0.8)
    operator, y = operators.mask(jnp.array([[1]]), (1,)), jnp.full((2000, 1), 1.5)
    solver = solvers.ddim(PROCESS, data.denoise, 1.0)

    @jax.jit
    def run(key):
        x = jdiff.processes.prior_sample(key, PROCESS, (2000, 1), jnp.float64)
        return editing.repaint(key, PROCESS, solver, operator, y, x, grid(150), 0.5, resamples=4, jump=10)

    wanted = posterior(np.eye(1), np.array([1.5]), 0.5, np.array([0.3]), np.array([[0.64]]))
    x = np.asarray(run(jax.random.key(8)))
    (mean, covariance), error = wanted, np.sqrt(wanted[1][0, 0] / 2000)
    assert abs(x.mean() - mean[0]) < 4 * error
    assert abs(x.var() / covariance[0, 0] - 1) < 0.12  # the prior's is 3.6 times as large


def test_repaint_takes_solvers_whose_memory_is_empty():
    """A predictor with a corrector that does nothing, and exponential Adams of order 1, are DDIM."""
    operator, y = inpainting(3)
    ddim, still = solvers.ddim(PROCESS, DATA().denoise), solvers.Solver(solvers.State, lambda key, state, t, s: state)
    same = (solvers.predictor_corrector(ddim, still), solvers.exponential_adams(PROCESS, DATA().denoise, 1))

    @jax.jit
    def run(key):
        x, ts = jax.random.normal(key, (3, 4)), grid(4)
        again = lambda solver: editing.repaint(key, PROCESS, solver, operator, y, x, ts, resamples=2, jump=2)
        return again(ddim), [again(solver) for solver in same]

    want, got = run(jax.random.key(0))
    for x in got:
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)


def test_sdedit_moments(x64):
    """x_t given x_0 is Gaussian and the flow is linear: mean and deviation of the result are known."""
    data = analytic.gaussian(PROCESS, jnp.array([0.5, -0.3]), 0.7)
    start = jnp.asarray(0.4)
    ts = jnp.linspace(start, 1e-4, 101)
    solver = solvers.heun(jdiff.probability_flow(PROCESS, data.score))
    x0 = jnp.tile(jnp.array([[2.0, -1.0]]), (4000, 1))
    x = np.asarray(jax.jit(lambda k: editing.sdedit(k, PROCESS, solver, x0, ts))(jax.random.key(0)))
    alpha, sigma = (float(c) for c in PROCESS.marginal(start))
    end = jnp.asarray(1e-4)
    mean = data.flow(alpha * x0[:1], start, end)[0]
    slope = data.flow(jnp.ones((1, 2)), start, end)[0] - data.flow(jnp.zeros((1, 2)), start, end)[0]
    assert max(standard_errors(x, np.asarray(mean), np.diag(np.asarray(slope * sigma) ** 2))) < 4
    denoised = editing.sdedit(jax.random.key(0), PROCESS, solver, x0[:2], ts[-2:], denoise=lambda x, t: 0 * x + 7)
    np.testing.assert_array_equal(denoised, 7)


def test_latents_of_two_gaussians_translate_one_into_the_other(x64):
    one = analytic.gaussian(PROCESS, jnp.array([0.5, -0.3]), 0.7)
    two = analytic.gaussian(PROCESS, jnp.array([-1.0, 0.2]), 0.4)
    encoder, decoder = (solvers.rk4(jdiff.probability_flow(PROCESS, d.score)) for d in (one, two))
    x, ts = jnp.array([[0.9, -0.6], [0.1, 0.4]]), grid(100)
    np.testing.assert_allclose(editing.edit_latent(encoder, x, ts), x, atol=1e-5)
    edit = lambda latent: editing.slerp(latent, latent[::-1], jnp.array([0.2, 0.0]))
    got = editing.edit_latent(encoder, x, ts, edit, decoder=decoder)
    latent = one.flow(x, ts[-1], ts[0])
    np.testing.assert_allclose(got, two.flow(edit(latent), ts[0], ts[-1]), atol=1e-5)


def test_slerp(x64):
    """Unit vectors at a known angle; norms in between; ends, parallel and per-example weights."""
    angle = 1.1
    a, b = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[np.cos(angle), np.sin(angle), 0.0]])
    for w in (0.0, 0.3, 1.0):
        want = [np.cos(w * angle), np.sin(w * angle), 0.0]
        np.testing.assert_allclose(editing.slerp(a, b, w)[0], want, atol=1e-12)
    got = editing.slerp(jnp.tile(a, (2, 1)), jnp.concatenate([3 * a, 2 * b]), jnp.array([0.25, 0.5]))
    np.testing.assert_allclose(got[0], [1.5, 0, 0], atol=1e-12)
    part = np.sin(0.5 * angle) / np.sin(angle)
    np.testing.assert_allclose(got[1], part * np.asarray(a[0]) + 2 * part * np.asarray(b[0]), atol=1e-12)


def test_slerp_of_more_entries_than_half_precision_can_count():
    a = jnp.ones((1, 70_000), jnp.float16)
    b = a.at[:, ::2].set(-1)
    want = np.tile([0, np.sqrt(2)], 35_000)[None]
    np.testing.assert_allclose(editing.slerp(a, b, 0.5), want, atol=2e-3)


def test_a_sample_depends_on_its_own_key_and_measurement_alone():
    known = jnp.array([[1.0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]])
    y = known * jnp.array([[1.0, 2.0, 3.0, 4.0]])
    traces = []

    @jax.jit
    def run(keys, known, y):
        traces.append(len(y))
        inner = solvers.ddim(PROCESS, lambda x, t: x / (1 + t[:, None]), 1.0)
        x = jdiff.processes.prior_sample(keys, PROCESS, y.shape)
        operator, ts = operators.mask(known, (4,)), jnp.linspace(1, 0.01, 6)
        return editing.repaint(keys, PROCESS, inner, operator, y, x, ts, resamples=2, jump=2)

    keys = jax.random.split(jax.random.key(0), 3)
    whole = run(keys, known, y)
    np.testing.assert_allclose(run(keys[1:], known[1:], y[1:]), whole[1:], rtol=1e-6)
    run(keys[::-1], known, y)
    assert traces == [3, 2]


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: editing.replacement(PROCESS, None, operators.linear(lambda x: 2 * x, (4,)), jnp.ones((2, 4))),
            "is diagonal",
        ),
        (lambda: editing.slerp(jnp.ones((2, 3)), jnp.ones((1, 3)), 0.5), "the shape of a"),
        (
            lambda: editing.repaint(
                jax.random.key(0),
                PROCESS,
                solvers.dpmpp_2m(PROCESS, lambda x, t: x),
                operators.mask(jnp.ones((1, 3)), (3,)),
                jnp.ones((2, 3)),
                jnp.ones((2, 3)),
                jnp.array([0.5, 0.1]),
            ),
            "without memory",
        ),
        (lambda: editing.sdedit(jax.random.key(0), PROCESS, None, jnp.ones((2, 3)), jnp.array([0.1, 0.5])), "decrease"),
        (lambda: editing.edit_latent(None, jnp.ones((2, 3)), jnp.array([0.1, 0.5])), "decrease"),
        (
            lambda: editing.repaint(
                jax.random.key(0), PROCESS, None, None, None, jnp.ones((2, 3)), jnp.array([0.5, 0.1]), jump=0
            ),
            "jump must be at least 1",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
