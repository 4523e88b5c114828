"""The grid search against brute force, quadrature and what it is for: less error with the same number of steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from jdiff import analytic, grid_search, metrics, processes, sampling, solvers, times

PROCESSES = {
    "VP": processes.VP(),
    "SubVP": processes.SubVP(),
    "VE": processes.VE(),
    "EDM": processes.EDM(),
    "Cosine": processes.Cosine(),
    "Rectified": processes.Rectified(),
}
MEANS = jnp.array([[-0.9, 0.2], [0.8, -0.5], [0.1, 0.9]])
KEY = jax.random.key(4)


def target(process, std):
    dtype = jnp.zeros(()).dtype
    return analytic.gaussian_mixture(process, jnp.ones(3, dtype), MEANS.astype(dtype), std)


def candidates(process, count, batch=64, t_min=None, std=0.1):
    """A fine grid, and the exact flow's states on it (Heun's method of EDM, which has no error to speak of there)."""
    exact = target(process, std)
    ts = times.uniform_log_snr(process, count, t_min=t_min)
    _, path = jax.jit(sampling.sample, static_argnums=(1, 2, 3), static_argnames="path")(
        KEY, process, solvers.edm(process, exact.denoise), (batch, 2), ts, path=True
    )
    return exact, ts, path


@pytest.mark.slow_but("1-1.0", "2-0.25", "4-0.25", "9-1.0")
@pytest.mark.parametrize("power", [0.25, 1.0])
@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_no_other_grid_is_cheaper(n, power, x64):
    process = PROCESSES["VP"]
    exact, ts, path = candidates(process, 9, batch=16)
    costs = np.asarray(jax.jit(lambda: grid_search.step_costs(process, exact.denoise, path, ts, power=power))())
    price = lambda chosen: sum(costs[i, j] for i, j in itertools.pairwise(chosen))
    every = [(0, *inner, 9) for inner in itertools.combinations(range(1, 9), n - 1)]
    best = min(every, key=price)
    got = jax.jit(lambda: grid_search.best_grid(process, exact.denoise, path, ts, n, power=power))()
    np.testing.assert_array_equal(got, ts[jnp.array(best)])


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_costs_are_their_integral(power, x64):
    process, mean, std = PROCESSES["EDM"], 0.3, 0.6
    exact = analytic.gaussian(process, jnp.array([mean]), std)
    ts = times.uniform_log_snr(process, 400, t_min=0.01)
    start = jnp.array([[-1.0], [2.0], [0.5]]) * process.t_max
    path = jnp.stack([exact.flow(start, ts[0], t) for t in ts])
    i, j = 250, 330
    spread = lambda t: np.sqrt(std**2 + t**2)
    u2 = float(jnp.mean((start - mean) ** 2)) / spread(process.t_max) ** 2
    apart = lambda t: np.sqrt(u2) * std**2 * abs(1 / spread(t) - 1 / spread(float(ts[i])))
    want = scipy.integrate.quad(lambda t: apart(t) ** 2 / t ** (1 + 2 * power), float(ts[j]), float(ts[i]))[0]
    got = grid_search.step_costs(process, exact.denoise, path, ts, power=power)
    assert float(got[i, j]) == pytest.approx(want, rel=2e-3)


@pytest.mark.slow
def test_kl_is_that_of_the_discretised_path(x64):
    """On a Gaussian the two path measures are Gaussian: the sum over steps against their KL divergence by moments.

    One step of the reverse SDE that holds the denoiser: with x_0 = m + c x held at t, the next state is Gaussian given
    x; many such short steps, finely discretised, give both laws of the path.
    """
    process, std = PROCESSES["EDM"], 0.5
    exact = analytic.gaussian(process, jnp.array([0.0]), std)
    # Fine steps from t = 1 to 0.5; the coarse sampler holds x_0 from the start of every 20th of them.
    fine = np.geomspace(1.0, 0.5, 2001)
    coarse = fine[::400]
    rng = np.random.default_rng(0)
    paths, x = [], rng.normal(size=20_000) * np.sqrt(std**2 + 1)
    want, held = 0.0, None
    gain = lambda t: std**2 / (std**2 + t**2)
    for n, t in enumerate(fine):
        if n % 400 == 0:
            held = gain(t) * x
        paths.append(x)
        if n == len(fine) - 1:
            break
        s = fine[n + 1]
        # Posterior steps with two denoisers: the same variance, means apart by (1 - s^2/t^2) of the difference.
        variance, share = s**2 * (1 - s**2 / t**2), 1 - s**2 / t**2
        want += np.mean((share * (gain(t) * x - held)) ** 2) / (2 * variance)
        x = (1 - share) * x + share * gain(t) * x + np.sqrt(variance) * rng.normal(size=x.shape)
    ts, path = jnp.array(fine[::10]), jnp.array(np.stack(paths)[::10, :, None])
    costs = grid_search.step_costs(process, exact.denoise, path, ts, power=1.0)
    places = np.searchsorted(-fine[::10], -coarse)
    got = sum(float(costs[i, j]) for i, j in itertools.pairwise(places))
    assert got == pytest.approx(want, rel=0.02)


@pytest.mark.slow_but("VE-dpmpp_2m")
@pytest.mark.parametrize(
    ("process", "name"),
    [
        ("VP", "ddim"),
        ("VE", "dpmpp_2m"),
        ("EDM", "ddim"),
        ("Cosine", "dpmpp_2m"),
        ("Rectified", "heun"),
    ],
)
def test_refined_grids_are_better_than_the_usual_ones(process, name, x64):
    """RMS error against a fine solve, 8 steps, on samples that the search did not see: less than on all usual grids."""
    process = PROCESSES[process]
    t_min = float(processes.time_at(process, jnp.asarray(2 * np.log(50.0))))
    exact, fine, path = candidates(process, 128, batch=1024, t_min=t_min, std=0.3)
    x, end = path[0], path[-1]
    make = {
        "ddim": lambda: solvers.ddim(process, exact.denoise),
        "dpmpp_2m": lambda: solvers.dpmpp_2m(process, exact.denoise),
        "heun": lambda: solvers.edm(process, exact.denoise),
    }[name]
    run = jax.jit(lambda ts: solvers.integrate(None, make(), x, ts)[0])
    error = lambda ts, part=slice(512, 1024): float(jnp.sqrt(jnp.mean((run(ts) - end)[part] ** 2)))
    usual = {
        grid.__name__: grid(process, 8, t_min=t_min)
        for grid in (times.linear, times.quadratic, times.karras, times.uniform_log_snr)
    }
    refine = jax.jit(lambda ts: grid_search.refine_grid(make(), x[:512], end[:512], ts))
    refined = min((refine(ts) for ts in usual.values()), key=lambda ts: error(ts, slice(0, 512)))
    assert bool((refined[1:] < refined[:-1]).all()) and refined[0] == fine[0] and refined[-1] == fine[-1]
    errors = {grid: error(ts) for grid, ts in usual.items()}
    assert error(refined) < min(errors.values()), (error(refined), errors)


def test_refining_never_makes_it_worse_and_finds_a_known_minimum(x64):
    """Of one inner time, against a scan over all of them; up and down in time."""
    process = PROCESSES["VP"]
    exact = analytic.gaussian(process, jnp.array([0.5]), 0.3)
    x = jnp.array([[-1.0], [0.3], [1.7]])
    for first, last in ((1.0, 0.01), (0.01, 1.0)):
        solver = solvers.ddim(process, exact.denoise)
        end = exact.flow(x, jnp.asarray(first), jnp.asarray(last))
        run = jax.jit(
            lambda ts, solver=solver, end=end: jnp.mean((solvers.integrate(None, solver, x, ts)[0] - end) ** 2)
        )
        scan = min(np.linspace(0.011, 0.999, 400), key=lambda t: float(run(jnp.array([first, t, last]))))
        start = jnp.array([first, 0.5, last])
        got = grid_search.refine_grid(solver, x, end, start, iterations=20)
        assert float(got[1]) == pytest.approx(scan, abs=4e-3)
        assert float(run(got)) <= float(run(start))
        once = grid_search.refine_grid(solver, x, end, got, iterations=1)
        assert float(run(once)) <= float(run(got)) * (1 + 1e-9)
        # Nothing is better than the rest where no state is finite.
        kept = grid_search.refine_grid(solver, np.full((3, 1), np.inf), end, start, iterations=1)
        np.testing.assert_allclose(kept, start, rtol=1e-12)


def test_under_jit_and_in_float32():
    process = PROCESSES["Rectified"]
    exact, ts, path = candidates(process, 32)
    search = lambda path, ts: grid_search.best_grid(process, exact.denoise, path, ts, 5)
    got = jax.jit(search)(path, ts)
    assert got.dtype == jnp.float32 and got.shape == (6,)
    np.testing.assert_array_equal(got, search(path, ts))


def test_refine_in_float32():
    process = PROCESSES["Rectified"]
    exact, _, path = candidates(process, 64, std=0.3)
    solver = solvers.ddim(process, exact.denoise)
    got = grid_search.refine_grid(solver, path[0], path[-1], times.karras(process, 5))
    assert got.dtype == jnp.float32 and bool((got[1:] < got[:-1]).all())
    error = lambda ts: float(jnp.mean((solvers.integrate(None, solver, path[0], ts)[0] - path[-1]) ** 2))
    assert error(got) < 0.5 * error(times.karras(process, 5))


def test_bad_input():
    process = PROCESSES["VP"]
    exact, ts, path = candidates(process, 8, batch=2)
    search = lambda *args, **options: grid_search.best_grid(process, exact.denoise, *args, **options)
    for n in (0, 9):
        with pytest.raises(ValueError, match="n must be"):
            search(path, ts, n)
    with pytest.raises(ValueError, match="power must be positive"):
        search(path, ts, 3, power=0.0)
    with pytest.raises(ValueError, match="decrease"):
        search(path, ts[::-1], 3)
    with pytest.raises(ValueError, match="path must have shape"):
        search(path[:-1], ts, 3)
    with pytest.raises(ValueError, match="sigma > 0"):
        grid_search.best_grid(processes.Rectified(), exact.denoise, path, ts.at[-1].set(0.0), 3)
    with pytest.raises(TypeError, match="floating point"):
        search(path.astype(int), ts, 3)


def test_bad_input_to_refine():
    process = PROCESSES["VP"]
    exact, ts, path = candidates(process, 8, batch=2)
    x, end = path[0], path[-1]
    refine = lambda *args, **options: grid_search.refine_grid(solvers.ddim(process, exact.denoise), *args, **options)
    with pytest.raises(ValueError, match="shape of x"):
        refine(x, end[:1], ts)
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        refine(x, end, ts, iterations=0)
    with pytest.raises(ValueError, match="monotone"):
        refine(x, end, ts.at[2].set(ts[1]))
    with pytest.raises(ValueError, match="needs a key"):
        grid_search.refine_grid(solvers.ddim(process, exact.denoise, 0.5), x, end, ts)


@pytest.mark.slow_but("Rectified")
@pytest.mark.parametrize("name", ["VP", "EDM", "Rectified"])
def test_best_grids_serve_stochastic_sampling(name):
    """Energy distance of ancestral samples in 10 steps to the data: less than on all usual grids."""
    process = PROCESSES[name]
    t_min = float(processes.time_at(process, jnp.asarray(2 * np.log(50.0))))
    exact = target(process, 0.1)
    solver, keys = solvers.ancestral(process, exact.denoise), jax.random.split(KEY, 2000)
    run = jax.jit(sampling.sample, static_argnums=(1, 2, 3), static_argnames="path")
    fine = times.uniform_log_snr(process, 128, t_min=t_min)
    _, path = run(jax.random.key(9), process, solver, (256, 2), fine, path=True)
    grids = {
        make.__name__: make(process, 10, t_min=t_min)
        for make in (times.linear, times.quadratic, times.karras, times.uniform_log_snr)
    }
    grids["best"] = jax.jit(lambda: grid_search.best_grid(process, exact.denoise, path, fine, 10))()
    data = processes.perturb(process, exact.sample(jax.random.key(1), 2000), jax.random.normal(KEY, (2000, 2)), t_min)
    distance = {
        k: float(jax.jit(metrics.energy_distance)(run(keys, process, solver, (2000, 2), ts), data))
        for k, ts in grids.items()
    }
    best = distance.pop("best")
    assert best < 0.9 * min(distance.values()), (best, distance)
