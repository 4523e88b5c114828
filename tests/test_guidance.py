"""Guidance against closed forms: Gaussian classes, whose posteriors and scores are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import jdiff
from jdiff import analytic, guidance, solvers
from jdiff._typing import KINDS

PROCESSES = {
    "VP": jdiff.VP(),
    "SubVP": jdiff.SubVP(),
    "VE": jdiff.VE(),
    "EDM": jdiff.EDM(),
    "Cosine": jdiff.Cosine(),
    "Rectified": jdiff.Rectified(),
}
MEANS = np.array([[-1.0, 0.5, 0.0], [1.0, 0.0, 0.4]])
STDS = np.array([0.3, 0.5])
WEIGHTS = np.array([0.3, 0.7])


def classes(process):
    """One exact Gaussian per class, and their mixture."""
    each = [analytic.gaussian(process, jnp.asarray(m), s) for m, s in zip(MEANS, STDS)]
    return each, analytic.gaussian_mixture(process, jnp.asarray(WEIGHTS), jnp.asarray(MEANS), jnp.asarray(STDS))


def conditional(process, kind="score"):
    """(x, t, cond) -> the exact field of a class, or of the mixture for cond = 2."""
    each, mixture = classes(process)

    def field(x, t, cond):
        scores = jnp.stack([*(e.score(x, t) for e in each), mixture.score(x, t)])
        score = jnp.take_along_axis(scores, cond[None, :, None], axis=0)[0]
        return jdiff.convert(process, score, x, t, "score", kind)

    return field


def log_posterior(process, cond):
    """(x, t) -> log p(cond | x, t), up to a constant in x, one class for all examples."""
    each, mixture = classes(process)
    return lambda x, t: each[cond].log_prob(x, t) - mixture.log_prob(x, t)


def points(process, t=0.3, batch=4):
    x = process.t_max * jax.random.normal(jax.random.key(0), (batch, 3), jnp.float64)
    return x, jnp.linspace(t, 0.9, batch) * process.t_max


# --- Scale 1 is p(x | c), on all roads. ---


@pytest.mark.parametrize("name", PROCESSES)
def test_scale_one_is_the_class_score(x64, name):
    process = PROCESSES[name]

    @jax.jit
    def fields(x, t):
        each, mixture = classes(process)
        by_classifier = guidance.classifier(mixture.score, log_posterior(process, 1))
        label = lambda c: jnp.full((4,), c)
        free = guidance.classifier_free(conditional(process), label(1), label(2), 1.0)
        auto = guidance.autoguidance(each[1].score, mixture.score, 1.0)
        limited = guidance.classifier_free(
            conditional(process), label(1), label(2), guidance.interval(5.0, 0.95 * process.t_max, process.t_max)
        )
        return [f(x, t) for f in (by_classifier, free, auto, limited)], each[1].score(x, t)

    guided, expected = fields(*points(process, 0.05))
    for value in guided:
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("how", ["classifier", "classifier_free"])
def test_scale_one_has_the_likelihood_of_the_class(x64, how):
    process = jdiff.VP()

    @jax.jit
    def log_prob(x):
        each, mixture = classes(process)
        label = lambda c, x: jnp.full(len(x), c)
        if how == "classifier":
            field = guidance.classifier(mixture.score, log_posterior(process, 1))
        else:
            field = lambda x, t: guidance.classifier_free(conditional(process), label(1, x), label(2, x), 1.0)(x, t)
        end = lambda x: each[1].log_prob(x, jnp.asarray(1.0))
        options = {"divergence": "exact", "rtol": 1e-8, "atol": 1e-8, "t_min": 1e-3, "prior_log_prob": end}
        found = jdiff.log_likelihood(jax.random.key(0), process, field, x, **options)
        return found.log_prob, each[1].log_prob(x, jnp.asarray(1e-3)), each[0].log_prob(x, jnp.asarray(1e-3))

    x = jnp.asarray(MEANS[1] + 0.7 * np.random.default_rng(0).normal(size=(2, 3)))
    found, expected, other = log_prob(x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.all(np.abs(expected - other) > 1)


# --- Any kind, any process. ---


@pytest.mark.slow_but("VP", "VE", "Rectified")
@pytest.mark.parametrize("name", PROCESSES)
def test_all_kinds_are_guided_alike(x64, name):
    # Convert, guide and convert back = guide: the maps are affine, and their terms in x are the same for all fields.
    process = PROCESSES[name]
    scale = jnp.array([0.0, 1.0, 3.0, -0.5])
    low, high = 0.2 * process.t_max, 0.6 * process.t_max
    x, t = points(process)
    strong, weak, gradient = jax.random.normal(jax.random.key(1), (3, *x.shape), jnp.float64)
    k, inside = scale[:, None], ((t >= low) & (t <= high))[:, None]
    free, double = weak + k * (strong - weak), 2 * strong - weak
    expected = {
        "classifier_free": free,
        "in an interval": jnp.where(inside, free, strong),
        "autoguidance of classifier_free": double + (k - 1) * (double - weak),
        "classifier": strong + k * gradient,
        "limit_to": jnp.where(inside, strong, weak),
    }
    for kind in KINDS:
        field = lambda x, t, score, kind=kind: jdiff.convert(process, score, x, t, "score", kind)
        one, other = (lambda x, t, s=s, field=field: field(x, t, s) for s in (strong, weak))
        log_prob = lambda x, t: jnp.sum(gradient * x, axis=1)
        found = {
            "classifier_free": guidance.classifier_free(field, strong, weak, scale),
            "in an interval": guidance.classifier_free(field, strong, weak, guidance.interval(scale, low, high)),
            "autoguidance of classifier_free": guidance.autoguidance(
                guidance.classifier_free(field, strong, weak, 2.0), other, scale
            ),
            "classifier": guidance.classifier(one, log_prob, scale, process=process, predict=kind),
            "limit_to": guidance.limit_to(one, other, low, high),
        }
        for name, guided in found.items():
            score = jdiff.convert(process, guided(x, t), x, t, kind, "score")
            np.testing.assert_allclose(score, expected[name], rtol=1e-7, atol=1e-8, err_msg=f"{kind}, {name}")


@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
def test_the_end_without_signal(x64, kind):
    # At alpha = 0 the score is the same for all classes; x0, v and velocity know the class means.
    process = jdiff.Rectified()
    x, t = points(process)[0], jnp.asarray(1.0)
    means = jnp.asarray(np.concatenate([MEANS, WEIGHTS[None] @ MEANS]))

    def field(x, t, cond):
        return jdiff.convert(process, means[cond], x, t, "x0", kind)

    guided = guidance.classifier_free(field, jnp.full(4, 1), jnp.full(4, 0), 3.0)(x, t)
    x0 = jdiff.convert(process, guided, x, t, kind, "x0")
    np.testing.assert_allclose(x0, np.tile(3 * MEANS[1] - 2 * MEANS[0], (4, 1)), rtol=1e-12)
    # A classifier knows nothing there.
    plain = lambda x, t: field(x, t, jnp.full(4, 2))
    by_classifier = guidance.classifier(plain, log_posterior(process, 1), 2.0, process=process, predict=kind)
    np.testing.assert_array_equal(by_classifier(x, t), plain(x, t))
    # Not even where its derivative is none: one that embeds log-SNR, infinite there.
    broken = lambda x, t: jnp.sum(x, axis=1) * jdiff.processes.log_snr(process, t) * jnp.nan
    by_broken = guidance.classifier(plain, broken, 2.0, process=process, predict=kind)
    np.testing.assert_array_equal(by_broken(x, t), plain(x, t))


@pytest.mark.parametrize(("kind", "added"), [("eps", 0), ("score", 2)])
def test_of_eps_and_score_the_score_takes_the_gradient_at_the_end_without_signal(kind, added):
    log_prob = lambda x, t: jnp.sum(x, axis=1)
    guided = guidance.classifier(lambda x, t: x, log_prob, 2.0, process=jdiff.Rectified(), predict=kind)
    x = jnp.asarray([[0.5, -1.0]])
    np.testing.assert_array_equal(guided(x, 1.0), x + added)


# --- One call, any condition. ---


def test_one_call_on_twice_the_batch():
    process, calls = jdiff.VP(), []

    def network(x, t, cond):
        calls.append((x.shape, t.shape, jax.tree.map(jnp.shape, cond)))
        return cond["shift"] * x + cond["label"].astype(x.dtype)[:, None]

    cond = {"label": jnp.arange(4), "shift": jnp.full((4, 1), 0.5)}
    null = {"label": jnp.full(4, 9), "shift": jnp.zeros((4, 1))}
    x, t = jnp.ones((4, 3)), jnp.linspace(0.1, 0.9, 4)
    adjust = jdiff.saturation.rescale(process, 0.7, predict="v")
    scale = guidance.interval(jnp.array([1.0, 2.0, 3.0, 4.0]), 0.3, 0.9)
    field = guidance.classifier_free(network, cond, null, scale, adjust=adjust)
    jdiff.saturation.threshold(process, field, predict="v")(x, t)
    assert calls == [((8, 3), (8,), {"label": (8,), "shift": (8, 1)})]
    # Each example has its own condition and scale; the first one is outside of the interval.
    guided = guidance.classifier_free(network, cond, null, scale)(x, t)
    strong, weak = 0.5 + np.arange(4), np.full(4, 9)
    k = np.array([1, 2, 3, 4])
    np.testing.assert_allclose(guided, np.tile((weak + k * (strong - weak))[:, None], (1, 3)), rtol=1e-6)


def test_a_sampler_takes_its_guide_per_example_and_is_traced_once():
    process, traces = jdiff.VP(), []
    ts = jdiff.times.uniform_log_snr(process, 6)

    @jax.jit
    def draw(keys, cond, scale):
        traces.append(1)
        field = conditional(process, "eps")
        null = jnp.full_like(cond, 2)
        adjust = jdiff.saturation.rescale(process, 0.5, predict="eps")
        guided = guidance.classifier_free(field, cond, null, guidance.interval(scale, 0.1, 0.8), adjust=adjust)
        guided = jdiff.saturation.threshold(process, guided, predict="eps", quantile=0.9)
        denoise = jdiff.reparameterise(process, guided, "eps", "x0")
        return jdiff.sample(keys, process, solvers.ddim(process, denoise), (*keys.shape, 3), ts)

    keys, cond, scale = jax.random.split(jax.random.key(3), 4), jnp.array([0, 1, 1, 0]), jnp.array([1.0, 4.0, 2.0, 0.5])
    together = draw(keys, cond, scale)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(draw(keys[order], cond[order], scale[order]), together[order], rtol=1e-4, atol=1e-5)
    assert len(traces) == 1
    assert not np.allclose(draw(keys, cond, scale + 1), together, atol=1e-2)


def test_limit_to_switches_by_example_and_ignores_the_other_field():
    nan = lambda x, t: jnp.where((t > 0.55)[:, None], jnp.nan, x - 1)
    field = guidance.limit_to(lambda x, t: x + 1, lambda x, t: x - 1, 0.2, 0.5)
    x, t = jnp.zeros((4, 2)), jnp.array([0.1, 0.2, 0.5, 0.6])
    np.testing.assert_array_equal(field(x, t)[:, 0], [-1, 1, 1, -1])
    np.testing.assert_array_equal(guidance.limit_to(nan, lambda x, t: x, 0.1, 0.55)(x, t)[:, 0], [-1, -1, -1, 0])
    for make in (lambda *ends: guidance.limit_to(nan, nan, *ends), lambda *ends: guidance.interval(2.0, *ends)):
        with pytest.raises(ValueError, match="t_low must be below"):
            make(0.5, 0.5)


def test_mistakes_are_named():
    x, t, label = jnp.zeros((4, 2)), jnp.asarray(0.5), jnp.zeros(4, jnp.int32)
    plain = lambda x, t: x
    field = lambda x, t, cond: x
    with pytest.raises(ValueError, match=r"null must have the structure and shapes of cond, \[\(4,\)\]; got \[\(1,\)"):
        guidance.classifier_free(field, label, label[:1], 2.0)(x, t)
    with pytest.raises(ValueError, match="cond must have a leading axis of 4"):
        guidance.classifier_free(field, label[:2], label[:2], 2.0)(x, t)
    with pytest.raises(ValueError, match=r"scale must be a scalar or have shape \(4,\)"):
        guidance.autoguidance(plain, plain, jnp.ones((4, 1)))(x, t)
    with pytest.raises(ValueError, match=r"log_prob must give one number per example, shape \(4,\), got \(4, 2\)"):
        guidance.classifier(plain, lambda x, t: x)(x, t)
    with pytest.raises(ValueError, match="of kind 'eps' needs process="):
        guidance.classifier(plain, lambda x, t: t, predict="eps")
    with pytest.raises(ValueError, match="unknown prediction kind"):
        guidance.classifier(plain, lambda x, t: t, process=jdiff.VP(), predict="noise")


# --- Other scales: what is sampled, and that it is not the tilted density. ---

# Bradley & Nakkiran 2024, section 3.1: x_0 ~ N(0, 2) and x_0 | c ~ N(0, 1). With VE noise of variance u,
# the guided score is -x a(u), a = w/(1 + u) + (1 - w)/(2 + u), and everything is linear in x.
SCALE, END = 3.0, 300.0


def bradley_nakkiran(process):
    wide, narrow = (analytic.gaussian(process, jnp.zeros(1), std) for std in (np.sqrt(2), 1.0))
    return guidance.autoguidance(narrow.denoise, wide.denoise, SCALE)


def test_the_guided_flow_is_no_diffused_tilted_density(x64):
    # dx/du = x a/2: x_0 = x_T exp(-1/2 int a du), so that x_0's variance tends to 2^(1 - w) = 1/4. The tilted density
    # p(x) p(c | x)^w is N(0, 2/(1 + w)) = N(0, 1/2): from 4,096 samples 0.25 +- 0.0055, 45 standard errors away.
    process = jdiff.EDM(sigma_min=1e-3, sigma_max=END)

    @jax.jit
    def solve(x):
        flow = jdiff.probability_flow(process, bradley_nakkiran(process), predict="x0")
        return solvers.integrate_adaptive(flow, x, jnp.asarray(END), jnp.asarray(1e-3), rtol=1e-9, atol=1e-12)

    start = END * jax.random.normal(jax.random.key(5), (4096, 1), jnp.float64)
    found = solve(start)
    assert not found.failed.any()
    decay = lambda u: (1 + u) ** (-SCALE / 2) * (2 + u) ** (-(1 - SCALE) / 2)
    exact = start * decay(END**2) / decay(1e-6)
    np.testing.assert_allclose(found.x, exact, rtol=1e-7, atol=1e-10)
    variance, error = float(jnp.var(found.x)), 0.25 * np.sqrt(2 / 4096)
    assert abs(variance - 2 ** (1 - SCALE)) < 4 * error
    assert (2 / (1 + SCALE) - variance) / error > 40


def test_the_guided_sde_samples_something_else_again(x64):
    # Var' = 1 - 2 a Var backwards in u gives (2 - 2^(2 - 2 w))/(2 w - 1) = 0.3875 for the reverse SDE, between the
    # flow's 0.25 and the tilted 0.5. The solver is linear: its own variance is followed exactly, without samples.
    process = jdiff.EDM(sigma_min=1e-3, sigma_max=END)

    def variance(steps):
        ts = jdiff.times.uniform_log_snr(process, steps).astype(jnp.float64)

        def response(x, z):
            noise = lambda key, like, t, s: jnp.full_like(like, z)
            solver = solvers.ancestral(process, bradley_nakkiran(process), noise=noise)
            key = jax.random.split(jax.random.key(0), 1)
            step = lambda t, s: solver.step(key, solver.init(jnp.full((1, 1), x)), t, s).x[0, 0]
            return jax.vmap(step)(ts[:-1], ts[1:])

        gain, spread = response(1.0, 0.0), response(0.0, 1.0)
        follow = lambda v, ab: (ab[0] ** 2 * v + ab[1] ** 2, None)
        return jax.lax.scan(follow, jnp.asarray(END**2), (gain, spread))[0]

    limit = (2 - 2 ** (2 - 2 * SCALE)) / (2 * SCALE - 1)
    coarse, fine = (float(jax.jit(variance, static_argnums=0)(n)) for n in (500, 1000))
    assert abs(coarse - limit) < 0.015 and abs(2 * fine - coarse - limit) < 2e-4, (coarse, fine)  # first order


def test_two_classes_against_scipy(x64):
    # x_0 from two normals and w = 3 towards the right one: no linear field. The flow is monotone in one dimension, so
    # quantiles go to quantiles; SciPy solves the same ODE from formulas of its own.
    process, w = jdiff.Rectified(), 3.0
    means, std = np.array([-1.0, 1.0]), 0.5
    levels = np.linspace(0.005, 0.995, 199)
    start = scipy.stats.norm.ppf(levels)

    @jax.jit
    def solve(x):
        each = [analytic.gaussian(process, jnp.asarray([m]), std) for m in means]
        mixture = analytic.gaussian_mixture(process, jnp.array([0.5, 0.5]), jnp.asarray(means)[:, None], std)
        velocity = [jdiff.reparameterise(process, f.denoise, "x0", "velocity") for f in (each[1], mixture)]
        flow = jdiff.probability_flow(process, guidance.autoguidance(*velocity, w), predict="velocity")
        return solvers.integrate_adaptive(flow, x, jnp.asarray(1.0), jnp.asarray(1e-4), rtol=1e-8, atol=1e-10)

    found = solve(jnp.asarray(start)[:, None])
    assert not found.failed.any()

    def velocity(t, x):
        a, s2 = 1 - t, ((1 - t) * std) ** 2 + t**2
        gain = a * std**2 / s2
        x0 = [m + gain * (x - a * m) for m in means]
        right = 1 / (1 + np.exp(((x - a * means[1]) ** 2 - (x - a * means[0]) ** 2) / (2 * s2)))
        plain = right * x0[1] + (1 - right) * x0[0]
        return (x - (plain + w * (x0[1] - plain))) / t

    reference = scipy.integrate.solve_ivp(velocity, (1.0, 1e-4), start, "DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(found.x[:, 0], reference, atol=1e-6)
    # The tilted density p(x) p(c | x)^w by quadrature: its median is to the left by many times the standard error of a
    # median of 1,000 samples, and so is its lowest percent.
    x = np.linspace(-4, 6, 20001)
    joint = [0.5 * scipy.stats.norm.pdf(x, m, std) for m in means]
    tilted = (joint[0] + joint[1]) * (joint[1] / (joint[0] + joint[1])) ** w
    cdf = np.cumsum(tilted) / tilted.sum()
    median = x[np.searchsorted(cdf, 0.5)]
    density = np.interp(median, x, tilted / tilted.sum()) / (x[1] - x[0])
    error = 0.5 / (density * np.sqrt(1000))
    assert (reference[99] - median) / error > 10, (reference[99], median, error)
