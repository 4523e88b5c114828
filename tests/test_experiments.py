"""The scripts, in this process: train, stop, resume, evaluate, sample, report, and each way in which it goes wrong."""

import base64
import json
import math
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import smoke
from experiments import (
    artefacts,
    build,
    checks,
    cli,
    compilation,
    demo,
    drawing,
    errors,
    learning_curve,
    likelihood,
    methods,
    model,
    objectives,
    parts,
    report,
    sample,
    samplers,
    search_grid,
    train,
    yardsticks,
)
from experiments.artefacts import Run, read_json, read_jsonl
from jdiff import checkpoint, data

_NHWC = ("NHWC", "HWIO", "NHWC")


pytestmark = pytest.mark.usefixtures("digits")


def _config(**changes):
    """A residual MLP of width 8 on the digits: compiles in a second or two."""
    config = smoke.get_config()
    for text in (
        "network.name=mlp",
        'network.options={"width": 8, "depth": 1}',
        "training.steps=10",
        "training.batch_size=8",
        "training.log_every=2",
        "training.validate_every=5",
        "training.checkpoint_every=5",
        "likelihood.images=12",
        "likelihood.batch_size=8",
        "sampling.solver=heun",
        "sampling.steps=3",
        *(f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in changes.items()),
    ):
        cli.override(config, text)
    checks.check(config)
    return config


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    """A run folder, trained once for the tests that only read it."""
    run = Run(tmp_path_factory.mktemp("runs") / "done")
    assert train.train(_config(), run) == 0
    return run


def _items(run):
    config = _config()
    described = model.describe(config, data.load("digits", "train"))
    like = train._state_shapes(config, described, build.optimiser(config))
    with checkpoint.open_manager(str(run / "checkpoints"), read_only=True) as manager:
        items = checkpoint.restore(manager, {"params": like.params, "ema": like.ema, "opt_state": like.opt_state})
        return manager.latest_step(), jax.device_get([items[k] for k in ("params", "ema", "opt_state")])


def test_a_run_leaves_its_records_and_is_then_complete(done, capsys):
    lines = read_jsonl(done / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10]
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10]
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert artefacts.Run(str(done.path)).config() == json.loads(_config().to_json())
    assert read_json(done / "versions.json")["packages"]["jax"] == jax.__version__
    assert (done / "loss.png").read_bytes()[:4] == b"\x89PNG" and list((done / "tensorboard").iterdir())
    assert _items(done)[0] == 10

    before = (done / "metrics.jsonl").read_bytes()
    assert train.train(_config(), done) == 0
    assert "complete, 10 steps of 10 are done" in capsys.readouterr().out
    assert (done / "metrics.jsonl").read_bytes() == before


def test_interrupted_and_resumed_is_the_same_run(done, tmp_path, monkeypatch):
    """Ctrl-C in step 6 of 10: step 6 is saved, and the rest gives the same bits, losses and data order."""
    run, seen = Run(tmp_path / "run"), []
    shard_batch = train.parallel.shard_batch

    def interrupting(batch, mesh):
        seen.extend([batch["index"]] if "mask" not in batch else [])  # without those of the validation
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return shard_batch(batch, mesh)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train.parallel, "shard_batch", interrupting)
    assert train.train(_config(), run) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert _items(run)[0] == 6
    monkeypatch.setattr(train.parallel, "shard_batch", shard_batch)
    assert train.train(_config(), run) == 0

    (step, ours), (expected_step, expected) = _items(run), _items(done)
    assert step == expected_step == 10
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    lines, others = read_jsonl(run / "metrics.jsonl"), read_jsonl(done / "metrics.jsonl")
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})  # no step twice
    for name in ("loss", "validation_loss", "grad_norm"):
        ours, expected = ({line["step"]: line.get(name) for line in some} for some in (lines, others))
        for step in (8, 10):  # the first line after the resume averages over fewer steps
            assert ours[step] == expected[step]


@pytest.mark.slow
def test_how_the_work_is_spread_changes_nothing_but_the_order_of_sums(done, tmp_path, monkeypatch):
    """Parts of a batch, several steps a call, rematerialisation, a sharded state; also resumed, and by other means."""
    run = Run(tmp_path / "run")
    spread = dict(
        training__batch_size=16, training__accumulate=2, training__remat="dots", training__steps_per_call=4,
        training__sharding__fsdp=2, training__sharding__min_size=1,
    )  # fmt: skip
    plain = Run(tmp_path / "plain")
    assert train.train(_config(training__batch_size=16), plain) == 0
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(train.Stop, "now", lambda self: next(asked))
        patch.setattr(train.Stop, "exit_code", 130)
        assert train.train(_config(**spread), run) == 130
    assert _items(run)[0] == 4  # calls end where a line or a checkpoint is due: 2, 4, 5, 6, 8, 10
    assert train.train(_config(**spread | {"training__mapping": "shard_map"}), run) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), _items(run)[1], _items(plain)[1])
    ours, expected = read_jsonl(run / "metrics.jsonl"), read_jsonl(plain / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for line, other in zip(ours, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    with pytest.raises(ValueError, match=r"batch_size = 16 does not divide over 8 devices and 4 parts"):
        train.train(_config(training__batch_size=16, training__accumulate=4), run)


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    run = Run(tmp_path / "run")
    run.open(_config())
    # A run that was killed after step 8 with its last checkpoint at 5, in the middle of a line.
    written = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 5, 6, 8))
    run.write("metrics.jsonl", written + '{"step": 9, "lo')
    metrics = artefacts.Metrics(run, 5)
    metrics.write(6, {"loss": 2.0})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_jsonl(run / "metrics.jsonl")] == [
        (2, 1.0),
        (4, 1.0),
        (5, 1.0),
        (6, 2.0),
    ]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    run, steps = Run(tmp_path / "run"), []
    shard_batch = train.parallel.shard_batch
    loss = objectives.loss

    def poisoned(*args, **options):
        loss_fn = loss(*args, **options)

        def with_poison(params, keys, batch):
            poison = batch.pop("poison", jnp.zeros(keys.shape))
            value, metrics = loss_fn(params, keys, batch)
            return value + poison, metrics

        return with_poison

    def placing(batch, mesh):
        steps.append(len(steps) + 1)
        poison = np.full(8, np.nan if len(steps) == 7 else 0, np.float32)
        return shard_batch({**batch, "poison": poison}, mesh)

    monkeypatch.setattr(train.objectives, "loss", poisoned)
    monkeypatch.setattr(train.parallel, "shard_batch", placing)
    with pytest.raises(FloatingPointError, match=r"not finite at step 7 \(loss nan\).*checkpoints is kept"):
        train.train(_config(data__validation=""), run)
    step, trees = _items(run)
    assert step == 5 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))
    assert max(line["step"] for line in read_jsonl(run / "metrics.jsonl")) == 6


def test_a_folder_of_another_configuration_is_refused(done, monkeypatch):
    monkeypatch.setattr(train, "_validation", None)  # nothing may be compiled on the way
    for path, value in (("optimiser__learning_rate", 0.5), ("training__steps", 12), ("seed", 3)):
        with pytest.raises(ValueError, match=rf"{path.replace('__', '.')}: .* there, .* here"):
            train.train(_config(**{path: value}), done)
    with pytest.raises(ValueError, match=r"process.options.beta_max: None there, 10.0 here"):
        sample.sample(_config(process__options={"beta_max": 10.0}), done)
    # How to look at it may change.
    done.match(_config(likelihood__rtol=1e-3, sampling__steps=7, training__keep=1))


def test_folders_and_data_that_are_not_there(tmp_path, done, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/run"):
        with pytest.raises(OSError, match=r"run folder .*file.* cannot be written"):
            train.train(_config(), Run(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"no run in .*nothing .*train first"):
        sample.sample(_config(), Run(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="no run in"):
        likelihood.likelihood(_config(), Run(tmp_path / "nothing"))
    opened = Run(tmp_path / "opened")
    opened.open(_config())
    with pytest.raises(FileNotFoundError, match="no checkpoints"):
        sample.sample(_config(), opened)
    with pytest.raises(FileNotFoundError, match=r"'mnist' is not prepared.*TFDS_DATA_DIR"):
        train.train(_config(data__name="mnist"), Run(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"training.batch_size = 12 does not divide over 8 devices"):
        train.train(_config(training__batch_size=12), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_dry_run_counts_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = _config(network__options={"width": 256, "depth": 1})
    assert train.dry_run(config) == 0
    described = model.describe(config, data.load("digits", "train"))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes(config, described)))
    out = capsys.readouterr().out
    assert f"{count:,} parameters" in out and "1,350 images (8, 8, 1), 17 levels" in out
    # Every device holds a copy: 4 bytes a parameter, 4 for its average, 8 for Adam's moments.
    mib = lambda line: float(re.search(rf"{line} +([\d.,]+) MiB a device", out)[1])
    assert mib("parameters") == mib("average") == pytest.approx(4 * count / 2**20, abs=0.06)
    assert mib("optimiser") == pytest.approx(8 * count / 2**20, abs=0.06)
    with pytest.raises(ValueError, match=r"step needs .* MiB a device and there are 1.0 MiB; the largest: \w+"):
        train.dry_run(config, memory=1 / 1024)
    assert not list(tmp_path.iterdir())


# Likelihood -----------------------------------------------------------------------------------------------------------


def _record(index, draw, bits, evaluations=10, failed=False):
    return {"index": index, "draw": draw, "bits_per_dim": bits, "evaluations": evaluations, "failed": failed}


def test_the_summary_by_hand():
    records = [_record(0, 0, 1.0, 10), _record(1, 0, 3.0, 20), _record(0, 1, 2.0, 30), _record(1, 1, 6.0, 40)]
    summary = errors.summarise(records)
    # Images: 1.5 and 4.5, so 3 +- sqrt(4.5 / 2) = 1.5. Draws: variances 0.5 and 4.5, sqrt(2.5 / 2 / 2).
    assert summary["bits_per_dim"] == 3.0 and summary["standard_error"] == pytest.approx(1.5)
    assert summary["noise_error"] == pytest.approx(math.sqrt(0.625))
    assert summary["evaluations_mean"] == 25 and summary["evaluations_max"] == 40 and summary["failed"] == 0

    one = errors.summarise(records[:2])
    assert one["bits_per_dim"] == 2.0 and one["standard_error"] == pytest.approx(1.0) and one["noise_error"] is None
    single = errors.summarise(records[:1])
    assert single["bits_per_dim"] == 1.0 and single["standard_error"] is None


def test_a_mean_of_which_some_failed_is_not_a_number():
    settings = {"images": 2, "draws": 1, "data": "digits", "split": "test", "rtol": 1e-5, "step": 10}
    good = errors.summarise([_record(0, 0, 1.0), _record(1, 0, 3.0)])
    text = likelihood.report({"settings": settings, "seconds": 1.0, **good})
    assert text.startswith("2.0000 +- 1.0000 (standard error) bits/dim on 2 images of digits/test")
    bad = errors.summarise([_record(0, 0, 1.0), _record(1, 0, math.nan, failed=True)])
    assert bad["bits_per_dim"] is None and bad["failed"] == 1
    text = likelihood.report({"settings": settings, "seconds": 1.0, **bad})
    assert text == "no bits/dim: 1 of 2 solves failed (digits/test)"
    none = errors.summarise([_record(0, 0, math.nan, failed=True)])
    assert none["bits_per_dim"] is None and none["standard_error"] is None


def test_likelihood_does_not_depend_on_the_batch_size(done, monkeypatch):
    config = _config(likelihood__draws=2, likelihood__rtol=1e-3, likelihood__atol=1e-3)
    first = likelihood.likelihood(config, done)
    small = likelihood.per_image(done, "test")
    assert small.shape == (12,) and np.isfinite(small).all()
    records = read_jsonl(done / "likelihood_test.jsonl")
    assert sorted((r["index"], r["draw"]) for r in records) == [(i, d) for i in range(12) for d in range(2)]
    assert first["bits_per_dim"] == pytest.approx(small.mean(), abs=1e-12)
    assert first["standard_error"] == pytest.approx(small.std(ddof=1) / math.sqrt(12))
    table = {(r["index"], r["draw"]): r["bits_per_dim"] for r in records}
    assert min(abs(table[i, 0] - table[i, 1]) for i in range(12)) > 1e-6  # each draw has noise of its own

    with monkeypatch.context() as patch:  # the same settings again: what is there
        patch.setattr(methods, "_exact_evaluator", None)
        assert likelihood.likelihood(config, done) == first
        assert likelihood.likelihood(_config(**{**_LIKELIHOOD, "likelihood__batch_size": 16}), done) == first
    (done / "likelihood_test.json").unlink()
    likelihood.likelihood(_config(**{**_LIKELIHOOD, "likelihood__batch_size": 16}), done)
    np.testing.assert_allclose(likelihood.per_image(done, "test"), small, rtol=2e-4)


_LIKELIHOOD = {"likelihood__draws": 2, "likelihood__rtol": 1e-3, "likelihood__atol": 1e-3}


# Samples --------------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_number_alone(done):
    few = sample.sample(_config(sampling__number=3, sampling__batch_size=8), done)
    many = sample.sample(_config(sampling__number=6, sampling__batch_size=4), done)
    assert few.shape == (3, 8, 8, 1) and many.shape == (6, 8, 8, 1) and many.max() <= 16
    # Float32 at another batch size may cross the border of a level now and then.
    differing = few.astype(int) - many[:3]
    assert np.abs(differing).max() <= 1 and (differing != 0).mean() < 0.02
    assert (few[0] != few[1]).mean() > 0.2
    with np.load(done / "samples_heun.npz") as saved:
        np.testing.assert_array_equal(saved["images"], many)
        assert saved["step"] == 10 and saved["levels"] == 17
    for name in ("samples_heun.png", "trajectory_heun.png"):
        assert (done / name).read_bytes()[:4] == b"\x89PNG"


def test_sampling_that_was_killed_goes_on_with_the_missing_batches(done, tmp_path, monkeypatch):
    whole = sample.sample(_config(sampling__number=20, sampling__batch_size=8), done)
    assert not list(done.path.glob("*.parts"))
    drawn, write = [], parts.Parts.write

    def writing(self, n, **arrays):
        drawn.append(n)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        write(self, n, **arrays)

    monkeypatch.setattr(parts.Parts, "write", writing)
    with pytest.raises(KeyboardInterrupt):
        sample.sample(_config(sampling__number=20, sampling__batch_size=8), done)
    np.testing.assert_array_equal(sample.sample(_config(sampling__number=20, sampling__batch_size=8), done), whole)
    assert drawn == [0, 1, 1, 2]
    # Of another seed, or of batches of another size on other devices, nothing is taken over.
    configs = [_config(sampling__number=20, sampling__batch_size=size) for size in (8, 12, 8)]
    folders = {parts.Parts(done, "a", drawing.load(config, done).depends).folder for config in configs}
    assert len(folders) == 2
    for folder in folders:
        folder.rmtree()
    other = sample.sample(_config(sampling__number=20, sampling__batch_size=8, sampling__seed=1), done)
    assert drawn == [0, 1, 1, 2, 0, 1, 2] and (other != whole).any()
    assert not list(done.path.glob("*.parts"))


@pytest.mark.slow
def test_every_solver_is_offered(done, capsys):
    """Each name draws images from the trained model, which is hardly trained: that they are images is all there is."""
    seen = {}
    for name in (*samplers.SOLVERS, *samplers.ADAPTIVE):
        config = _config(sampling__solver=name, sampling__number=2, sampling__batch_size=2)
        seen[name] = sample.sample(config, done)
        assert seen[name].shape == (2, 8, 8, 1) and seen[name].max() <= 16
        assert (done / f"trajectory_{name}.png").exists() == (name in samplers.SOLVERS)
    # The two that choose their steps say how many they took, and go where many small steps go.
    assert re.findall(r"(adaptive\w*): \d+ evaluations on average", capsys.readouterr().out) == list(samplers.ADAPTIVE)
    many = sample.sample(_config(sampling__steps=200, sampling__number=2, sampling__batch_size=2), done)
    assert np.abs(seen["adaptive"].astype(int) - many).max() <= 1
    tight = dict(sampling__number=2, sampling__batch_size=2, sampling__rtol=1e-3, sampling__atol=1e-3)
    brownian = [
        sample.sample(_config(**tight, **options, sampling__noise="brownian"), done).astype(int)
        for options in (
            dict(sampling__solver="adaptive_sde"),
            dict(sampling__solver="euler_maruyama", sampling__steps=1000),
        )
    ]
    assert np.abs(brownian[0] - brownian[1]).mean() < 0.5 < np.abs(brownian[1] - seen["euler_maruyama"]).mean()


@pytest.mark.parametrize("name", ["adaptive", "adaptive_sde"])
def test_adaptive_solvers_of_a_noise_prediction(name, monkeypatch):
    """On Rectified, where such a field says nothing at t_max: the end is found before anything is traced."""
    config = _config(sampling__solver=name, network__predict="eps", process__name="Rectified")
    monkeypatch.setattr(samplers, "guided", lambda *args: lambda x, t: 0.5 * x)
    draw = drawing._adaptive(config, model.Model(None, None, (2, 2, 1), None))
    x, path, times = draw(None, None, jax.random.split(jax.random.key(0), 3), None)
    assert x.shape == (3, 2, 2, 1) and path is times is None


def test_the_first_step_that_is_not_finite_is_named(done, monkeypatch):
    config = _config(sampling__steps=6, sampling__number=2, sampling__grid="linear")
    ts, guided = np.asarray(samplers.grid(config)), samplers.guided

    def poisoned(*args):
        field = guided(*args)
        return lambda x, t: jnp.where(t[:, None, None, None] < ts[2] - 1e-4, jnp.nan, field(x, t))

    monkeypatch.setattr(samplers, "guided", poisoned)
    with pytest.raises(FloatingPointError, match=rf"heun .* first in step 3 of 6 \(t = {ts[2]:g} to {ts[3]:g}\)"):
        sample.sample(config, done)
    for name in samplers.ADAPTIVE:
        config.sampling.solver = name
        with pytest.raises(FloatingPointError, match=f"{name} did not arrive for"):
            sample.sample(config, done)
    last = lambda *args: (lambda field: lambda x, t: jnp.where(t[:, None, None, None] <= ts[-1], jnp.nan, field(x, t)))(
        guided(*args)
    )
    monkeypatch.setattr(samplers, "guided", last)
    config.sampling.solver = "ddim"
    with pytest.raises(FloatingPointError, match="last denoising after ddim"):
        sample.sample(config, done)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpmpp_2m", "ancestral"])
def test_a_searched_grid(name, done, tmp_path, capsys):
    run = Run(shutil.copytree(done.path, tmp_path / "run"))
    config = _config(sampling__solver=name, sampling__steps=4)
    found = search_grid.search_grid(config, run, samples=8)
    assert found == read_json(run / f"grid_{name}_4.json") and found["step"] == 10
    ts = np.array(found["ts"])
    usual = np.asarray(samplers.grid(config, "linear"))
    assert len(ts) == 5 and np.all(np.diff(ts) < 0)
    np.testing.assert_allclose(ts[[0, -1]], usual[[0, -1]], rtol=1e-6)
    errors = found["errors"]
    # On other samples than were searched with: at least near the best.
    assert errors["searched"] <= 1.1 * min(value for value in errors.values() if value is not None)

    config = _config(sampling__solver=name, sampling__steps=4, sampling__grid="searched", sampling__number=2)
    assert sample.sample(config, run).shape == (2, 8, 8, 1)
    config.sampling.steps = 5
    with pytest.raises(ValueError, match=rf"grid_{name}_5\.json; run experiments\.search_grid first"):
        sample.sample(config, run)
    config.sampling.steps = 4
    for change in ({"step": 5}, {"sampling": found["sampling"] | {"t_min": 0.1}}):
        run.write_json(f"grid_{name}_4.json", found | change)
        with pytest.raises(ValueError, match="another step of the training or for other sampling fields: search again"):
            sample.sample(config, run)
    for damaged in ([1.0], found | {"ts": [1.0, 0.5]}, found | {"ts": ["a"] * 5}):
        run.write_json(f"grid_{name}_4.json", damaged)
        with pytest.raises(ValueError, match=f"grid_{name}_4.json must hold 5 times"):
            sample.sample(config, run)
    for changes, message in (
        ({"sampling__solver": "adaptive"}, "chooses its steps itself"),
        ({"sampling__label": "3"}, "unconditional samples"),
        ({"sampling__steps": 128}, "sampling.steps below 128"),
    ):
        with pytest.raises(ValueError, match=message):
            search_grid.search_grid(_config(**changes), run)


def test_the_learning_curve_evaluates_every_checkpoint(done, tmp_path):
    run = Run(shutil.copytree(done.path, tmp_path / "run"))
    rows = learning_curve.learning_curve(_config(), run, split="test[:8]")
    assert read_json(run / "learning_curve.json") == {"split": "test[:8]", "points": rows}
    assert (run / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["step"] for row in rows] == [5, 10]
    for row in rows:
        alone = likelihood.likelihood(_config(), run, split="test[:8]", step=row["step"])
        assert row["bits_per_dim"] == alone["bits_per_dim"]
    assert rows[0]["bits_per_dim"] != rows[1]["bits_per_dim"]
    lines = read_jsonl(run / "metrics.jsonl")
    steps = np.diff([0] + [line["step"] for line in lines])
    seconds = np.cumsum(steps * 8 / np.array([line["images_per_second"] for line in lines]))
    at = [[line["step"] for line in lines].index(step) for step in (5, 10)]
    np.testing.assert_allclose([row["seconds"] for row in rows], seconds[at])


def test_compiler_options_that_xla_does_not_know_are_left_out(monkeypatch):
    options = compilation.compiler_options("ddpmpp")
    assert options == compilation.LEAN | compilation.FAST
    assert compilation.compiler_options("mlp") == compilation.LEAN
    # The same numbers, up to the order of summation.
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 8))
    w = jax.random.normal(jax.random.key(1), (3, 3, 8, 8))
    f = lambda x, w: jnp.sum(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=_NHWC) ** 2)
    for ours, plain in zip(jax.jit(jax.grad(f, (0, 1)), compiler_options=options)(x, w), jax.grad(f, (0, 1))(x, w)):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-4 * float(jnp.abs(plain).max()))
    monkeypatch.setattr(compilation, "FAST", {"xla_cpu_no_such_option": "true"})
    assert compilation.compiler_options("ddpmpp") == compilation.LEAN


def test_labels_by_name(done):
    with pytest.raises(ValueError, match=r"sampling.label = '3'.*no labels.*unconditional"):
        sample.sample(_config(sampling__label="3"), done)
    config, described = _config(network__conditional=True), model.Model(None, None, (8, 8, 1), 10)
    index = jnp.arange(8, 13)
    for label, expected in (("cycle", [8, 9, 0, 1, 2]), ("3", [3] * 5), ("9", [9] * 5)):
        config.sampling.label = label
        np.testing.assert_array_equal(drawing.labels_of(config, described)(index), expected)
    config.sampling.label = "null"
    assert drawing.labels_of(config, described) is None
    for label in ("10", "-1", "three", "3.0", ""):
        config.sampling.label = label
        with pytest.raises(ValueError, match=f"sampling.label = {label!r} is unknown"):
            drawing.labels_of(config, described)


# Statistics and yardsticks --------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_images_that_are_trained_on():
    source = data.load("digits", "train")
    images = jnp.asarray(source.arrays()["image"])
    for precondition, axes in (("scalar", (0, 1, 2, 3)), ("pixel", 0)):
        config = _config(network__precondition=precondition)
        transform = build.transform(config, source.levels)
        ours = model.statistics(config, source, transform)
        keys = jax.random.split(jax.random.key(0), len(source))
        x = np.asarray(objectives.model_space(config, transform, keys, images), np.float64)
        np.testing.assert_allclose(ours["mean"], np.broadcast_to(x.mean(axis=axes), (8, 8, 1)), atol=5e-3)
        np.testing.assert_allclose(ours["std"], np.broadcast_to(x.std(axis=axes), (8, 8, 1)), atol=5e-3)
    config = _config(network__precondition="levels")
    prior = model.statistics(config, source, transform)["log_prior"]
    pixel = source.arrays()["image"][:, 3, 4, 0]
    expected = [math.log(((pixel == level).sum() + 0.1) / (1350 + 1.7)) for level in range(17)]
    np.testing.assert_allclose(prior[3, 4, 0], expected, rtol=1e-6)
    like = model.statistics_shapes(config, model.describe(config, source))
    assert like["log_prior"].shape == prior.shape


def test_yardsticks_by_other_means(monkeypatch):
    rng = np.random.RandomState(0)
    fit, score = (rng.binomial(4, rng.uniform(0.2, 0.8, (1, 2, 2, 1)), (n, 2, 2, 1)).astype(np.uint8) for n in (60, 7))
    splits = {"train": fit, "test": score}
    monkeypatch.setattr(yardsticks.data, "load", lambda name, split: data.from_arrays(splits[split], levels=5))
    bits = yardsticks.evaluate("any", "test")
    np.testing.assert_array_equal(bits["uniform"], np.full(7, math.log2(5)))
    expected = []
    for image in score:
        total = 0.0
        for row in range(2):
            for column in range(2):
                count = sum(int(other[row, column, 0] == image[row, column, 0]) for other in fit)
                total -= math.log2((count + 0.1) / (60 + 0.5))
        expected.append(total / 4)
    np.testing.assert_allclose(bits["histogram"], expected, rtol=1e-12)

    noise = np.random.RandomState(0)
    x, y = (a.reshape(len(a), 4) + noise.uniform(size=(len(a), 4)) for a in (fit, score))
    diagonal = -stats.norm(x.mean(axis=0), x.std(axis=0)).logpdf(y).mean(axis=1) / math.log(2)
    np.testing.assert_allclose(bits["gaussian_diagonal"], diagonal, rtol=1e-10)
    covariance = np.cov(x.T) + 1e-3 * np.eye(4)
    full = -stats.multivariate_normal(x.mean(axis=0), covariance).logpdf(y) / (4 * math.log(2))
    np.testing.assert_allclose(bits["gaussian_full"], full, rtol=1e-10)
    assert bits["mixture_10"].shape == (7,) and np.isfinite(bits["mixture_10"]).all()


def test_the_comparison_is_paired():
    table = demo.compare(np.asarray([1.0, 2.0, 3.0]), {"other": np.asarray([2.0, 4.0, 3.0, 99.0])})
    row = table["other"]
    assert row["bits_per_dim"] == 3.0 and row["gain"] == 1.0
    assert row["gain_error"] == pytest.approx(1 / math.sqrt(3))


# The whole ------------------------------------------------------------------------------------------------------------


def test_the_demo_from_training_to_the_report(done, tmp_path, capsys):
    done = Run(shutil.copytree(done.path, tmp_path / "run"))  # whose configuration the demo sets
    """All of it on the trained run: nothing is trained again, and the report stands alone."""
    config = _config(sampling__number=4, sampling__batch_size=4, likelihood__images=8)
    assert demo.demo(config, done, name="smoke") == 0
    page = (done / "report.html").read_text()
    summary = read_json(done / "likelihood_test.json")
    assert summary["settings"]["images"] == 8 and f"{summary['bits_per_dim']:.4f}" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|https?://|@import|url\(|<script""", page)
    pictures = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(pictures) == 6 and all(picture[:4] == b"\x89PNG" for picture in pictures)
    for name in ("loss", "likelihood_test", "samples_heun", "trajectory_predictor_corrector"):
        assert (done / f"{name}.png").read_bytes() in pictures
    out = capsys.readouterr().out
    assert "histogram" in out and "report.html" in out
    table = read_json(done / "yardsticks.json")
    assert table["uniform"]["bits_per_dim"] == pytest.approx(math.log2(17))
    assert table["uniform"]["gain"] == pytest.approx(math.log2(17) - summary["bits_per_dim"])

    # What a name or a split may hold is text, not markup.
    config.data.name = "<b>digits</b>"
    report.write(done, config, summary, table, [])
    assert "<b>" not in (done / "report.html").read_text()
