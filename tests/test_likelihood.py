import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from jax.sharding import AxisType, PartitionSpec

import jdiff
from jdiff import analytic, predictions, solvers
from jdiff.likelihood import log_likelihood

# Each process with another kind of field; score and eps fields cannot start where alpha = 0.
CASES = {
    "vp": (jdiff.VP(), "score"),
    "subvp": (jdiff.SubVP(), "eps"),
    "ve": (jdiff.VE(), "v"),
    "edm": (jdiff.EDM(), "x0"),
    "cosine": (jdiff.Cosine(), "velocity"),
    "rectified": (jdiff.Rectified(), "x0"),
}
EVENT, SIZE = (4, 2, 2), 16
BATCH = 8


def distributions(dtype=np.float32):
    """A Gaussian, written as a mixture with one weight, and a mixture: one program serves both."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, *EVENT))
    mixture = np.array([0.3, 0.2, 0.5]), means, np.array([0.3, 0.5, 0.9])
    gaussian = np.array([1.0, 0.0, 0.0]), means, np.array([0.4, 1.0, 1.0])
    cast = lambda arrays: tuple(a.astype(dtype) for a in arrays)
    return {"gaussian": cast(gaussian), "mixture": cast(mixture)}


def program(process, kind, divergence="exact", probes=1, invert=True):
    """One likelihood, the truth, and the data found again from the latents; tolerances and data are arguments."""

    @jax.jit
    def run(key, distribution, x, rtol, atol):
        data = analytic.gaussian_mixture(process, *distribution)
        field = predictions.reparameterise(process, data.denoise, "x0", kind)
        end = lambda z: data.log_prob(z, process.t_max)
        options = {"predict": kind, "divergence": divergence, "probes": probes, "rtol": rtol, "atol": atol}
        result = log_likelihood(key, process, field, x, prior_log_prob=end, **options)
        if not invert:
            return result
        flow = jdiff.probability_flow(process, field, predict=kind)
        back = solvers.integrate_adaptive(flow, result.latent, process.t_max, process.t_min, rtol=rtol, atol=atol)
        return result, data.log_prob(x, process.t_min), back.x

    return run


def draw(process, distribution, batch=BATCH):
    """Samples of x at t_min."""
    data = analytic.gaussian_mixture(process, *distribution)
    x0 = data.sample(jax.random.key(1), batch)
    eps = jax.random.normal(jax.random.key(2), x0.shape, x0.dtype)
    return jdiff.processes.perturb(process, x0, eps, process.t_min)


@pytest.mark.slow_but("vp", "ve", "rectified")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_density_at_t_min(name):
    """Within 1e-4 nats per dimension at rtol = atol = 1e-5 in float32; the latent leads back to the data."""
    process, kind = CASES[name]
    run = program(process, kind)
    for distribution in distributions().values():
        x = draw(process, distribution)
        result, want, back = run(None, distribution, x, 1e-5, 1e-5)
        assert not np.any(result.failed)
        assert np.abs(result.log_prob - want).max() < 1e-4 * SIZE
        np.testing.assert_allclose(back, x, atol=1e-3)
        np.testing.assert_array_equal(result.probe_error, np.zeros(BATCH))
        assert result.latent.shape == x.shape and result.evaluations.dtype == jnp.int32
        # More than one step of six stages, and one count per example.
        assert result.evaluations.shape == (BATCH,) and np.all(result.evaluations > 12)
        # The latents follow the end distribution: mean square 1 where data and noise add up to it.
        scale = float(jdiff.processes.prior_std(process))
        assert 0.7 < np.sqrt(np.mean((result.latent / scale) ** 2)) < 1.4


@pytest.mark.parametrize("name", ["vp", "rectified"])
def test_error_shrinks_with_the_tolerance(x64, name):
    process, kind = CASES[name]
    run = program(process, kind)
    for distribution in distributions(np.float64).values():
        x = draw(process, distribution)
        tolerances = (1e-3, 1e-5, 1e-7, 1e-9)
        results = [run(None, distribution, x, tolerance, tolerance) for tolerance in tolerances]
        errors = [np.abs(result.log_prob - want).max() for result, want, _ in results]
        assert errors == sorted(errors, reverse=True)
        # The tolerance speaks of nats per dimension and of one step: all steps together are within a few of it.
        assert all(error < 4 * SIZE * tolerance for error, tolerance in zip(errors, tolerances)), errors
        evaluations = [int(result.evaluations.sum()) for result, *_ in results]
        assert evaluations == sorted(set(evaluations))


def test_many_directions_in_parts():
    """More entries than derivatives that are taken at once, and no multiple of them."""
    process = jdiff.VP()
    data = analytic.gaussian_mixture(process, jnp.array([0.4, 0.6]), jnp.stack([-jnp.ones(19), jnp.ones(19)]), 0.5)
    x = data.sample(jax.random.key(0), 3)
    end = lambda z: data.log_prob(z, process.t_max)
    run = lambda: log_likelihood(None, process, data.score, x, divergence="exact", prior_log_prob=end)
    np.testing.assert_allclose(jax.jit(run)().log_prob, data.log_prob(x, process.t_min), atol=1e-4 * 19)


def test_random_probes_are_unbiased_and_their_error_is_calibrated():
    """z-scores against the exact divergence: Student's t with 15 degrees of freedom has variance 15/13."""
    process, kind = CASES["vp"]
    distribution = distributions()["mixture"]
    x = draw(process, distribution, 64)
    exact = program(process, kind, invert=False)(None, distribution, x, 1e-3, 1e-3)
    np.testing.assert_array_equal(exact.failed, np.zeros(64, bool))
    for divergence in ("rademacher", "gaussian"):
        run = program(process, kind, divergence, 16, invert=False)
        got = run(jax.random.split(jax.random.key(3), 64), distribution, x, 1e-3, 1e-3)
        z = np.asarray((got.log_prob - exact.log_prob) / got.probe_error)
        assert np.all(got.probe_error > 0.01)
        # Fails by chance in one of 1e4 draws of the keys; they are fixed.
        assert abs(z.mean()) < 4 * math.sqrt(15 / 13 / 64), divergence
        assert 0.6 < z.var() < 2.0, divergence
        # The flow itself does not depend on the probes, but for the steps chosen.
        np.testing.assert_allclose(got.latent, exact.latent, atol=0.02)


def test_probes_on_a_diagonal_jacobian():
    """Gaussian data: e.Je is the trace itself for signs, and has variance 2 sum J_ii^2 for normals."""
    process = jdiff.SubVP()
    std = jnp.linspace(0.2, 1.5, 6)
    data = analytic.gaussian(process, jnp.zeros(6), std)
    x = data.sample(jax.random.key(0), 128)
    signs, normals = (
        jax.jit(lambda key, d=d, n=n: log_likelihood(key, process, data.score, x, divergence=d, probes=n))(
            jax.random.key(1)
        )
        for d, n in (("rademacher", 1), ("gaussian", 2))
    )
    want = data.log_prob(x, process.t_min)
    # sub-VP's own prior N(0, I) is off by less than 1e-3 here.
    np.testing.assert_allclose(signs.log_prob, want, atol=3e-3)
    assert np.all(np.isnan(signs.probe_error))
    # x_i grows by s_i(1)/s_i(t_min): the log-determinant is their sum of logs, and each enters with e_i^2.
    growth = jnp.log(1 / std)
    spread = np.sqrt(2 * np.sum(growth**2) / 2)
    error = np.asarray(normals.log_prob - want)
    assert abs(error.mean()) < 4 * spread / np.sqrt(128)
    assert abs(error.std() / spread - 1) < 4 * np.sqrt(1.5 / 128)
    np.testing.assert_allclose(np.sqrt(np.mean(np.asarray(normals.probe_error) ** 2)), spread, rtol=0.4)


W = np.array([[0.5, -1.0, 0.3], [0.8, 0.7, -0.4], [-0.2, 0.9, -0.6]])


def coupled(x, t):
    """A field that is no score of anything: its divergence is known, its Jacobian is not symmetric."""
    return -x + 0.5 * jnp.sin(x @ W.astype(x.dtype).T + t[:, None])


def test_whole_likelihood_against_scipy(x64):
    """Same field, prior and change of variables, written in numpy and solved by DOP853."""
    x = np.random.default_rng(3).normal(size=(4, 3))
    got = jax.jit(
        lambda x: log_likelihood(None, jdiff.VP(), coupled, x, divergence="exact", rtol=1e-9, atol=1e-9, t_min=1e-3)
    )(x)

    def slope(t, state):
        beta, x = 0.1 + 19.9 * t, state[:3]
        score = -x + 0.5 * np.sin(W @ x + t)
        trace = -3 + 0.5 * np.sum(np.diag(W) * np.cos(W @ x + t))
        return np.append(-0.5 * beta * (x + score), -0.5 * beta * (3 + trace))

    for i in range(4):
        solution = scipy.integrate.solve_ivp(
            slope, (1e-3, 1), np.append(x[i], 0), method="DOP853", rtol=1e-11, atol=1e-12
        )
        z, logdet = solution.y[:3, -1], solution.y[3, -1]
        np.testing.assert_allclose(got.latent[i], z, atol=1e-7)
        want = scipy.stats.norm.logpdf(z).sum() + logdet
        np.testing.assert_allclose(got.log_prob[i], want, atol=1e-7)


@pytest.fixture(scope="module")
def coupled_run():
    """The likelihood of `coupled` scaled by a parameter, compiled once for three tests."""
    traces = []

    @jax.jit
    def run(scale, keys, x):
        traces.append(None)
        field = lambda x, t: jnp.where(x[:, :1] > 50, jnp.nan, scale * coupled(x, t))
        return log_likelihood(keys, jdiff.VP(), field, x, probes=2, rtol=1e-4, atol=1e-4)

    return run, traces


def test_an_example_does_not_depend_on_its_batch(coupled_run):
    run, _ = coupled_run
    x = np.random.default_rng(4).normal(size=(6, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 6)
    whole = run(1.0, keys, x)
    order = np.array([5, 2, 0, 4, 1, 3])
    other = run(1.0, keys[order], x[order])
    mates = np.where(np.arange(6)[:, None] == 2, x, 3 * x[::-1])
    among = run(1.0, jnp.where(np.arange(6) == 2, keys, keys[::-1]), mates)
    alone = run(1.0, keys[2:3], x[2:3])
    for name in ("log_prob", "latent", "probe_error"):
        want = np.asarray(getattr(whole, name))
        np.testing.assert_allclose(getattr(other, name), want[order], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(getattr(among, name)[2], want[2], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(getattr(alone, name)[0], want[2], rtol=1e-5, atol=1e-5)
    assert whole.evaluations[2] == alone.evaluations[0] == among.evaluations[2]
    assert len(set(np.asarray(among.evaluations).tolist())) > 1


def test_failures_are_nan_and_stay_with_their_example(coupled_run):
    """A field that returns NaN for one example, and NaN in the data of another."""
    run, _ = coupled_run
    x = np.random.default_rng(4).normal(size=(6, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 6)
    good, broken = run(1.0, keys, x), x.copy()
    broken[1, 0], broken[4, 2] = 100.0, np.nan
    result = run(1.0, keys, broken)
    np.testing.assert_array_equal(result.failed, np.isin(np.arange(6), (1, 4)))
    np.testing.assert_array_equal(np.isnan(result.log_prob), result.failed)
    fine = ~np.asarray(result.failed)
    np.testing.assert_allclose(result.log_prob[fine], good.log_prob[fine], rtol=1e-5)
    np.testing.assert_allclose(result.latent[fine], good.latent[fine], rtol=1e-5)


def test_two_parameters_share_one_trace(coupled_run):
    run, traces = coupled_run
    x, keys = jnp.ones((6, 3)), jax.random.split(jax.random.key(6), 6)
    first = run(1.0, keys, x)
    count = len(traces)
    second = run(0.7, jax.random.split(jax.random.key(7), 6), 0.5 * x)
    assert len(traces) == count and not np.allclose(first.log_prob, second.log_prob)


def test_too_few_steps_fail():
    x = jnp.ones((2, 3))
    result = log_likelihood(None, jdiff.VP(), coupled, x, divergence="exact", max_steps=1)
    assert np.all(result.failed) and np.all(np.isnan(result.log_prob))


def test_forward_derivative_with_respect_to_the_field(x64):
    """With the step sizes held constant, against differences of converged likelihoods."""
    x = np.random.default_rng(6).normal(size=(3, 3))

    @jax.jit
    def run(scale, b):
        field = lambda x, t: scale * coupled(x, t)
        process = jdiff.VP(beta_max=b)
        return log_likelihood(None, process, field, x, divergence="exact", rtol=1e-9, atol=1e-9).log_prob

    h = 1e-4
    for direction in ((1.0, 0.0), (0.0, 1.0)):
        got = jax.jvp(run, (0.8, 10.0), direction)[1]
        a, b = (h * d for d in direction)
        want = (run(0.8 + a, 10.0 + b) - run(0.8 - a, 10.0 - b)) / (2 * h)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_inside_shard_map():
    """With its default checks: what the loop carries varies over devices as x does."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    x, keys = jnp.linspace(-1, 1, 12).reshape(4, 3), jax.random.split(jax.random.key(8), 4)
    run = lambda keys, x: log_likelihood(keys, jdiff.VP(), coupled, x, rtol=1e-3, atol=1e-3)[:4]
    data = PartitionSpec("data")
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(data, data), out_specs=data))(keys, x)
    want = jax.jit(run)(keys, x)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_steps_in_other_times_give_the_same_likelihood(x64):
    process = jdiff.SubVP()
    data = analytic.gaussian_mixture(process, jnp.ones(2), jnp.array([[-1.0, 0.5], [1.0, 0.0]]), 0.2)
    x = data.sample(jax.random.key(0), 4)
    end = lambda z: data.log_prob(z, process.t_max)
    options = dict(divergence="exact", rtol=1e-8, atol=1e-8, prior_log_prob=end)
    runs = {
        v: log_likelihood(None, process, data.score, x, variable=v, **options)
        for v in ("t", "log_snr", "asinh", "angle")
    }
    for run in runs.values():
        np.testing.assert_allclose(run.log_prob, data.log_prob(x, process.t_min), atol=2e-6)
        np.testing.assert_allclose(runs["t"].latent, run.latent, atol=1e-6)
    for variable in ("log_snr", "asinh"):
        with pytest.raises(ValueError, match="alpha"):
            log_likelihood(
                None, jdiff.Rectified(), lambda x, t: -x, x, predict="velocity", variable=variable, **options
            )
    process = jdiff.Rectified()
    data = analytic.gaussian(process, jnp.array([-1.0, 0.5]), 0.2)
    field = jdiff.probability_flow(process, data.denoise, predict="x0").drift
    options["prior_log_prob"] = None
    angle, t = (
        log_likelihood(None, process, field, x, predict="velocity", variable=v, **options) for v in ("angle", "t")
    )
    np.testing.assert_allclose(angle.log_prob, t.log_prob, atol=1e-5)


class Wrapped:
    """A process of another's numbers that JAX does not know as a pytree."""

    t_min, t_max, prior_std = 1e-3, 1.0, 1.0

    def __init__(self, process):
        self.process = process

    def marginal(self, t):
        return self.process.marginal(t)


def test_a_process_that_is_no_pytree_may_have_traced_numbers():
    x = jnp.asarray([[0.3], [-0.8]])
    options = dict(divergence="exact", rtol=1e-4, atol=1e-4, variable="log_snr")
    exact = lambda process: analytic.gaussian(process, jnp.zeros(1), 0.5)

    @jax.jit
    def traced(beta_max):
        process = Wrapped(jdiff.VP(beta_max=beta_max))
        end = lambda z: exact(process).log_prob(z, 1.0)
        return log_likelihood(None, process, exact(process).score, x, prior_log_prob=end, **options).log_prob

    np.testing.assert_allclose(traced(12.0), exact(jdiff.VP(beta_max=12.0)).log_prob(x, 1e-3), atol=1e-3)
    with pytest.raises(ValueError, match="alpha"):
        log_likelihood(None, Wrapped(jdiff.Rectified()), lambda x, t: -x, x, predict="velocity", **options)


def test_bad_input():
    x, key = jnp.ones((2, 3)), jax.random.key(0)
    run = lambda key=key, x=x, field=coupled, **options: log_likelihood(key, jdiff.VP(), field, x, **options)
    with pytest.raises(ValueError, match="unknown divergence 'hutchinson'; choose"):
        run(divergence="hutchinson")
    with pytest.raises(ValueError, match="unknown prediction kind 'noise'"):
        run(predict="noise")
    for options in ({"probes": 0}, {"probes": 2, "divergence": "exact"}):
        with pytest.raises(ValueError, match="probes must be at least 1"):
            run(**options)
    for name in ("rtol", "atol"):
        for value in (0, -1e-5, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
                run(**{name: value})
    for t_min in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"t_min must be in \[0, 1\.0\)"):
            run(t_min=t_min)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        run(max_steps=0)
    with pytest.raises(ValueError, match="need a key, got None"):
        run(key=None)
    with pytest.raises(ValueError, match="one key per example"):
        run(key=jax.random.split(key, 3))
    with pytest.raises(TypeError, match="typed key"):
        run(key=jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="floating point, got dtype int32"):
        run(x=jnp.ones((2, 3), int))
    with pytest.raises(TypeError, match="float32 or wider, got bfloat16"):
        run(x=jnp.ones((2, 3), jnp.bfloat16))
    with pytest.raises(TypeError, match="x must be one array"):
        run(x={"a": x})
    with pytest.raises(ValueError, match=r"\(batch, \*event\), got \(2,\)"):
        run(x=jnp.ones(2))
    with pytest.raises(ValueError, match="must return the shape of its x"):
        run(field=lambda x, t: x[:, :1])
