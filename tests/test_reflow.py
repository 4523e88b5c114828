"""Pairs of a flow, training on them, and the comparison of two flows."""

import json
import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_flow
from experiments import build, checks, cli, drawing, model, objectives, pairs, parts, reflow, sample, samplers, train
from experiments.artefacts import Run, read_json
from jdiff import coupling, data, losses

pytestmark = pytest.mark.usefixtures("digits")


def _config(*texts):
    """configs/digits_flow.py in seconds, with a residual MLP."""
    config = digits_flow.get_config("smoke")
    for text in ("network.name=mlp", 'network.options={"width": 8, "depth": 1}', "sampling.steps=3", *texts):
        cli.override(config, text)
    checks.check(config)
    return config


@pytest.fixture(scope="module")
def flow(tmp_path_factory, digits):
    """A run folder of a flow that was trained for four steps."""
    run = Run(tmp_path_factory.mktemp("runs") / "flow")
    assert train.train(_config(), run) == 0
    return run


@pytest.fixture(scope="module")
def straightened(flow, tmp_path_factory):
    """The same straightened, from 20 pairs; the second of the three files of pairs fails at first."""
    out, write, seen = Run(flow.path.parent / "straight"), parts.Parts.write, []

    def failing(self, n, **arrays):
        seen.append(n)
        if len(seen) == 2:
            raise KeyboardInterrupt
        write(self, n, **arrays)

    go = lambda: reflow.reflow(_config("training.steps=2"), flow, out, number=20, samples=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.Parts, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            go()
        assert go() == 0
    assert seen == [0, 1, 1, 2]
    return out


def _field(config, run, label):
    trained = model.load(config, run, data.load("digits", "train"))
    return build.field(config, trained.model.module, trained.params, trained.statistics, cond=label)


def test_pairs_are_solves_of_the_flow(flow, straightened):
    """Heun's method by hand, from the noise of each pair to its image; noise that no sample has."""
    config = Run(str(straightened.path)).config()
    made = pairs.load(cli.from_dict(config), data.load("digits", "train"))
    assert len(made) == 20 and made.classes == 10 and made.levels == 17
    arrays = made.arrays()
    assert {name: a.shape for name, a in arrays.items()} == {
        "noise": (20, 8, 8, 1),
        "image": (20, 8, 8, 1),
        "label": (20,),
    }
    np.testing.assert_array_equal(arrays["label"], np.arange(20) % 10)
    field = jax.jit(_field(_config(), flow, jnp.asarray(arrays["label"])))
    x, ts = arrays["noise"], np.array([1, 2 / 3, 1 / 3, 0]) + 1e-5 * np.array([0, 1, 2, 3]) / 3
    time = lambda t: jnp.full(20, t, jnp.float32)
    for t, s in pairwise(ts):
        first = np.asarray(field(x, time(t)))
        second = np.asarray(field(x + np.float32(s - t) * first, time(s)))
        x = x + np.float32((s - t) / 2) * (first + second)
    x = x - np.float32(ts[-1]) * np.asarray(field(x, time(ts[-1])))  # the last denoising
    np.testing.assert_allclose(arrays["image"], x, atol=2e-5)
    assert abs(arrays["noise"].mean()) < 4 / np.sqrt(20 * 64) and abs(arrays["noise"].std() - 1) < 0.08
    sampler = drawing.load(_config(), flow)
    assert (
        not np.isclose(sampler.noise(0, jax.random.key(0)), arrays["noise"][: sampler.size]).all(axis=(1, 2, 3)).any()
    )


def test_the_new_flow_starts_from_the_old_one_and_is_a_run_like_any_other(flow, straightened):
    config = cli.from_dict(straightened.config())
    assert config.training.initial == str(flow.path) and config.training.steps == 2 and config.data.validation == ""
    source = data.load("digits", "train")
    old, new = (model.load(c, run, source) for c, run in ((_config(), flow), (config, straightened)))
    jax.tree.map(np.testing.assert_array_equal, old.statistics, new.statistics)
    begin = model.load_initial(config, new.model)
    jax.tree.map(np.testing.assert_array_equal, begin, jax.device_get(old.params))
    # The first rate of the warm-up is zero, the second 3e-3: Adam moves nothing further.
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), old.params, new.params)
    assert 0 < max(jax.tree.leaves(moved)) < 1.1 * config.optimiser.learning_rate
    config.sampling.number = 8
    assert sample.sample(config, straightened).shape == (8, 8, 8, 1)


def test_the_report(straightened):
    found = read_json(straightened / "reflow.json")
    assert json.loads(json.dumps(found)) == found and (straightened / "reflow.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("before", "after"):
        assert set(found[name]["euler"]) == {"1", "2", "4", "8"}
        values = [found[name][key] for key in ("straightness", "straightness_share", "energy", "energy_error")]
        values += [v for of in found[name]["euler"].values() for v in of.values()]
        assert all(math.isfinite(v) for v in values) and found[name]["straightness"] > 0
    text = reflow.table(found)
    assert len(text.splitlines()) == 13 and f"{found['after']['euler']['8']['rms_from_flow']:.4f}" in text


def test_straightness_of_known_flows(flow, monkeypatch):
    """dx/dt = x has S = |x_1|^2 ((1 - e^-2)/2 - (1 - 1/e)^2), and Euler's end in one step is 0; dx/dt = 1 has S = 0."""
    config = _config("sampling.batch_size=40")
    monkeypatch.setattr(samplers, "guided", lambda *args: lambda x, t: x)
    solve = reflow._solver(config, flow, 40)
    x, _, found = solve("heun", 50)
    m = 1 - math.exp(-1)
    share = ((1 - math.exp(-2)) / 2 - m**2) / m**2
    np.testing.assert_allclose(found["straightness_share"], share, rtol=2e-3)
    # Five standard errors from 40 samples: p = 1e-5 by Student's distribution.
    assert abs(found["straightness"] - 64 * share * m**2) < 5 * found["straightness_error"]
    one, images, _ = solve("euler", 1)
    np.testing.assert_allclose(one, 1e-5 * np.e * x, atol=1e-6)
    assert images.shape == (40, 8, 8, 1)
    monkeypatch.setattr(samplers, "guided", lambda *args: lambda x, t: jnp.ones_like(x))
    assert reflow._solver(config, flow, 40)("heun", 4)[2]["straightness"] < 1e-8


def test_distilling_is_training_at_pure_noise(flow):
    config = reflow.student(_config(), flow, "somewhere", distil=True)
    t, weight = objectives.training_times(config)(jax.random.key(0), build.process(config), jnp.arange(4), 4)
    assert np.all(t == 1) and np.all(weight == 1)
    assert reflow.student(_config("sampling.guidance=2.0"), flow, "somewhere", distil=False).sampling.guidance == 1


def _losses(config, batch, monkeypatch, train=True):
    """The loss of a field that needs no parameters, with the keys of the batch's examples."""
    monkeypatch.setattr(objectives, "field", lambda *args, cond, **options: _plain(cond))
    described = model.describe(config, data.load("digits", "train"))
    loss = objectives.loss(config, described.module, {}, described.transform, train=train)
    keys = jax.random.split(jax.random.key(0), len(batch["index"]))
    return np.asarray(loss({}, keys, {**batch, "key": jax.random.key(1)})[0]), keys, described


def _plain(cond):
    return lambda x, t: jnp.sin(x) + (t + cond.astype(t.dtype)).reshape(-1, 1, 1, 1)


def test_the_loss_on_pairs_and_on_coupled_noise(monkeypatch):
    """By hand: given pairs as they are; optimal transport inside groups of 8 of one condition, dropped labels too."""
    rng, process = np.random.default_rng(0), build.process(_config())
    batch = {
        "image": jnp.asarray(rng.normal(size=(16, 8, 8, 1)), jnp.float32),
        "noise": jnp.asarray(rng.normal(size=(16, 8, 8, 1)), jnp.float32),
        "label": jnp.asarray(np.arange(16) % 2, jnp.int32),
        "index": jnp.arange(16),
    }
    settings = ("training.batch_size=16", "loss.label_dropout=0.4")
    times = lambda config: objectives.training_times(config)(jax.random.key(1), process, jnp.arange(16), 16)
    want = lambda x0, eps, t, cond: losses.denoising(None, _plain(cond), process, x0, t, predict="velocity", eps=eps)

    config = _config(*settings)
    got, keys, described = _losses(config, batch, monkeypatch, train=False)
    t, _ = times(config)
    np.testing.assert_allclose(got, want(batch["image"], batch["noise"], t, batch["label"]), rtol=1e-5)

    fold = lambda n: jax.vmap(lambda k: jax.random.fold_in(k, n))(keys)
    levels = {**batch, "image": jnp.asarray(rng.integers(0, 17, (16, 8, 8, 1)), jnp.uint8)}
    del levels["noise"]
    x0 = objectives.model_space(config, described.transform, keys, levels["image"])
    eps = jax.vmap(lambda k: jax.random.normal(k, (8, 8, 1)))(fold(2))
    cond = jnp.where(jax.vmap(lambda k: jax.random.bernoulli(k, 0.4))(fold(3)), 10, levels["label"])
    assert 0 < int((cond == 10).sum()) < 16
    np.testing.assert_allclose(_losses(config, levels, monkeypatch)[0], want(x0, eps, t, cond), rtol=1e-5)

    config = _config(*settings, "loss.coupling=optimal_transport", "loss.coupling_group=8")
    partners = coupling.optimal_transport(x0, eps, labels=cond, group=8)
    assert np.any(partners != np.arange(16)) and np.all(partners // 8 == np.arange(16) // 8)
    assert np.all(cond[partners] == cond)
    np.testing.assert_allclose(_losses(config, levels, monkeypatch)[0], want(x0, eps[partners], t, cond), rtol=1e-5)

    config = _config(*settings, "loss.times.name=cosmap", "loss.times.shift=3.0")
    t, weight = times(config)
    assert np.ptp(weight) > 0.1
    np.testing.assert_allclose(_losses(config, levels, monkeypatch)[0], weight * want(x0, eps, t, cond), rtol=1e-5)
    cli.override(config, "loss.times.weighted=false")
    np.testing.assert_allclose(_losses(config, levels, monkeypatch)[0], want(x0, eps, t, cond), rtol=1e-5)


def test_bad_input(flow, tmp_path):
    out = Run(tmp_path / "out")
    with pytest.raises(ValueError, match="two folders"):
        reflow.reflow(_config(), flow, flow, number=4, samples=8)
    with pytest.raises(ValueError, match="--samples must be at least 8, got 4"):
        reflow.reflow(_config(), flow, out, number=4, samples=4)
    for text, message in (
        ("process.name=VP", r"process.name = \"Rectified\".*got 'VP' and 'velocity'"),
        ("network.predict=eps", "got 'Rectified' and 'eps'"),
        ("sampling.solver=euler_maruyama", "got 'euler_maruyama'"),
    ):
        with pytest.raises(ValueError, match=message):
            pairs.make(_config(text), flow, out, 4)
    with pytest.raises(ValueError, match="pairs must be positive, got 0"):
        pairs.make(_config(), flow, out, 0)
    with pytest.raises(FileNotFoundError, match="no finished pairs"):
        train.train(_config(f"data.pairs={tmp_path}"), out)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.train(_config(f"training.initial={tmp_path / 'nowhere'}"), out)
    with pytest.raises(ValueError, match=r"groups of 2 \(loss.coupling_group\) on each of 8 devices"):
        train.train(_config("loss.coupling=optimal_transport", "loss.coupling_group=2"), Run(tmp_path / "third"))
