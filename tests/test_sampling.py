import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import analytic, solvers, times


def setup(process=None):
    process = process or jdiff.VP()
    return process, analytic.gaussian(process, jnp.array([0.5, -1.0]), jnp.array([0.3, 1.2]))


@functools.partial(jax.jit, static_argnames=("batch", "path", "last"))
def draw(key, scale, ts, *, batch, path=False, last=False):
    """Euler-Maruyama on the reverse of VP, with the score scaled by a parameter."""
    process, data = setup()
    sde = jdiff.reverse(process, lambda x, t: scale * data.score(x, t))
    denoise = data.denoise if last else None
    return jdiff.sample(key, process, solvers.euler_maruyama(sde), (batch, 2), ts, denoise=denoise, path=path)


@pytest.fixture(scope="module")
def ts():
    return times.linear(jdiff.VP(), 20, t_min=1e-2)


def test_ode_samples_are_the_flow_of_the_prior():
    """Prior, solver, grid: x = flow(prior draw), exactly known for Gaussian data; the last step is the denoiser."""
    process, data = setup()
    ts = times.uniform_log_snr(process, 60, t_min=1e-3)
    run = jax.jit(
        lambda key, denoise: jdiff.sample(
            key,
            process,
            solvers.rk4(jdiff.probability_flow(process, data.score)),
            (64, 2),
            ts,
            denoise=(lambda x, t: data.denoise(x, t)) if denoise else None,
            path=True,
        ),
        static_argnums=1,
    )
    x, path = run(jax.random.key(0), False)
    assert path.shape == (61, 64, 2)
    np.testing.assert_array_equal(path[-1], x)
    np.testing.assert_allclose(x, data.flow(path[0], ts[0], ts[-1]), atol=2e-4)
    last, same = run(jax.random.key(0), True)
    np.testing.assert_allclose(last, data.denoise(x, ts[-1]), atol=1e-6)
    np.testing.assert_array_equal(same, path)


def test_ancestral_samples_have_the_moments_of_the_data():
    """4096 draws against mean and variance, with four standard errors and the step's own bias below them."""
    process, data = setup()
    grid = times.uniform_log_snr(process, 100, t_min=1e-3)
    solver = solvers.ancestral(process, data.denoise)
    x = jax.jit(lambda key: jdiff.sample(key, process, solver, (4096, 2), grid, denoise=data.denoise))(
        jax.random.key(1)
    )
    std = np.array([0.3, 1.2])
    assert np.all(np.abs(np.mean(x, axis=0) - np.array([0.5, -1.0])) < 4 * std / 64 + 0.01)
    assert np.all(np.abs(np.std(x, axis=0) / std - 1) < 4 / np.sqrt(2 * 4096) + 0.03)


def test_a_sample_depends_on_its_key_alone(ts):
    keys = jax.random.split(jax.random.key(2), 8)
    whole = draw(keys, 1.0, ts, batch=8)
    order = np.array([6, 3, 0, 1, 7, 2, 5, 4])
    np.testing.assert_allclose(draw(keys[order], 1.0, ts, batch=8), whole[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(draw(keys[3:4], 1.0, ts, batch=1)[0], whole[3], rtol=1e-5, atol=1e-5)
    one_key = draw(jax.random.key(2), 1.0, ts, batch=8)
    np.testing.assert_allclose(one_key, whole, rtol=1e-5, atol=1e-5)
    assert len(np.unique(np.asarray(whole)[:, 0])) == 8


def test_prior_and_steps_draw_different_noise(ts):
    """The first step must not add the prior's own noise again."""
    _, path = draw(jax.random.split(jax.random.key(3), 512), 0.0, ts, batch=512, path=True)
    assert abs(np.mean(path[0])) < 4 / np.sqrt(1024) and abs(np.var(path[0]) - 1) < 4 * np.sqrt(2 / 1024)
    # With no score, x_1 = (1 + beta h / 2) x_0 + sqrt(beta h) z, beta = 20 at t = 1.
    h = float(ts[0] - ts[1])
    z = (path[1] - (1 + 10 * h) * path[0]) / np.sqrt(20 * h)
    assert abs(np.corrcoef(np.ravel(z), np.ravel(path[0]))[0, 1]) < 4 / np.sqrt(1024)
    assert abs(np.var(z) - 1) < 4 * np.sqrt(2 / 1024)


@pytest.mark.parametrize("devices", [2, 8])
def test_the_same_samples_on_any_number_of_devices(ts, devices):
    mesh = jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices], axis_types=(jax.sharding.AxisType.Auto,)
    )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    keys = jax.random.split(jax.random.key(4), 8)
    want = draw(keys, 1.0, ts, batch=8)
    got = draw(jax.device_put(keys, sharding), 1.0, ts, batch=8)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_two_parameters_share_one_trace(ts):
    traces = []
    process, data = setup()

    @jax.jit
    def run(scale, key, ts):
        traces.append(None)
        sde = jdiff.reverse(process, lambda x, t: scale * data.score(x, t))
        return jdiff.sample(key, process, solvers.euler_maruyama(sde), (4, 2), ts)

    first, second = run(1.0, jax.random.key(0), ts), run(0.5, jax.random.key(1), ts)
    assert len(traces) == 1 and not np.allclose(first, second)


def test_gradient_with_respect_to_the_field(x64):
    process, data = setup()
    grid = times.linear(process, 8, t_min=1e-2)

    @jax.jit
    def total(scale):
        sde = jdiff.reverse(process, lambda x, t: scale * data.score(x, t))
        return jnp.sum(jdiff.sample(jax.random.key(0), process, solvers.euler_maruyama(sde), (4, 2), grid) ** 2)

    h = 1e-5
    np.testing.assert_allclose(jax.grad(total)(0.9), (total(0.9 + h) - total(0.9 - h)) / (2 * h), rtol=1e-6)


def test_the_grid_has_the_dtype_of_the_samples(ts):
    process, data = setup()
    solver = solvers.euler(jdiff.probability_flow(process, data.score))
    x, path = jdiff.sample(jax.random.key(0), process, solver, (2, 2), ts.astype(jnp.bfloat16)[::5], path=True)
    assert x.dtype == path.dtype == jnp.bfloat16


def test_bad_input(ts):
    process, data = setup()
    solver = solvers.euler(jdiff.probability_flow(process, data.score))
    one = jax.random.key(0)
    run = lambda key=one, shape=(2, 2), ts=ts, **options: jdiff.sample(key, process, solver, shape, ts, **options)
    with pytest.raises(ValueError, match=r"ts must decrease here, but it increases: from 0\.01 to 1"):
        run(ts=ts[::-1])
    with pytest.raises(ValueError, match="strictly monotone"):
        run(ts=jnp.array([1.0, 0.5, 0.7]))
    with pytest.raises(ValueError, match="at least two times"):
        run(ts=ts[:1])
    for outside in ([1.5, 0.5, 0.1], [1.0, 0.5, -0.1]):
        with pytest.raises(ValueError, match="must lie in the range of the process, 0 to 1"):
            run(ts=jnp.array(outside))
    with pytest.raises(TypeError, match="floating point"):
        run(ts=jnp.array([2, 1, 0]))
    for shape in ((), (0, 2)):
        with pytest.raises(ValueError, match="batch >= 1"):
            run(shape=shape)
    with pytest.raises(ValueError, match="one key per example"):
        run(key=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(TypeError, match="typed key"):
        run(key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="must return the shape of its x"):
        run(denoise=lambda x, t: x[:, :1])
