"""Sample i depends on key i and the field alone: not on the batch, its order, the number of devices or the mapping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from solver_tables import DETERMINISTIC, STOCHASTIC

from jdiff import likelihood, predictions, processes, sampling, sde, solvers
from jdiff._array import fold_in

BATCH, EVENT = 64, (2, 3)
PROCESS = processes.VP()
TS = processes.time_at(PROCESS, jnp.linspace(-6.0, 4.0, 5))
ROWS = PartitionSpec("data")
KEYS = jax.random.split(jax.random.key(11), BATCH)


def network(x, t):
    """A two-layer perceptron of the noise level and the state, as an x0-field."""
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), x.dtype) for shape in ((7, 16), (16, 6))]
    features = jnp.concatenate([x.reshape(len(x), -1), t[:, None]], axis=1)
    return jnp.tanh(jnp.tanh(features @ weights[0]) @ weights[1]).reshape(x.shape)


def table():
    made = {name: case.make(PROCESS, network) for name, case in DETERMINISTIC.items()}
    made |= {name: case.make(PROCESS, network, solvers.white) for name, case in STOCHASTIC.items()}
    score = predictions.reparameterise(PROCESS, network, "x0", "score")
    corrector = solvers.langevin(score, steps=2)
    return made | {"predictor_corrector": solvers.predictor_corrector(made["euler_maruyama"], corrector)}


SOLVERS = table()


# One of each kind, where compiling all of them many times would take minutes.
SOME = ("dpmpp_2m", "predictor_corrector")


def draw(keys, names=tuple(SOLVERS)):
    """Samples of solvers, by name, and the noise of one step."""
    samples = {
        name: sampling.sample(keys, PROCESS, SOLVERS[name], (len(keys), *EVENT), TS, denoise=network) for name in names
    }
    return samples, solvers.white(fold_in(keys, 3), jnp.zeros((len(keys), *EVENT)), None, None)


def mapped(function, how, devices):
    """The function of a batch under a mapping of that batch over some devices."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    if how == "jit":
        return lambda *args: jax.jit(function)(*jax.device_put(args, NamedSharding(mesh, ROWS)))
    if how == "shard_map":
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=ROWS, out_specs=ROWS))

    def run(*args):
        fold = lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:])
        results = jax.pmap(function, devices=jax.devices()[:devices])(*map(fold, args))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)

    return run


@functools.cache
def program(names=tuple(SOLVERS)):
    return jax.jit(functools.partial(draw, names=names))


@functools.cache
def reference(names=tuple(SOLVERS)):
    return jax.tree.map(np.asarray, program(names)(KEYS))


def agree(got, want):
    (samples, noise), (expected, expected_noise) = got, want
    np.testing.assert_array_equal(noise, expected_noise)
    for name in samples:
        np.testing.assert_allclose(samples[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def rows(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def test_samples_differ():
    """The comparisons below compare something: other keys and other solvers give other samples."""
    samples, noise = reference()
    for name, x in samples.items():
        assert np.min(np.max(np.abs(x[1:] - x[0]), axis=(1, 2))) > 1e-2, name
    assert np.min(np.abs(noise[1:] - noise[0])) > 0
    flat = np.stack([samples[name].ravel() for name in SOLVERS])
    distances = np.max(np.abs(flat[:, None] - flat[None]), axis=-1) + np.eye(len(flat))
    close = {frozenset((list(SOLVERS)[i], list(SOLVERS)[j])) for i, j in np.argwhere(distances < 1e-3)}
    assert close == {frozenset(("ancestral, small", "ddim, eta = 1"))}  # one method by two names


def test_alone():
    for i in (0, 17, BATCH - 1):
        agree(program(SOME)(KEYS[i : i + 1]), rows(reference(SOME), slice(i, i + 1)))


def test_in_another_order():
    order = np.random.default_rng(0).permutation(BATCH)
    agree(program()(KEYS[order]), rows(reference(), order))


@pytest.mark.slow_but("1", "8")
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_mappings(how, devices):
    agree(mapped(functools.partial(draw, names=SOME), how, devices)(KEYS), reference(SOME))


@pytest.mark.slow
def test_every_solver_on_eight_devices():
    agree(mapped(draw, "shard_map", 8)(KEYS), reference())


def test_one_key_is_its_split():
    solver = SOLVERS["ancestral, small"]
    one, many = (
        sampling.sample(key, PROCESS, solver, (BATCH, *EVENT), TS)
        for key in (jax.random.key(11), jax.random.split(jax.random.key(11), BATCH))
    )
    np.testing.assert_array_equal(one, many)


# Likelihood ----------------------------------------------------------------------------------------------------------


def log_likelihood(keys, x):
    return likelihood.log_likelihood(
        keys, PROCESS, network, x, predict="x0", probes=2, t_min=1e-3, rtol=1e-4, atol=1e-4
    )


@functools.cache
def reference_likelihood():
    keys = KEYS[:16]
    x = jax.random.normal(jax.random.key(5), (16, *EVENT)) * jnp.linspace(0.2, 3, 16)[:, None, None]
    return keys, x, jax.jit(log_likelihood)(keys, x)


def same_likelihood(got, want):
    np.testing.assert_allclose(got.log_prob, want.log_prob, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.latent, want.latent, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.probe_error, want.probe_error, rtol=1e-3, atol=1e-4)
    # A step at the edge of acceptance may fall on either side of it.
    difference = np.abs(np.asarray(got.evaluations) - np.asarray(want.evaluations))
    assert np.mean(difference == 0) >= 0.75 and np.max(difference) <= 6
    assert not np.any(got.failed)


@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_likelihood_on_eight_devices(how):
    keys, x, want = reference_likelihood()
    same_likelihood(mapped(log_likelihood, how, 8)(keys, x), want)
    assert len(set(np.asarray(want.evaluations).tolist())) > 1
    assert np.ptp(want.log_prob) > 1


def test_likelihood_in_another_order():
    keys, x, want = reference_likelihood()
    order = np.random.default_rng(1).permutation(16)
    same_likelihood(jax.jit(log_likelihood)(keys[order], x[order]), rows(want, order))


def test_likelihood_traces_once_for_new_parameters():
    traces = []

    @jax.jit
    def run(scale, keys, x):
        traces.append(scale)
        field = lambda x, t: scale * network(x, t)
        return likelihood.log_likelihood(keys, PROCESS, field, x, predict="x0", t_min=1e-3, rtol=1e-3, atol=1e-3)

    keys, x, _ = reference_likelihood()
    first, second = run(1.0, keys, x), run(0.5, keys[::-1], x)
    assert len(traces) == 1
    assert np.max(np.abs(first.log_prob - second.log_prob)) > 0.1


def test_the_default_reverse_sde_is_stochastic():
    """Two keys, one start: what differs between samples is the noise of the steps and not the prior alone."""
    solver = solvers.euler_maruyama(sde.reverse(PROCESS, network, predict="x0"))
    x = jnp.zeros((2, *EVENT))
    end, _ = solvers.integrate(KEYS[:2], solver, x, TS)
    assert np.max(np.abs(end[0] - end[1])) > 0.1
