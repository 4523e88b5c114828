"""From fields of the configuration to guided samples: the scripts on a tiny model of the digits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from configs import smoke
from experiments import build, checks, classify, cli, guides, model, sample, samplers
from experiments.artefacts import Run
from jdiff import checkpoint, data, guidance, saturation

BATCH = 4


def _config(**changes):
    """A conditional residual MLP of width 8 on the digits."""
    config = smoke.get_config()
    for text in (
        "network.name=mlp",
        'network.options={"width": 8, "depth": 1}',
        "network.conditional=true",
        "network.predict=eps",
        "sampling.steps=3",
        "sampling.number=4",
        "sampling.label=cycle",
        *(f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in changes.items()),
    ):
        cli.override(config, text)
    return config


def _classifier():
    options = {"depth": 10, "widen": 1, "patch": 2, "features": 8, "embedding": "smooth"}
    changes = {"network__conditional": False, "network__precondition": "none", "loss__name": "classifier"}
    return _config(network__name="wide_resnet", network__options=options, **changes)


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """The run folder of a model of random parameters, which depends on its labels; others at step 5."""
    home, source = tmp_path_factory.mktemp("guides"), data.load("digits", "train")
    write_run(home / "model", _config(), source)
    write_run(home / "classifier", _classifier(), source)
    return home


def write_run(folder, config, source):
    """What a training leaves, with normal parameters."""
    run = Run(folder)
    folder.mkdir()
    run.write_json("config.json", config.to_dict())
    described = model.describe(config, source)
    leaves, structure = jax.tree.flatten(model.shapes(config, described))
    statistics = model.statistics(config, source, described.transform)
    with checkpoint.open_manager(str(run / "checkpoints"), keep=2, every=5) as manager:
        for step in (5, 10):
            keys = jax.random.split(jax.random.key(step), len(leaves))
            drawn = [0.5 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
            checkpoint.save(manager, step, {"ema": jax.tree.unflatten(structure, drawn), "statistics": statistics})


@pytest.fixture(scope="module")
def run(folders):
    """The run folder of the model."""
    return Run(folders / "model")


@pytest.fixture(scope="module")
def state():
    """Noisy images and times, with one time before, one after and two inside of [0.3, 0.8]."""
    x = jax.random.normal(jax.random.key(0), (BATCH, 8, 8, 1))
    return x, jnp.array([0.1, 0.4, 0.7, 0.95])


@functools.cache
def _load(path, step=None):
    return model.load(_config(), Run(path), data.load("digits", "train"), step=step)


def _fields(run, step=None):
    """Return (cond) -> the field of a checkpoint."""
    trained = _load(run.path, step)
    return lambda cond: build.field(_config(), trained.model.module, trained.params, trained.statistics, cond=cond)


def _guided(run, cond, **changes):
    config = _config(**{f"sampling__{k}": v for k, v in changes.items()})
    checks.check(config)
    trained, helpers = _load(run.path), guides.load(config, run, data.load("digits", "train"))
    return samplers.guided(config, trained.model.module, trained.params, trained.statistics, cond, helpers)


@pytest.mark.slow_but("some")
@pytest.mark.parametrize("which", ["all", "some"])
def test_the_fields_of_the_configuration_are_the_functions_of_the_library(run, state, which):
    x, t = state
    process, cond = jdiff.VP(), jnp.arange(BATCH)
    own, early = _fields(run), _fields(run, 5)
    three, null = jnp.full_like(cond, 3), jnp.full_like(cond, 10)
    free = lambda null, scale, **kw: guidance.classifier_free(lambda x, t, c: own(c)(x, t), cond, null, scale, **kw)
    limited = lambda scale: guidance.interval(scale, 0.3, 0.8)
    adjust = saturation.rescale(process, 0.7, predict="eps")
    cut = lambda field: saturation.threshold(process, field, predict="eps", quantile=0.9)
    weak = {"weak_step": 5}
    inside = {"guidance_low": 0.3, "guidance_high": 0.8}
    rows = [
        ({}, own(cond)),
        ({"guidance": 0.0}, own(null)),
        ({"guidance": 3.0}, free(null, 3.0)),
        ({"guidance": 3.0, "negative": "3"}, free(three, 3.0)),
        ({"guidance": 3.0, **inside}, free(null, limited(3.0))),
        ({"guidance": 3.0, "guidance_rescale": 0.7}, free(null, 3.0, adjust=adjust)),
        ({"guidance": 3.0, "threshold": 0.9}, cut(free(null, 3.0))),
        ({"autoguidance": 2.5, **weak}, guidance.autoguidance(own(cond), early(cond), 2.5)),
        (
            {"guidance": 3.0, "autoguidance": 2.5, "guidance_rescale": 0.7, "threshold": 0.9, **inside, **weak},
            cut(
                guidance.autoguidance(free(null, limited(3.0), adjust=adjust), early(cond), limited(2.5), adjust=adjust)
            ),
        ),
    ]
    _, judge = classify.load(str(run.path.parent / "classifier"))
    log_prob = classify.log_prob(judge.model.module, judge.params, cond)
    follow = lambda field, scale: guidance.classifier(field, log_prob, scale, process=process, predict="eps")
    judged = {"classifier_workdir": str(run.path.parent / "classifier")}
    rows += [
        ({"guidance": 0.0, **judged}, follow(own(null), 1.0)),
        # The network stays unconditional outside of the interval too, rescaled or not.
        ({"guidance": 0.0, "guidance_rescale": 0.7, **inside}, free(null, 0.0, adjust=adjust)),
        (
            {"guidance": 0.0, **inside, **judged},
            follow(own(null), guidance.interval(1.0, 0.3, 0.8, outside=0.0)),
        ),
        (
            {"classifier_scale": 2.0, **inside, **judged},
            follow(own(cond), guidance.interval(2.0, 0.3, 0.8, outside=0.0)),
        ),
    ]
    if which == "some":  # among them the one that has everything
        rows = [rows[n] for n in (1, 3, 8, 10, 12)]
    seen = []
    for changes, expected in rows:
        found, wanted = (jax.jit(field)(x, t) for field in (_guided(run, cond, **changes), expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4, err_msg=str(changes))
        assert all(np.abs(found - other).max() > 1e-3 for other in seen), changes
        seen.append(np.asarray(found))


@pytest.mark.slow_but("jdiff")
@pytest.mark.parametrize("protocol", ["jdiff", "song2021"])
def test_samples_are_guided_by_an_earlier_step(run, protocol):
    options = {"sampling__grid": "linear", "sampling__steps": 4, "protocol": protocol}
    draw = lambda scale: sample.sample(_config(**options, **scale), run).astype(int)
    plain, guided = (draw(scale) for scale in ({}, {"sampling__autoguidance": 3.0, "sampling__weak_step": 5}))
    assert np.abs(guided - plain).mean() > 0.5


def test_mistakes_are_named(run, folders, state):
    cond = jnp.arange(BATCH)
    for message, changes in {
        "sampling.guidance must be finite and not negative": {"guidance": -1.0},
        r"sampling.guidance_rescale must be in \[0, 1\], got 1.5": {"guidance_rescale": 1.5},
        r"sampling.threshold must be in \[0, 1\], got 99.5": {"threshold": 99.5},
        "guidance_low must be below guidance_high, and that at most 1.0 .*; got 0.5 and 0.4": {
            "guidance_low": 0.5,
            "guidance_high": 0.4,
        },
        "sampling.negative must be empty or the number of a class, got 'three'": {"negative": "three"},
        "sampling.negative must be below 10, got 10": {"negative": "10", "guidance": 2.0},
        "need each other; got '', 5 and 1.0": {"weak_step": 5},
        "need each other; got '', 0 and 2.0": {"autoguidance": 2.0},
        "no step 7 in .*; there are .*5, 10": {"autoguidance": 2.0, "weak_step": 7},
        "holds a generative model, and this needs a classifier": {"classifier_workdir": str(run.path)},
        "needs a label to follow": {"classifier_workdir": "somewhere", "label": "null"},
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            _guided(run, cond, **changes)
    (folders / "other").mkdir()
    Run(folders / "other").write_json("config.json", _config(process__name="Cosine").to_dict())
    with pytest.raises(ValueError, match=r"weak_workdir is of another model: process is {'name': 'Cosine'"):
        _guided(run, cond, autoguidance=2.0, weak_workdir=str(folders / "other"))
