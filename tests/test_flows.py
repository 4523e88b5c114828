"""Flows of maximum likelihood by the scripts: what they start from, what is trained, evaluated and drawn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_cnf, digits_coupling, mnist_cnf, mnist_coupling
from experiments import checks, cli, likelihood, model, objectives, sample, train
from experiments.artefacts import Run, read_jsonl
from jdiff import data, dequantisation

CONFIGS = {"cnf": digits_cnf, "coupling": digits_coupling}


pytestmark = pytest.mark.usefixtures("digits")


def gaussian_bits(images, levels, mean, std):
    """Bits/dim of a diagonal Gaussian in logit space of images whose dequantisation is the middle of the cells."""
    y = (images.reshape(len(images), -1) + 0.5) / levels
    p = 1e-6 + (1 - 2e-6) * y
    x = np.log(p / (1 - p))
    z = (x - mean.ravel()) / std.ravel()
    log_prob = -0.5 * z**2 - np.log(std.ravel()) - 0.5 * math.log(2 * math.pi)
    volume = np.log((1 - 2e-6) / (p * (1 - p))) - math.log(levels)
    return -(log_prob + volume).mean(axis=1) / math.log(2)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_flow_starts_as_the_gaussian_of_its_data(family):
    """Both losses, in nats of logit space, against NumPy; statistics against moments of many dequantisations."""
    config = CONFIGS[family].get_config("smoke")
    config.loss.cnf.steps, config.loss.cnf.kinetic, config.loss.cnf.jacobian = 8, 0.0, 0.0
    source = data.load("digits", "train")
    described = model.describe(config, source)
    statistics = model.statistics(config, source, described.transform)
    images = source.read(np.arange(4))["image"]

    everything = np.repeat(source.read(np.arange(len(source)))["image"], 8, axis=0)
    many = np.asarray(described.transform.forward(described.transform.dequantise(jax.random.key(3), everything)))
    error = many.std(axis=0) / math.sqrt(len(many))
    # Of 64 pixels each at five standard errors: p = 4e-5.
    assert np.all(np.abs(statistics["mean"] - many.mean(axis=0)) < 5 * error)
    np.testing.assert_allclose(statistics["std"], many.std(axis=0), rtol=0.05)

    params = model.initialise(config, described, jax.random.key(0))
    loss_fn = objectives.loss(config, described.module, statistics, described.transform, train=False)
    batch = {"image": images, "index": jnp.arange(4), "key": jax.random.key(0)}
    nats, _ = jax.jit(loss_fn)(params, jax.random.split(jax.random.key(1), 4), batch)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(jax.random.split(jax.random.key(1), 4))
    unit = np.asarray(described.transform.dequantise(keys, images))
    draw = dequantisation.uniform(keys, described.transform, images)
    bits = (np.asarray(nats) * 64 + np.asarray(draw.log_q)) / (64 * math.log(2))
    expected = gaussian_bits(unit * 17 - 0.5, 17, statistics["mean"], statistics["std"])
    np.testing.assert_allclose(bits, expected, rtol=2e-3)


@pytest.mark.slow_but("coupling")
@pytest.mark.parametrize("family", CONFIGS)
def test_one_call_each_trains_evaluates_and_draws(family, tmp_path):
    config, run = CONFIGS[family].get_config("smoke"), Run(str(tmp_path / family))
    checks.check(config)
    assert train.train(config, run) == 0
    summary = likelihood.likelihood(config, run)
    assert summary["failed"] == 0 and 1 < summary["bits_per_dim"] < 6
    records = read_jsonl(run / "likelihood_test.jsonl")
    assert len({r["bits_per_dim"] for r in records}) == 8
    images = sample.sample(config, run)
    assert images.shape == (8, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 0
    if family == "coupling":
        assert all(r["evaluations"] == 1 and r["probe_error"] == 0 for r in records)
        assert (run / "samples_coupling.png").exists()
    else:
        with pytest.raises(ValueError, match="denoises nothing"):
            likelihood.likelihood(config, run, bound=True)


def test_regularisers_are_added_with_their_weights():
    config = digits_cnf.get_config("smoke")
    source = data.load("digits", "train")
    described = model.describe(config, source)
    statistics = model.statistics(config, source, described.transform)
    params = model.initialise(config, described, jax.random.key(0))
    batch = {"image": source.read(np.arange(4))["image"], "index": jnp.arange(4), "key": jax.random.key(0)}

    def value(kinetic, jacobian):
        config.loss.cnf.kinetic, config.loss.cnf.jacobian = kinetic, jacobian
        loss_fn = objectives.loss(config, described.module, statistics, described.transform, train=False)
        return loss_fn(params, jax.random.split(jax.random.key(1), 4), batch)[0]

    @jax.jit
    def all_values():
        return [value(*weights) for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (2.0, 3.0))]

    plain, kinetic, jacobian, both = (np.asarray(v) for v in all_values())
    np.testing.assert_allclose(both, plain + 2 * (kinetic - plain) + 3 * (jacobian - plain), rtol=1e-5)
    assert np.all(kinetic > plain + 0.01) and np.all(jacobian > plain + 0.01)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"process.name": "VP"}, "needs process.name = 'Rectified'"),
        ({"network.predict": "eps"}, "needs network.predict = 'velocity'"),
        ({"loss.name": "denoising"}, "data.logit"),
        ({"loss.cnf.steps": 0}, "steps >= 1"),
        ({"loss.cnf.solver": "rk5"}, "did you mean rk4"),
        ({"loss.cnf.gradient": "backsolve"}, "loss.cnf.gradient"),
        ({"network.precondition": "levels"}, "network.precondition"),
        ({"data.dequantise": False}, "needs data.dequantise = True"),
    ],
)
def test_mistakes_are_named(change, match):
    config = digits_cnf.get_config()
    for path, value in change.items():
        group, _, name = path.rpartition(".")
        target = config
        for part in group.split("."):
            target = target[part]
        target[name] = value
    with pytest.raises(ValueError, match=match):
        checks.check(config)


@pytest.mark.parametrize("module", [digits_cnf, digits_coupling, mnist_cnf, mnist_coupling])
@pytest.mark.parametrize("mode", ["full", "smoke"])
def test_configurations_are_valid(module, mode):
    checks.check(cli.from_dict(module.get_config(mode).to_dict()))
