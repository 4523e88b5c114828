"""The adaptive SDE solver against its published algorithm, exact moments and one Brownian path."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jdiff import analytic, processes, sde, solvers
from jdiff._array import fold_in, normal_like

KEY = jax.random.key(6)
MEANS = jnp.array([[-0.9, 0.2], [0.8, -0.5]])


def reverse(process, eta=1.0):
    dtype = jnp.zeros(()).dtype
    exact = analytic.gaussian_mixture(process, jnp.array([0.3, 0.7], dtype), MEANS.astype(dtype), 0.3)
    return exact, sde.reverse(process, exact.denoise, predict="x0", eta=eta)


def start(process, batch):
    return processes.prior_sample(jax.random.key(1), process, (batch, 2), jnp.zeros(()).dtype)


def literal(keys, equation, x, t, end, rtol, atol, h):
    """Algorithm 1 of Jolicoeur-Martineau et al. 2021 (arXiv 2105.14080) for one example, in a Python loop."""
    compiled = [jax.jit(function) for function in (equation.drift, equation.diffusion)]
    drift, diffusion = (lambda x, t, f=f: np.asarray(f(jnp.asarray(x)[None], jnp.asarray([t])))[0] for f in compiled)
    previous, tries, accepted = x, 0, 0
    while t > end:
        h = min(h, t - end)
        z = np.asarray(normal_like(fold_in(keys, tries), jnp.zeros((1, 2))))[0]
        low = x - h * drift(x, t) + np.sqrt(h) * diffusion(x, t) * z
        other = x - h * drift(low, t - h) + np.sqrt(h) * diffusion(low, t - h) * z
        high = 0.5 * (low + other)
        scale = np.maximum(atol, rtol * np.maximum(np.abs(low), np.abs(previous)))
        error = np.sqrt(np.mean(((low - high) / scale) ** 2))
        if error <= 1:
            x, t, previous, accepted = high, t - h, low, accepted + 1
        h = h * np.clip(0.9 * error**-0.9, 0.1, 10)
        tries += 1
    return x, tries, accepted


@pytest.mark.parametrize("process", [processes.VP(), processes.VE()], ids=["VP", "VE"])
def test_against_the_published_algorithm(process, x64):
    _, equation = reverse(process)
    x, keys = start(process, 3), jax.random.split(KEY, 3)
    options = dict(rtol=0.05, atol=0.05)
    got = jax.jit(lambda keys, x: solvers.integrate_adaptive_sde(keys, equation, x, 1.0, 0.1, **options))(keys, x)
    rejected = 0
    for i in range(3):
        want, tries, accepted = literal(keys[i : i + 1], equation, np.asarray(x[i]), 1.0, 0.1, **options, h=0.01)
        np.testing.assert_allclose(got.x[i], want, rtol=1e-8)
        assert (int(got.evaluations[i]), int(got.accepted[i])) == (2 * tries, accepted)
        rejected += tries - accepted
    assert rejected > 0 and not bool(got.failed.any())
    # atol is one of 256 levels of [-1, 1].
    defaults = inspect.signature(solvers.integrate_adaptive_sde).parameters
    assert [defaults[name].default for name in ("rtol", "atol", "first_step")] == [0.02, 0.0078, 0.01]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["VP", "Rectified"])
def test_samples_follow_the_data(name):
    """Mean, covariance and weights of the mixture, within four standard errors of 2,000 samples and 0.02 of bias."""
    process = {"VP": processes.VP(), "Rectified": processes.Rectified()}[name]
    exact, equation = reverse(process)
    noises = {"brownian": solvers.brownian(jax.random.key(11), process), "white": solvers.white}
    run = jax.jit(
        lambda x, kind: solvers.integrate_adaptive_sde(
            KEY, equation, x, process.t_max, 1e-3, rtol=0.01, atol=0.01, noise=noises[kind]
        ),
        static_argnums=1,
    )
    got = run(start(process, 2000), "brownian")
    assert not bool(got.failed.any())
    data = np.asarray(exact.sample(jax.random.key(2), 2000))
    x = np.asarray(got.x)
    np.testing.assert_allclose(x.mean(axis=0), data.mean(axis=0), atol=4 * np.sqrt(2) * 0.9 / 45 + 0.02)
    np.testing.assert_allclose(np.cov(x.T), np.cov(data.T), atol=4 * np.sqrt(2) * 0.7 / 45 + 0.02)
    # New noise for rejected tries is a bias: it is what the docstring warns of.
    biased = np.cov(np.asarray(run(start(process, 2000), "white").x).T)
    assert biased[0, 0] > np.cov(data.T)[0, 0] + 0.04
    np.testing.assert_allclose((x[:, 0] > 0).mean(), (data[:, 0] > 0).mean(), atol=4 * np.sqrt(2) * 0.46 / 45 + 0.01)


@pytest.mark.slow
def test_all_tries_see_one_brownian_path(x64):
    """With Brownian noise a tighter tolerance approaches one end per path; with white noise there is none."""
    process = processes.VP()
    _, equation = reverse(process)
    x, ends = start(process, 50), {}
    for kind in ("brownian", "white"):
        noise = solvers.brownian(jax.random.key(9), process) if kind == "brownian" else solvers.white
        run = jax.jit(
            lambda tol, noise=noise: solvers.integrate_adaptive_sde(
                KEY, equation, x, 1.0, 0.05, rtol=tol, atol=tol, noise=noise
            )
        )
        ends[kind] = [run(tol) for tol in (0.1, 0.03, 0.01, 0.001)]
    apart = {
        kind: [float(jnp.median(jnp.abs(end.x - found[-1].x))) for end in found[:-1]] for kind, found in ends.items()
    }
    assert apart["brownian"][0] > apart["brownian"][1] > apart["brownian"][2]
    assert apart["brownian"][2] < 0.02 < 0.2 < apart["white"][2], apart
    evaluations = [int(end.evaluations.sum()) for end in ends["brownian"]]
    assert evaluations == sorted(evaluations)


def test_batch_mates_do_not_matter(x64):
    process = processes.VP()
    _, equation = reverse(process)
    x, keys = start(process, 8), jax.random.split(KEY, 8)
    run = jax.jit(lambda keys, x: solvers.integrate_adaptive_sde(keys, equation, x, 1.0, 0.01))
    together = run(keys, x)
    alone = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(run(keys[i : i + 1], x[i : i + 1]) for i in range(8))
    )
    np.testing.assert_allclose(together.x, alone.x, rtol=1e-10)
    np.testing.assert_array_equal(together.evaluations, alone.evaluations)
    assert len(set(together.evaluations.tolist())) > 1
    mesh, rows = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(rows, rows), out_specs=rows))(keys, x)
    np.testing.assert_allclose(mapped.x, together.x, rtol=1e-10)
    # Trees, from noise to data and back, each example between its own times.
    pair = lambda leaf: {"a": leaf, "b": leaf[:, :1]}
    both = sde.SDE(
        lambda x, t: {"a": equation.drift(x["a"], t), "b": jnp.zeros_like(x["b"])},
        lambda x, t: {"a": equation.diffusion(x["a"], t), "b": jnp.zeros_like(x["b"])},
    )
    ends = jnp.linspace(0.01, 0.5, 8)
    tree = solvers.integrate_adaptive_sde(keys, both, pair(x), 1.0, ends)
    np.testing.assert_array_equal(tree.x["b"], x[:, :1])
    assert bool((tree.evaluations[1:] <= tree.evaluations[:1]).all())


def test_failures(x64):
    process = processes.VP()
    _, equation = reverse(process)
    x = start(process, 3)
    got = solvers.integrate_adaptive_sde(KEY, equation, x, 1.0, 0.01, max_steps=5)
    assert bool(got.failed.all()) and int(got.evaluations.max()) == 10 and bool(jnp.isfinite(got.x).all())
    poisoned = sde.SDE(
        lambda x, t: jnp.where(jnp.arange(3)[:, None] == 1, jnp.nan, equation.drift(x, t)), equation.diffusion
    )
    got = solvers.integrate_adaptive_sde(KEY, poisoned, x, 1.0, 0.01)
    np.testing.assert_array_equal(got.failed, [False, True, False])
    assert bool(jnp.isfinite(got.x).all())


def test_a_step_is_too_short_by_the_measure_of_its_time():
    """float32 resolves times near 0 finely, and far from it coarsely: a stiff decay from t0 to t1, without noise."""

    @jax.jit
    def run(t0, t1):
        equation = sde.SDE(lambda x, t: -x * 20 / (t1 - t0), lambda x, t: jnp.zeros_like(x))
        return solvers.integrate_adaptive_sde(KEY, equation, jnp.ones((2, 2)), t0, t1, rtol=0.01, first_step=1e4)

    for t0, t1 in ((1e-4, 2e-4), (2e-4, 1e-4), (1e3, 2e3)):
        got = run(t0, t1)
        # The first step, all of the way, is refused.
        assert int(got.evaluations[0]) > 2 * int(got.accepted[0]) and not bool(got.failed.any())
        np.testing.assert_allclose(got.x, np.exp(-20), atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(rtol=0.0), ValueError, "rtol must be positive"),
        (dict(first_step=0.0), ValueError, "must be positive"),
        (dict(max_steps=0), ValueError, "must be at least 1"),
        (dict(t1=1.0), ValueError, "must differ"),
        (dict(sde=sde.SDE(lambda x, t: x)), ValueError, "no diffusion"),
        (dict(key=None), TypeError, "typed"),
    ],
)
def test_bad_input(arguments, error, match):
    _, equation = reverse(processes.VP())
    arguments = dict(key=KEY, sde=equation, x=jnp.ones((3, 2)), t0=1.0, t1=0.1) | arguments
    with pytest.raises(error, match=match):
        solvers.integrate_adaptive_sde(**arguments)
