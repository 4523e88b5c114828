import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

import jdiff
from jdiff import analytic, cnf, parallel, training
from jdiff.solvers.tableaus import HEUN

PROCESS = jdiff.Rectified(t_min=0.0)
SIZE, BATCH = 3, 4
T_MIN = 1e-4  # a velocity made of an x0 divides by t
WEIGHTS = (1.0, 0.3, 0.2)


def grid(steps):
    return jnp.linspace(0.0, 1.0, steps + 1)


def params(dtype=jnp.float64, seed=0, width=6):
    rng = np.random.default_rng(seed)
    shapes = {"a": (SIZE, width), "c": (1, width), "b": (width, SIZE)}
    return {name: jnp.asarray(0.7 * rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def data(dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, SIZE)), dtype)


def network(p):
    """A field whose Jacobian is not symmetric, and that moves with time."""
    return lambda x, t: jnp.tanh(x @ p["a"] + t[:, None] * p["c"]) @ p["b"]


@functools.partial(jax.jit, static_argnames=("gradient", "divergence"))
def loss_and_gradient(p, x, ts, gradient, divergence="rademacher"):
    def loss(p, x):
        terms = cnf.maximum_likelihood(
            jax.random.key(2), PROCESS, network(p), x, ts, gradient=gradient, divergence=divergence
        )
        return sum(w * jnp.mean(term) for w, term in zip(WEIGHTS, terms))

    return jax.value_and_grad(loss, argnums=(0, 1))(p, x)


def distance(a, b):
    return max(float(jnp.max(jnp.abs(u - v))) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("divergence", ["exact", "rademacher"])
def test_a_gaussian_flow_has_its_closed_form(x64, divergence):
    """x_t = alpha m + s_t u: log p, int |s' u - m|^2 dt and D int (s'/s)^2 dt. Jacobian diagonal: probes are exact."""
    mean, std = jnp.asarray([0.3, -0.5, 1.0]), 0.4
    truth = analytic.gaussian(PROCESS, mean, std)
    field = jdiff.reparameterise(PROCESS, truth.denoise, "x0", "velocity")
    x = truth.sample(jax.random.key(3), BATCH)
    ts = jdiff.times.quadratic(PROCESS, 40, t_min=T_MIN)[::-1].astype(jnp.float64)
    terms = jax.jit(lambda x: cnf.maximum_likelihood(jax.random.key(0), PROCESS, field, x, ts, divergence=divergence))(
        x
    )
    np.testing.assert_allclose(terms.nll, -truth.log_prob(x, T_MIN), rtol=1e-5)

    s = lambda t: np.sqrt((1 - t) ** 2 * std**2 + t**2)
    slope = lambda t: (t - (1 - t) * std**2) / s(t)
    u = (np.asarray(x) - (1 - T_MIN) * np.asarray(mean)) / s(T_MIN)
    kinetic = scipy.integrate.quad_vec(lambda t: np.sum((slope(t) * u - np.asarray(mean)) ** 2, axis=1), T_MIN, 1)[0]
    jacobian = SIZE * scipy.integrate.quad(lambda t: (slope(t) / s(t)) ** 2, T_MIN, 1)[0]
    np.testing.assert_allclose(terms.kinetic, kinetic, rtol=1e-5)
    np.testing.assert_allclose(terms.jacobian, np.full(BATCH, jacobian), rtol=1e-5)


@pytest.mark.parametrize("divergence", ["rademacher", "gaussian"])
def test_probes_are_unbiased_for_the_log_density_and_the_jacobian_norm(x64, divergence):
    p, count = params(), 4000
    x = jnp.broadcast_to(data()[:1], (count, SIZE))
    run = lambda key, x, how: cnf.maximum_likelihood(key, PROCESS, network(p), x, grid(4), divergence=how)
    found = jax.jit(lambda x: run(jax.random.key(5), x, divergence))(x)
    exact = jax.jit(lambda x: run(None, x, "exact"))(x[:1])
    for name in ("nll", "jacobian"):
        values = np.asarray(getattr(found, name))
        error = values.std() / np.sqrt(count)
        assert abs(values.mean() - float(getattr(exact, name)[0])) < 4 * error, name
        assert 12 * error < abs(values.mean()), name  # a factor of 1.5 would be seen
    np.testing.assert_allclose(found.kinetic, np.full(count, float(exact.kinetic[0])), rtol=1e-12)


@pytest.mark.slow_but("rademacher")
@pytest.mark.parametrize("divergence", ["rademacher", "exact"])
def test_the_adjoint_converges_to_exact_differentiation_at_the_order_of_the_method(x64, divergence):
    p, x = params(), data()
    errors = []
    for steps in (8, 16, 32):
        value, adjoint = loss_and_gradient(p, x, grid(steps), "adjoint", divergence)
        same, exact = loss_and_gradient(p, x, grid(steps), "discrete", divergence)
        np.testing.assert_allclose(value, same, rtol=1e-12)
        errors.append(distance(adjoint, exact))
    assert errors[-1] < 1e-5
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(slopes - 4) < 0.5), slopes


@pytest.mark.parametrize(("gradient", "tolerance"), [("discrete", 1e-8), ("adjoint", 1e-5)])
def test_gradients_against_finite_differences(x64, gradient, tolerance):
    p, x, ts = params(), data(), grid(32)
    _, (of_params, of_x) = loss_and_gradient(p, x, ts, gradient)
    move = {k: jnp.asarray(np.random.default_rng(7).normal(size=v.shape)) for k, v in p.items()}
    move_x = jnp.asarray(np.random.default_rng(8).normal(size=x.shape))
    h = 1e-5
    value_at = lambda h: loss_and_gradient(jax.tree.map(lambda v, m: v + h * m, p, move), x + h * move_x, ts, gradient)[
        0
    ]
    along = sum(jnp.vdot(g, m) for g, m in zip(jax.tree.leaves(of_params), jax.tree.leaves(move)))
    along = along + jnp.vdot(of_x, move_x)
    np.testing.assert_allclose(along, (value_at(h) - value_at(-h)) / (2 * h), rtol=tolerance)


def test_the_density_is_that_of_log_likelihood(x64):
    p, x, key = params(), data(), jax.random.split(jax.random.key(4), BATCH)
    ours = jax.jit(lambda x: cnf.maximum_likelihood(key, PROCESS, network(p), x, grid(64)).nll)(x)
    theirs = jax.jit(
        lambda x: jdiff.log_likelihood(key, PROCESS, network(p), x, predict="velocity", rtol=1e-9, atol=1e-9).log_prob
    )(x)
    np.testing.assert_allclose(ours, -theirs, rtol=1e-6)


def test_memory_of_the_adjoint_does_not_grow_with_the_steps():
    width, batch = 64, 256
    p = {"a": jnp.ones((SIZE, width)), "c": jnp.ones((1, width)), "b": jnp.ones((width, SIZE))}
    x = jnp.ones((batch, SIZE))

    def bytes_of(gradient, steps):
        lowered = loss_and_gradient.lower(p, x, grid(steps), gradient)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = (bytes_of("adjoint", steps) for steps in (8, 64))
    assert many < 1.02 * few
    stored = bytes_of("discrete", 64) - bytes_of("discrete", 8)
    assert stored >= 56 * batch * SIZE * 4  # the states at least


def test_an_example_depends_on_its_own_key_alone_and_labels_may_be_closed_over_inside_a_scan():
    keys = jax.random.split(jax.random.key(1), BATCH)
    x, labels, p = data(jnp.float32), jnp.arange(BATCH) % 2, params(jnp.float32)
    p = p | {"table": jnp.asarray([[0.3, -0.2, 0.1], [-0.5, 0.4, 0.2]])}

    def loss(p, key, x, labels):
        field = lambda x, t: network(p)(x, t) + p["table"][labels]
        return cnf.maximum_likelihood(key, PROCESS, field, x, grid(3), tableau=HEUN).nll

    whole = jax.jit(jax.grad(lambda p: jnp.sum(loss(p, keys, x, labels))))(p)

    @jax.jit
    def one_by_one(p):
        def add(total, example):
            return total + jnp.sum(loss(p, *jax.tree.map(lambda leaf: leaf[None], example))), None

        return jax.lax.scan(add, 0.0, (keys, x, labels))[0]

    parts = jax.grad(one_by_one)(p)
    for name in p:
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-4, atol=1e-5)


def test_one_gradient_under_jit_and_shard_map():
    p, x = params(jnp.float32), jnp.tile(data(jnp.float32), (2, 1))

    def loss(p, keys, batch):
        return cnf.maximum_likelihood(keys, PROCESS, network(p), batch["x"], grid(3), tableau=HEUN).nll, {}

    batch, tx = {"x": x, "index": jnp.arange(len(x))}, optax.sgd(0.1)
    mesh = parallel.data_mesh(jax.devices()[:2])
    results = []
    for how in ("jit", "shard_map"):
        step = parallel.data_parallel(loss, tx, mesh, how, ema_decay=0.0)
        start = parallel.replicate(training.init_state(p, tx), mesh)
        results.append(step(start, jax.random.key(0), parallel.shard_batch(batch, mesh))[0].params)
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert distance(results[0], p) > 1e-3


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"divergence": "none"}, ValueError, "rademacher"),
        ({"gradient": "backsolve"}, ValueError, "'adjoint' or 'discrete'"),
        ({"probes": 0}, ValueError, "probes"),
        ({"ts": jnp.asarray([0.0, 0.5])}, ValueError, "t_max = 1"),
        ({"ts": jnp.asarray([1.0, 0.0])}, ValueError, "increase"),
        ({"x": jnp.ones(3)}, ValueError, r"\(batch, \*event\)"),
        ({"x": jnp.ones((2, 3), int)}, TypeError, "floating"),
        ({"x": jnp.ones((2, SIZE), jnp.bfloat16)}, TypeError, "float32 or wider, got bfloat16"),
        ({"key": None}, ValueError, "need a key"),
    ],
)
def test_mistakes_are_named(change, error, match):
    given = {"key": jax.random.key(0), "x": jnp.ones((2, SIZE)), "ts": grid(2)} | change
    with pytest.raises(error, match=match):
        key, x, ts = (given.pop(name) for name in ("key", "x", "ts"))
        cnf.maximum_likelihood(key, PROCESS, lambda x, t: x, x, ts, **given)
