import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from ml_collections import ConfigDict

import jdiff
from configs import smoke
from experiments import checks, objectives
from experiments import model as network
from jdiff import analytic, data, losses, score_matching

SIZE, T = 2, 0.4
PROCESS = jdiff.VP()


def quadrature(size, points=24):
    """Nodes and weights of E over N(0, I) in `size` dimensions, exact for polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    mesh = np.stack([axis.ravel() for axis in np.meshgrid(*[nodes] * size)], axis=-1)
    weight = np.prod([axis.ravel() for axis in np.meshgrid(*[weights] * size)], axis=0)
    return jnp.asarray(mesh), jnp.asarray(weight / weight.sum())


def model(p):
    """A polynomial that is no gradient, so that quadrature is exact and the Jacobian has no symmetry."""
    return lambda x, t: x @ p["linear"] + p["cubic"][None] * (x @ p["mix"]) ** 3 + t[:, None]


def params():
    rng = np.random.default_rng(0)
    return {
        "linear": jnp.asarray(rng.normal(size=(SIZE, SIZE))),
        "mix": jnp.asarray(0.5 * rng.normal(size=(SIZE, SIZE))),
        "cubic": jnp.asarray(0.1 * rng.normal(size=SIZE)),
    }


def test_the_true_score_of_a_gaussian_is_the_minimum_minus_half_its_square(x64):
    truth = analytic.gaussian(PROCESS, jnp.asarray([0.5, -1.0]), 0.7)
    alpha, sigma = PROCESS.marginal(jnp.asarray(T))
    z, weight = quadrature(SIZE)
    variance = (0.7 * alpha) ** 2 + sigma**2
    x = alpha * jnp.asarray([[0.5, -1.0]]) + jnp.sqrt(variance) * z

    @jax.jit
    def value(scale, shift):
        return weight @ score_matching.implicit(lambda x, t: scale * truth.score(x, t) + shift, x, T)

    np.testing.assert_allclose(value(1.0, 0.0), -0.5 * SIZE / variance, rtol=1e-10)
    # Another field costs half its mean squared distance more, here in closed form.
    np.testing.assert_allclose(value(1.3, 0.0), -0.5 * SIZE / variance * (1 - 0.3**2), rtol=1e-10)
    np.testing.assert_allclose(value(1.0, 0.2), -0.5 * SIZE / variance + 0.5 * SIZE * 0.04, rtol=1e-10)


def test_implicit_is_denoising_less_a_constant_and_so_are_their_gradients(x64):
    """Both expectations by quadrature over (x_0, eps), for a score that is wrong."""
    alpha, sigma = PROCESS.marginal(jnp.asarray(T))
    z, weight = quadrature(2 * SIZE, points=6)
    x0, eps = 0.2 + 0.7 * z[:, :SIZE], z[:, SIZE:]
    x = alpha * x0 + sigma * eps

    def denoising(p):
        t = jnp.full(len(x), T)
        return weight @ (0.5 * jnp.sum((model(p)(x, t) + eps / sigma) ** 2, axis=1))

    implicit = lambda p: weight @ score_matching.implicit(model(p), x, T)
    (a, of_a), (b, of_b) = (jax.jit(jax.value_and_grad(f))(params()) for f in (implicit, denoising))
    np.testing.assert_allclose(a, b - 0.5 * SIZE / sigma**2, rtol=1e-10)
    for name in of_a:
        np.testing.assert_allclose(of_a[name], of_b[name], rtol=1e-8, atol=1e-10)


def test_the_denoising_loss_of_the_library_is_the_one_meant():
    key, x0 = jax.random.split(jax.random.key(0), 3), jnp.ones((3, SIZE))
    p = jax.tree.map(lambda a: a.astype(jnp.float32), params())
    alpha, sigma = PROCESS.marginal(jnp.asarray(T))
    eps = jax.vmap(lambda k: jax.random.normal(k, (SIZE,)))(key)
    ours = losses.denoising(key, model(p), PROCESS, x0, T, predict="score")
    x = alpha * x0 + sigma * eps
    half_sum = 0.5 * jnp.sum((model(p)(x, jnp.full(3, T)) + eps / sigma) ** 2, axis=1)
    np.testing.assert_allclose(0.5 * SIZE * ours, half_sum, rtol=1e-5)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("reduce_variance", [True, False])
def test_slices_are_unbiased(x64, probe, reduce_variance):
    count = 20_000
    x = jnp.broadcast_to(jnp.asarray([[0.8, -0.6]]), (count, SIZE))
    field = model(params())
    options = {"probe": probe, "reduce_variance": reduce_variance, "probes": 2}
    found = np.asarray(jax.jit(lambda x: score_matching.sliced(jax.random.key(1), field, x, T, **options))(x))
    exact = float(score_matching.implicit(field, x[:1], T)[0])
    error = found.std() / np.sqrt(count)
    assert abs(found.mean() - exact) < 4 * error
    square = 0.5 * float(jnp.sum(field(x[:1], jnp.full(1, T)) ** 2))
    assert min(square, abs(exact - square)) > 12 * error  # either term left out, or doubled, would be seen


def test_gradients_against_finite_differences(x64):
    p, x = params(), jnp.asarray(np.random.default_rng(2).normal(size=(4, SIZE)))
    for loss in (
        lambda p: jnp.sum(score_matching.implicit(model(p), x, T)),
        lambda p: jnp.sum(score_matching.sliced(jax.random.key(3), model(p), x, T, reduce_variance=False)),
    ):
        check_grads(jax.jit(loss), (p,), order=1, modes=("rev",), rtol=1e-6)


def test_an_example_depends_on_its_own_key_alone():
    keys, p = jax.random.split(jax.random.key(0), 3), jax.tree.map(lambda a: a.astype(jnp.float32), params())
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, SIZE)), jnp.float32)
    run = jax.jit(lambda keys, x: score_matching.sliced(keys, model(p), x, T, probe="gaussian"))
    np.testing.assert_allclose(run(keys, x)[1:], run(keys[1:], x[1:]), rtol=1e-6)


def test_losses_in_half_precision_are_of_float32():
    """Of one entry all are s^2 / 2 + s': 300^2 is not a number of float16."""
    x = jnp.ones((2, 1), jnp.float16)
    score = lambda x, t: 300 * x
    found = [score_matching.implicit(score, x, T)]
    for reduce_variance in (True, False):
        found.append(score_matching.sliced(jax.random.key(0), score, x, T, reduce_variance=reduce_variance))
    assert all(loss.dtype == jnp.float32 for loss in found)
    np.testing.assert_array_equal(found, np.full((3, 2), 45_300))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f, x: score_matching.sliced(jax.random.key(0), f, x, T, probe="exact"), ValueError, "'rademacher'"),
        (lambda f, x: score_matching.sliced(jax.random.key(0), f, x, T, probes=0), ValueError, "probes"),
        (lambda f, x: score_matching.sliced(None, f, x, T), ValueError, "key"),
        (lambda f, x: score_matching.implicit(f, x.astype(int), T), TypeError, "floating"),
        (lambda f, x: score_matching.implicit(lambda x, t: x[:, :1], x, T), ValueError, "shape"),
    ],
)
def test_mistakes_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(lambda x, t: x, jnp.ones((2, SIZE)))


@pytest.mark.slow_but("sliced")
@pytest.mark.parametrize("name", ["implicit", "sliced"])
def test_a_configured_loss_is_the_denoising_one_less_a_constant(name, monkeypatch, tmp_path):
    """With weight sigma^2 the constant is E|eps|^2 / D = 1; 4 standard errors (p = 6e-5) are under 0.1 of that."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = smoke.get_config()
    config.network.options = ConfigDict({"width": 32, "depth": 2})
    config.network.update(name="mlp", predict="score", precondition="none")
    config.loss.weight.name, config.loss.times.name = "sigma2", "uniform"
    source = data.load("digits", "train")
    described = network.describe(config, source)
    count = config.training.batch_size = 512
    parameters = network.initialise(config, described, jax.random.key(0))
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(parameters)))
    noise = jax.tree.unflatten(jax.tree.structure(parameters), noise)
    parameters = jax.tree.map(lambda p, k: p + 0.3 * jax.random.normal(k, p.shape), parameters, noise)
    batch = {**source.read(np.arange(count)), "index": jnp.arange(count), "key": jax.random.key(2)}

    def per_example(name):
        config.loss.name = name
        checks.check(config)
        loss = objectives.loss(config, described.module, {}, described.transform)
        return np.asarray(jax.jit(loss)(parameters, jax.random.split(jax.random.key(3), count), batch)[0])

    target, ours = per_example("denoising"), per_example(name)
    difference = target - ours
    error = difference.std(ddof=1) / np.sqrt(count)
    assert error < 0.025 and ours.std() > 0.1
    assert abs(difference.mean() - 1) < 4 * error


def test_a_configured_loss_needs_a_score():
    config = smoke.get_config()
    config.loss.name = "sliced"
    with pytest.raises(ValueError, match=r"'sliced' needs network.predict = \"score\", got 'v'"):
        checks.check(config)
