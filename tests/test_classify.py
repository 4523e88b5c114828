"""A classifier of noisy digits, trained, evaluated along the noise, and refused where a generative model is meant."""

import json

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest

from configs import mnist_classifier
from experiments import artefacts, build, checks, classify, cli, export, model, objectives, sample, train
from jdiff import Rectified, data, guidance, times

pytestmark = pytest.mark.usefixtures("digits")


def _config(*changes):
    config = mnist_classifier.get_config()
    for text in (
        *("data.name=digits", "data.train=train", "data.validation=test", "training.steps=60", "optimiser.warmup=5"),
        'network.options={"depth": 10, "widen": 1, "patch": 2, "embedding": "smooth", "features": 8}',
        *("training.batch_size=64", "training.log_every=20", "training.validate_every=60"),
        *("training.checkpoint_every=60", *changes),
    ):
        cli.override(config, text)
    checks.check(config)
    return config


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    run = artefacts.Run(str(tmp_path_factory.mktemp("runs") / "classifier"))
    assert train.train(_config(), run) == 0
    return run


@pytest.mark.slow
def test_a_classifier_learns_and_is_evaluated_along_the_noise(done, monkeypatch):
    lines = artefacts.read_jsonl(done / "metrics.jsonl")
    last = lines[-1]
    assert last["validation_loss"] < 0.8 * np.log(10) and last["validation_accuracy"] > 0.35
    with monkeypatch.context() as patch:  # another than the first of several processes
        patch.setattr(classify, "primary", lambda: False)
        rows = classify.classify(_config(), done)
        assert not (done / "classifier.json").exists() and not (done / "classifier.png").exists()
    assert classify.classify(_config(), done) == rows
    assert rows == json.loads((done / "classifier.json").read_text())["times"] and len(rows) == 11
    # Sharp digits are told apart, pure noise is not: a tenth, within four standard errors of guessing.
    assert rows[0]["accuracy"] > 0.7 and rows[0]["cross_entropy"] < rows[5]["cross_entropy"] < rows[-1]["cross_entropy"]
    assert abs(rows[-1]["accuracy"] - 0.1) < 4 * np.sqrt(0.09 / 360) + 0.03
    assert (done / "classifier.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_its_log_probability_serves_guidance(done):
    _, trained = classify.load(str(done.path))
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    t, label = jnp.asarray([0.1, 0.5, 0.9]), jnp.asarray([3, 1, 7])
    log_prob = jax.jit(lambda label, x: classify.log_prob(trained.model.module, trained.params, label)(x, t))
    rows = [log_prob(jnp.full(3, k), x) for k in range(10)]
    np.testing.assert_allclose(np.exp(rows).sum(axis=0), 1, rtol=1e-5)
    chosen = lambda x: log_prob(label, x)
    np.testing.assert_allclose(chosen(x), [rows[k][i] for i, k in enumerate([3, 1, 7])], rtol=1e-5)
    guided = guidance.classifier(lambda x, t: 0 * x, lambda x, t: chosen(x), 1.0)(x, t)
    h = 1e-2 * jnp.ones_like(x)
    slope = (chosen(x + h) - chosen(x - h)) / 2
    np.testing.assert_allclose((guided * h).sum((1, 2, 3)), slope, rtol=2e-2, atol=1e-4)


@pytest.mark.slow
def test_it_is_no_generative_model(done, tmp_path):
    with pytest.raises(ValueError, match="holds a classifier, and this needs a generative model"):
        sample.sample(_config(), done)
    config = _config()
    config.loss.name = "denoising"
    with pytest.raises(ValueError, match="holds a generative model, and this needs a classifier"):
        model.load(config, done, data.load("digits", "train"), classifier=True)
    written = export.export(_config(), done, str(tmp_path / "classifier.safetensors"))
    assert written["params/head/bias"].shape == (10,)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("loss.name=denoising", "need each other"),
        ("network.conditional=true", "needs network.conditional = false"),
        ("network.precondition=scalar", "needs network.conditional = false"),
    ],
)
def test_configurations_that_do_not_fit(change, match):
    with pytest.raises(ValueError, match=match):
        _config(change)


def test_the_objective_is_the_cross_entropy_of_the_label():
    config, source = _config("loss.times.name=uniform"), data.load("digits", "train")
    described = model.describe(config, source)
    params = model.initialise(config, described, jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    batch = source.read(np.arange(4)) | {"index": jnp.arange(4), "key": jax.random.key(2)}
    keys = jax.random.split(jax.random.key(3), 4)
    loss_fn = nn_reference.quick_jit(objectives.loss(config, described.module, {}, described.transform))
    loss, metrics = loss_fn(params, keys, batch)
    fold = lambda n: jax.vmap(lambda key: jax.random.fold_in(key, n))(keys)
    x0 = described.transform.forward(described.transform.dequantise(fold(0), batch["image"]))
    t, _ = times.uniform(batch["key"], Rectified(), batch["index"], 64)
    eps = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(fold(2))
    x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
    logits = nn_reference.quick_jit(described.module.apply)({"params": params}, x, t)
    logits = np.asarray(logits, np.float64)
    want = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(4), batch["label"]]
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    np.testing.assert_array_equal(metrics["accuracy"], logits.argmax(axis=1) == batch["label"])


def test_labels_are_needed():
    with pytest.raises(ValueError, match="a classifier needs labels, and digits has none"):
        build.network(_config(), 1, 256, None)
