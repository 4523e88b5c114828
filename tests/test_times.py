import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats

import jdiff
from jdiff import analytic, losses, processes, times

PROCESSES = {
    "vp": jdiff.VP(),
    "subvp": jdiff.SubVP(),
    "ve": jdiff.VE(),
    "edm": jdiff.EDM(),
    "cosine": jdiff.Cosine(),
    "rectified": jdiff.Rectified(),
}
GRIDS = {
    "linear": times.linear,
    "quadratic": times.quadratic,
    "karras": times.karras,
    "log": times.uniform_log_snr,
    "polyexponential": functools.partial(times.polyexponential, rho=1.5),
    "shifted": times.shifted,
}
DRAWS = {
    "uniform": times.uniform,
    "stratified": times.stratified,
    "importance": times.importance,
    "log_normal": times.log_normal,
    "mixed": functools.partial(times.log_normal, uniform=0.3),
    "logit_normal": functools.partial(times.logit_normal, mean=-0.3, std=0.8),
    "mode": functools.partial(times.mode, scale=1.29),
    "cosmap": times.cosmap,
    "moved": times.shift_draws(times.cosmap, 3.0),
}
TOTAL = 4096


def ratio(process, t):
    alpha, sigma = (np.asarray(c) for c in process.marginal(t))
    return sigma / alpha


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("grid", GRIDS)
def test_grids_decrease_between_exact_ends(name, grid):
    process = PROCESSES[name]
    for n, ends in [(1, {}), (37, {}), (100, {"t_min": 0.1 * process.t_max, "t_max": 0.7 * process.t_max})]:
        ts = np.asarray(GRIDS[grid](process, n, **ends))
        assert ts.shape == (n + 1,) and ts.dtype == np.float32
        assert ts[0] == np.float32(ends.get("t_max", process.t_max))
        assert ts[-1] == np.float32(ends.get("t_min", process.t_min))
        assert np.all(np.diff(ts) < 0)


def test_grids_are_their_formulas(x64):
    n, fractions = 8, np.linspace(0, 1, 9)
    vp, edm = jdiff.VP(), jdiff.EDM()
    np.testing.assert_allclose(times.linear(vp, n), 1 + (1e-5 - 1) * fractions, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(times.quadratic(vp, n), (1 + (1e-5**0.5 - 1) * fractions) ** 2, rtol=1e-12, atol=1e-15)
    # Karras et al. 2022, eq. 5, where sigma = t.
    want = (80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) * fractions) ** 7
    np.testing.assert_allclose(times.karras(edm, n), want, rtol=1e-12)
    want = (80 ** (1 / 3) + (0.002 ** (1 / 3) - 80 ** (1 / 3)) * fractions) ** 3
    np.testing.assert_allclose(times.karras(edm, n, rho=3.0), want, rtol=1e-12)
    np.testing.assert_allclose(times.uniform_log_snr(edm, n), 80 * (0.002 / 80) ** fractions, rtol=1e-12)
    want = np.exp(np.log(0.002) + (np.log(80) - np.log(0.002)) * (1 - fractions) ** 1.7)
    np.testing.assert_allclose(times.polyexponential(edm, n, rho=1.7), want, rtol=1e-12)
    np.testing.assert_allclose(times.polyexponential(vp, n), times.uniform_log_snr(vp, n), rtol=1e-12)
    # Esser et al. 2024, eq. 23: sigma/alpha = t/(1 - t) grows by the shift.
    flow = jdiff.Rectified()
    t, moved = (np.asarray(grid(flow, n, t_min=0.0))[1:-1] for grid in (times.linear, times.shifted))
    np.testing.assert_allclose(ratio(flow, moved), 3 * ratio(flow, t), rtol=1e-10)
    np.testing.assert_allclose(times.shifted(edm, n, shift=1.0), times.linear(edm, n), rtol=1e-12)


def test_subsequences_of_a_discrete_schedule(x64):
    """The numbers of Lin et al. 2023 (arXiv 2305.08891), table 2, for 10 of 1000 steps, counted from 1 there."""
    vp = jdiff.VP()
    want = {
        "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
        "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
        "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
    }
    for spacing, numbers in want.items():
        ts = times.subsequence(vp, 10, spacing=spacing)
        np.testing.assert_allclose(ts, [*np.array(numbers) / 1000, 1e-5], rtol=1e-12)
    assert times.subsequence(vp, 1000).shape == (1001,) and times.subsequence(vp, 1)[0] == 1


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "edm"])
def test_spacing_of_the_noise_to_signal_ratio(x64, name):
    process = PROCESSES[name]
    steps = np.diff(ratio(process, times.karras(process, 20)) ** (1 / 7))
    np.testing.assert_allclose(steps, np.full(20, steps.mean()), rtol=1e-9)
    steps = np.diff(np.log(ratio(process, times.uniform_log_snr(process, 20))))
    np.testing.assert_allclose(steps, np.full(20, steps.mean()), rtol=1e-9)


@pytest.mark.parametrize("name", ["rectified", "cosine"])
def test_spacing_where_the_ratio_is_infinite(x64, name):
    """It starts from sigma/alpha = 1000 (and 1/1000 at t = 0); the ends of time stay on the grid."""
    process = PROCESSES[name]
    low = ratio(process, np.array(process.t_min))
    inner = ratio(process, times.karras(process, 10)[1:])
    want = (1000 ** (1 / 7) + (low ** (1 / 7) - 1000 ** (1 / 7)) * np.arange(1, 11) / 10) ** 7
    np.testing.assert_allclose(inner, want, rtol=1e-9)
    whole = times.uniform_log_snr(process, 10, t_min=0.0)
    assert whole[0] == 1 and whole[-1] == 0
    want = 1000 * 1e-6 ** (np.arange(1, 10) / 10)
    np.testing.assert_allclose(ratio(process, whole[1:-1]), want, rtol=1e-9)


def test_grids_inside_jit_and_gradients_into_the_process(x64):
    def middle(b):
        return times.karras(jdiff.VP(beta_max=b), 4)[2]

    h = 1e-4
    want = (middle(15 + h) - middle(15 - h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(middle))(15.0), want, rtol=1e-7)


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_do_not_depend_on_how_the_batch_is_split(draw):
    """Stratified over the global batch: each position has its time, wherever it is computed and in any order."""
    key, process, index = jax.random.key(0), jdiff.VP(), jnp.arange(64)
    run = jax.jit(DRAWS[draw], static_argnums=3)
    t, weight = run(key, process, index, 64)
    assert t.shape == weight.shape == (64,) and t.dtype == weight.dtype == jnp.float32
    for part in (index[:16], index[48:], index[::-2], jnp.array([5])):
        part_t, part_weight = run(key, process, part, 64)
        np.testing.assert_allclose(part_t, t[part], rtol=1e-6)
        np.testing.assert_allclose(part_weight, weight[part], rtol=1e-6)
    assert not np.any(np.isclose(run(jax.random.key(1), process, index, 64)[0], t, rtol=1e-4))


@pytest.mark.slow_but("vp", "ve", "rectified")
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_stay_in_range(name, draw):
    process = PROCESSES[name]
    for ends in ({}, {"t_min": 0.2 * process.t_max, "t_max": 0.6 * process.t_max}):
        t, weight = DRAWS[draw](jax.random.key(2), process, jnp.arange(TOTAL), TOTAL, **ends)
        assert np.all(t >= np.float32(ends.get("t_min", process.t_min)))
        assert np.all(t <= np.float32(ends.get("t_max", process.t_max)))
        assert np.all(np.isfinite(weight)) and np.all(weight > 0)


def test_one_time_in_each_stratum():
    t, weight = times.stratified(jax.random.key(3), jdiff.VP(), jnp.arange(256), 256, t_min=0.0)
    np.testing.assert_array_equal(np.sort(np.floor(np.asarray(t) * 256)), np.arange(256))
    np.testing.assert_array_equal(weight, np.ones(256))
    spread = processes.log_snr(jdiff.VP(), times.importance(jax.random.key(3), jdiff.VP(), jnp.arange(256), 256)[0])
    steps = np.diff(np.sort(np.asarray(spread)))
    np.testing.assert_allclose(steps, np.full(255, steps.mean()), rtol=2e-2)


def test_uniform_times_are_uniform_and_independent():
    t, weight = times.uniform(jax.random.key(4), jdiff.VP(), jnp.arange(TOTAL), TOTAL, t_min=0.2)
    assert scipy.stats.kstest(np.asarray(t), scipy.stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(t[1:], t[:-1])[0, 1]) < 4 / np.sqrt(TOTAL)
    np.testing.assert_array_equal(weight, np.ones(TOTAL))


def test_log_normal_times_are_log_normal():
    """Karras et al. 2022, table 1: log sigma ~ N(-1.2, 1.2^2) on EDM, where the ends of time cut off 1e-5."""
    t, _ = times.log_normal(jax.random.key(5), jdiff.EDM(), jnp.arange(TOTAL), TOTAL)
    z = (np.log(np.sort(np.asarray(t, np.float64))) + 1.2) / 1.2
    np.testing.assert_allclose(scipy.stats.norm.cdf(z), (np.arange(TOTAL) + 0.5) / TOTAL, atol=1 / TOTAL)
    t, _ = times.log_normal(jax.random.key(5), jdiff.VP(), jnp.arange(TOTAL), TOTAL, mean=0.5, std=0.3)
    z = (np.log(np.sort(ratio(jdiff.VP(), t).astype(np.float64))) - 0.5) / 0.3
    np.testing.assert_allclose(scipy.stats.norm.cdf(z), (np.arange(TOTAL) + 0.5) / TOTAL, atol=1.1 / TOTAL)


def test_a_uniform_share_bounds_the_weights():
    """Alone the normal's weight is unbounded in its tails; with a share u it is at most 1/u of `importance`'s."""
    process, index = jdiff.VP(), jnp.arange(TOTAL)
    t, weight = times.log_normal(jax.random.key(5), process, index, TOTAL, std=0.8, uniform=0.25)
    most, least = (processes.log_snr(process, end) for end in (process.t_min, process.t_max))
    bound = (most - least) / 0.25 * losses.likelihood(process, t, "eps") ** -1 / (process.t_max - process.t_min)
    assert np.all(weight <= bound * (1 + 1e-5))
    # A quarter of the draws, one in each stratum, is uniform in log-SNR: so is the far tail, 7 sigmas out.
    far = np.mean(np.asarray(processes.log_snr(process, t)) > -2 * (-1.2 - 7 * 0.8))
    np.testing.assert_allclose(far, 0.25 * (most - 13.6) / (most - least), atol=2 / TOTAL)


def test_a_mixture_of_draws_has_a_derivative():
    """The branch that is not taken has no quantile that would make it NaN."""

    def total(mean):
        t, _ = times.log_normal(jax.random.key(5), jdiff.EDM(), jnp.arange(8), 8, mean=mean, uniform=0.4)
        return jnp.sum(jnp.log(t))

    # log t moves with the mean in those draws that are normal, five of eight here (but for the ends of time).
    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.5), 5.0, rtol=1e-2)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("draw", [name for name in DRAWS if name not in ("uniform", "logit_normal")])
def test_weighted_draws_estimate_the_uniform_mean(x64, name, draw):
    """In float64 with many strata, the average of weight f(t) is a quadrature of the mean of f over [t_min, t_max]."""
    process, low, high = PROCESSES[name], 0.02 * PROCESSES[name].t_max, 0.9 * PROCESSES[name].t_max
    options = {"log_normal": {"std": 3.0, "mean": 0.0}, "mixed": {"mean": 0.0, "uniform": 0.4}}.get(draw, {})
    index = jnp.arange(2**15)
    t, weight = DRAWS[draw](jax.random.key(6), process, index, len(index), t_min=low, t_max=high, **options)
    f = lambda t: 1 + (t / process.t_max) ** 2 + np.cos(9 * t / process.t_max)
    middle = low + (high - low) * (np.arange(2**15) + 0.5) / 2**15
    np.testing.assert_allclose(np.mean(weight * f(t)), np.mean(f(middle)), rtol=2e-4)
    np.testing.assert_allclose(np.mean(weight), 1, rtol=2e-4)


def test_a_weighted_logit_normal_estimates_the_uniform_mean(x64):
    """With a standard deviation of 2 its weight, unbounded at the ends, is still integrable by a quadrature."""
    index = jnp.arange(2**15)
    t, weight = times.logit_normal(jax.random.key(6), jdiff.VP(), index, len(index), mean=0.5, std=2.0, t_min=0.2)
    f = lambda t: 1 + t**2 + np.cos(9 * t)
    middle = 0.2 + 0.8 * (np.arange(2**15) + 0.5) / 2**15
    np.testing.assert_allclose(np.mean(weight * f(t)), np.mean(f(middle)), rtol=1e-3)
    np.testing.assert_allclose(np.mean(weight), 1, rtol=1e-3)


def _esser_cdf(name, u):
    """The distribution of u under the densities of Esser et al. 2024 (arXiv 2403.03206), section 3.1, by SciPy."""
    if name == "logit_normal":
        return scipy.stats.norm(-0.3, 0.8).cdf(scipy.special.logit(u))
    if name == "cosmap":  # the integral of eq. 22
        return np.array([scipy.integrate.quad(lambda t: 2 / (np.pi * (1 - 2 * t + 2 * t**2)), 0, v)[0] for v in u])
    if name == "moved":  # sigma/alpha is three times that of cosmap, whose sigma/alpha is tan(pi/2 uniform)
        return 2 / np.pi * np.arctan(u / (1 - u) / 3)
    mode = lambda w: 1 - w - 1.29 * (np.cos(np.pi * w / 2) ** 2 - 1 + w)
    return np.array([1 - scipy.optimize.brentq(lambda w, v=v: mode(w) - v, 0, 1) for v in u])


@pytest.mark.parametrize("name", ["logit_normal", "mode", "cosmap", "moved"])
def test_densities_of_esser_2024(x64, name):
    """One draw in each stratum of SciPy's distribution function: a sample of another density would leave some empty."""
    process, total = jdiff.Rectified(), 512
    t, weight = DRAWS[name](jax.random.key(5), process, jnp.arange(total), total, t_min=0.0)
    order = np.argsort(np.asarray(t))
    u, weight = np.asarray(t)[order], np.asarray(weight)[order]
    cdf = _esser_cdf(name, u)
    np.testing.assert_array_equal(np.floor(cdf * total), np.arange(total))
    h = 1e-6  # the weight is one over the density, the derivative of the distribution function
    density = (_esser_cdf(name, u[20:-20] + h) - _esser_cdf(name, u[20:-20] - h)) / (2 * h)
    np.testing.assert_allclose(weight[20:-20] * density, np.ones(total - 40), rtol=1e-6)
    assert scipy.stats.kstest(u, lambda v: _esser_cdf(name, v)).statistic < 1 / total


def test_densities_have_their_direction_and_go_with_any_range():
    """A negative mean prefers the data at small t; times are fractions of the range of the process."""
    index = jnp.arange(TOTAL)
    for process in (jdiff.Rectified(), jdiff.EDM()):
        span = process.t_max
        early, _ = times.logit_normal(jax.random.key(1), process, index, TOTAL, mean=-1.0)
        late, _ = times.logit_normal(jax.random.key(1), process, index, TOTAL, mean=1.0)
        np.testing.assert_allclose(np.median(early) / span, scipy.special.expit(-1), rtol=2e-3)
        np.testing.assert_allclose(np.median(late) / span, scipy.special.expit(1), rtol=2e-3)
    spread = {s: np.std(times.mode(jax.random.key(1), jdiff.Rectified(), index, TOTAL, scale=s)[0]) for s in (-1, 0, 1)}
    assert spread[-1] > spread[0] * 1.1 and spread[1] < spread[0] / 1.1
    flat, weight = times.mode(jax.random.key(1), jdiff.Rectified(), index, TOTAL, scale=0.0)
    np.testing.assert_allclose(np.sort(flat), (np.arange(TOTAL) + 0.5) / TOTAL, atol=1 / TOTAL)
    np.testing.assert_allclose(weight, np.ones(TOTAL), rtol=1e-5)
    t, weight = times.final(jax.random.key(1), jdiff.EDM(), index[:5], 5)
    assert np.all(t == 80) and np.all(weight == 1)
    on_rectified = times.log_normal(jax.random.key(1), jdiff.Rectified(), index, TOTAL, mean=0.4, std=0.7)
    of_fraction = times.logit_normal(jax.random.key(1), jdiff.Rectified(), index, TOTAL, mean=0.4, std=0.7)
    np.testing.assert_allclose(on_rectified[0], of_fraction[0], rtol=1e-4)
    np.testing.assert_allclose(on_rectified[1], of_fraction[1], rtol=2e-3)


def test_importance_is_unbiased_and_varies_less_for_the_likelihood_loss():
    """Measured on the loss itself, noise included: eps-prediction of Gaussian data by a field that is 20 % off."""
    process = jdiff.VP()
    data = analytic.gaussian(process, jnp.zeros(4), jnp.array([0.1, 0.3, 1.0, 2.0]))
    field = jdiff.reparameterise(process, lambda x, t: 0.8 * data.score(x, t), "score", "eps")
    total = 2**15
    keys = jax.random.split(jax.random.key(7), total)
    x0 = data.sample(jax.random.key(8), total)

    @jax.jit
    def weighted(t, weight):
        return weight * losses.denoising(keys, field, process, x0, t, predict="eps", weight=losses.likelihood)

    loss = {
        name: np.asarray(weighted(*DRAWS[name](jax.random.key(9), process, jnp.arange(total), total)), np.float64)
        for name in ("stratified", "importance")
    }
    error = np.sqrt(sum(v.var() / total for v in loss.values()))
    assert abs(loss["stratified"].mean() - loss["importance"].mean()) < 4 * error
    assert loss["importance"].var() < 0.05 * loss["stratified"].var()


def test_importance_weight_times_likelihood_weight_is_constant_for_eps(x64):
    """g^2/sigma^2 is the density: Song et al. 2021 (arXiv 2101.09258), section 4.2."""
    for process in (jdiff.VP(), jdiff.SubVP(), jdiff.VE()):
        t, weight = times.importance(jax.random.key(10), process, jnp.arange(64), 64)
        product = weight * losses.likelihood(process, t, "eps")
        np.testing.assert_allclose(product, np.full(64, product[0]), rtol=1e-9)


def test_bad_input_to_grids():
    vp = jdiff.VP()
    for make, match in (
        (lambda: times.polyexponential(vp, 4, rho=0.0), "rho must be positive"),
        (lambda: times.shifted(vp, 4, shift=-1.0), "shift must be positive"),
        (lambda: times.subsequence(vp, 0), "1 to 1000"),
        (lambda: times.subsequence(vp, 11, total=10), "1 to 10"),
        (lambda: times.subsequence(vp, 4, spacing="even"), "'linspace', 'leading' or 'trailing'"),
        (lambda: times.subsequence(vp, 4, t_min=0.5), "not below the last time"),
        (lambda: times.subsequence(vp, 4, t_min=0.001), "not below the last time"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_bad_input():
    key, process, index = jax.random.key(0), jdiff.VP(), jnp.arange(4)
    for grid in GRIDS.values():
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            grid(process, 0)
        for ends in ({"t_min": 0.5, "t_max": 0.5}, {"t_min": 0.5, "t_max": 0.2}, {"t_min": -0.1}, {"t_max": 1.5}):
            with pytest.raises(ValueError, match=r"t_min < t_max <= 1\.0"):
                grid(process, 4, **ends)
    with pytest.raises(ValueError, match="rho must be positive and finite, got 0"):
        times.karras(process, 4, rho=0)
    for draw in DRAWS.values():
        with pytest.raises(TypeError, match="typed key"):
            draw(jax.random.PRNGKey(0), process, index, 4)
        with pytest.raises(TypeError, match="threefry"):
            draw(jax.random.key(0, impl="rbg"), process, index, 4)
        with pytest.raises(ValueError, match="t_min < t_max"):
            draw(key, process, index, 4, t_min=0.5, t_max=0.2)
    with pytest.raises(ValueError, match="std must be positive and finite, got 0"):
        times.log_normal(key, process, index, 4, std=0)
    with pytest.raises(ValueError, match="std must be positive and finite, got 0"):
        times.logit_normal(key, process, index, 4, std=0)
    for scale in (-1.01, 1.76):
        with pytest.raises(ValueError, match=r"scale must be in \[-1, 1.751938\], got"):
            times.mode(key, process, index, 4, scale=scale)
    with pytest.raises(ValueError, match="shift must be positive and finite, got 0"):
        times.shift_draws(times.uniform, 0)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="uniform must be in"):
            times.log_normal(key, process, index, 4, uniform=share)
