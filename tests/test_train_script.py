"""The training script, in this process: train, stop, resume, and each way in which it goes wrong."""

import dataclasses
import json
import math
import os
import re
import signal
import types
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from experiments_cases import small_config

from experiments import artefacts, build, compilation, likelihood, model, objectives, sample, train
from experiments.artefacts import Run, read_json, read_jsonl
from jdiff import checkpoint, data

pytestmark = pytest.mark.usefixtures("digits")

_NHWC = ("NHWC", "HWIO", "NHWC")


def _items(run):
    config = small_config()
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
    assert artefacts.Run(str(done.path)).config() == json.loads(small_config().to_json())
    assert read_json(done / "versions.json")["packages"]["jax"] == jax.__version__
    assert (done / "loss.png").read_bytes()[:4] == b"\x89PNG" and list((done / "tensorboard").iterdir())
    assert _items(done)[0] == 10

    written = lambda: [os.stat(done / name).st_mtime_ns for name in ("metrics.jsonl", "versions.json")]
    before = written()
    assert train.train(small_config(), done) == 0
    assert "complete, 10 steps of 10 are done" in capsys.readouterr().out
    assert written() == before


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
    assert train.train(small_config(), run) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert _items(run)[0] == 6
    monkeypatch.setattr(train.parallel, "shard_batch", shard_batch)
    assert train.train(small_config(), run) == 0

    (step, ours), (expected_step, expected) = _items(run), _items(done)
    assert step == expected_step == 10
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    lines, others = read_jsonl(run / "metrics.jsonl"), read_jsonl(done / "metrics.jsonl")
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})  # no step twice
    for name in ("loss", "validation_loss", "grad_norm"):
        ours, expected = ({line["step"]: line.get(name) for line in some} for some in (lines, others))
        for step in (8, 10):  # the first line after the resume averages over fewer steps
            assert ours[step] == expected[step]


def test_images_per_second_leave_saves_out(tmp_path, monkeypatch):
    """Each look at the clock takes a second here, and each save a thousand."""
    run, now, save = Run(tmp_path / "run"), [0], checkpoint.save

    def passed(seconds):
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: passed(1)))
    monkeypatch.setattr(checkpoint, "save", lambda *args, **options: (passed(1000), save(*args, **options)))
    assert train.train(small_config(data__validation=""), run) == 0
    rates = {line["step"]: line["images_per_second"] for line in read_jsonl(run / "metrics.jsonl")}
    assert rates == {2: 16, 4: 16, 5: 8, 6: 8, 8: 16, 10: 16} and now[0] > 2000


@pytest.mark.parametrize(("split", "batch"), [("validation", 64), ("validation[:100]", 128), ("validation", 16)])
def test_validation_covers_time_once(split, batch, monkeypatch):
    """Strata of 150 images, of 100 and of the 128 in eight batches: a wave in t averages to nothing over them."""
    wave = lambda keys, field, process, x0, t, **_: jnp.cos(32 * jnp.pi * (t - process.t_min) / (1 - process.t_min))
    monkeypatch.setattr(objectives.losses, "denoising", wave)
    times = {"loss__times__name": "stratified", "loss__weight__name": "unit"}
    config, source = small_config(training__batch_size=batch, **times), data.load("digits", split)
    described, mesh = model.describe(config, source), train.parallel.data_mesh()
    statistics = {name: np.ones((8, 8, 1), np.float32) for name in ("mean", "std")}
    validate = train._validation(config, described, statistics, source, jax.random.key(0), mesh)
    assert validate({})["loss"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_how_the_work_is_spread_changes_nothing_but_the_order_of_sums(done, tmp_path, monkeypatch):
    """Parts of a batch, several steps a call, rematerialisation, a sharded state; also resumed, and by other means."""
    run = Run(tmp_path / "run")
    spread = dict(
        training__batch_size=16, training__accumulate=2, training__remat="dots", training__steps_per_call=4,
        training__sharding__fsdp=2, training__sharding__min_size=1,
    )  # fmt: skip
    plain = Run(tmp_path / "plain")
    assert train.train(small_config(training__batch_size=16), plain) == 0
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(train.Stop, "now", lambda self: next(asked))
        patch.setattr(train.Stop, "exit_code", 130)
        assert train.train(small_config(**spread), run) == 130
    assert _items(run)[0] == 4  # calls end where a line or a checkpoint is due: 2, 4, 5, 6, 8, 10
    assert train.train(small_config(**spread | {"training__mapping": "shard_map"}), run) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), _items(run)[1], _items(plain)[1])
    ours, expected = read_jsonl(run / "metrics.jsonl"), read_jsonl(plain / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for line, other in zip(ours, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    with pytest.raises(ValueError, match=r"batch_size = 16 does not divide over 8 devices and 4 parts"):
        train.train(small_config(training__batch_size=16, training__accumulate=4), run)


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    run = Run(tmp_path / "run")
    run.open(small_config())
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
        train.train(small_config(data__validation=""), run)
    step, trees = _items(run)
    assert step == 5 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))
    assert max(line["step"] for line in read_jsonl(run / "metrics.jsonl")) == 6


def test_a_folder_of_another_configuration_is_refused(done, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_validation", None)  # nothing may be compiled on the way
    for path, value in (("optimiser__learning_rate", 0.5), ("training__steps", 12), ("seed", 3)):
        with pytest.raises(ValueError, match=rf"{path.replace('__', '.')}: .* there, .* here"):
            train.train(small_config(**{path: value}), done)
    with pytest.raises(ValueError, match=r"process.options.beta_max: None there, 10.0 here"):
        sample.sample(small_config(process__options={"beta_max": 10.0}), done)
    # How to look at it may change.
    done.match(small_config(likelihood__rtol=1e-3, sampling__steps=7, training__keep=1, training__accumulate=2))
    # But groups that exchange their noise are made inside of a part.
    coupled = Run(tmp_path / "coupled")
    coupled.open(small_config(loss__coupling="optimal_transport"))
    with pytest.raises(ValueError, match=r"training.accumulate: 1 there, 2 here"):
        coupled.match(small_config(loss__coupling="optimal_transport", training__accumulate=2))


def test_folders_and_data_that_are_not_there(tmp_path, done, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/run"):
        with pytest.raises(OSError, match=r"run folder .*file.* cannot be written"):
            train.train(small_config(), Run(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"no run in .*nothing .*train first"):
        sample.sample(small_config(), Run(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="no run in"):
        likelihood.likelihood(small_config(), Run(tmp_path / "nothing"))
    opened = Run(tmp_path / "opened")
    opened.open(small_config())
    with pytest.raises(FileNotFoundError, match="no checkpoints"):
        sample.sample(small_config(), opened)
    with pytest.raises(FileNotFoundError, match=r"'mnist' is not prepared.*TFDS_DATA_DIR"):
        train.train(small_config(data__name="mnist"), Run(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"training.batch_size = 12 does not divide over 8 devices"):
        train.train(small_config(training__batch_size=12), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_dry_run_counts_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config(network__options={"width": 256, "depth": 1})
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


def test_memory_without_a_dry_run_is_refused(monkeypatch):
    scripts, before = [], set(flags.FLAGS)
    monkeypatch.setattr(train.cli, "main", scripts.append)
    train.main()
    try:
        flags.FLAGS(["train", "--memory_gib=4"])
        with pytest.raises(ValueError, match="--memory_gib: of --dry-run only"):
            scripts[0](None, None)
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


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


def test_statistics_are_those_of_the_images_that_are_trained_on(monkeypatch):
    source, counts = data.load("digits", "train"), []
    images = jnp.asarray(source.arrays()["image"])
    monkeypatch.setattr(model, "_AT_ONCE", 100 * 64)  # 14 reads of 100 images at most
    read = source.read
    source = dataclasses.replace(source, read=lambda positions: (counts.append(len(positions)), read(positions))[1])
    for precondition, axes in (("scalar", (0, 1, 2, 3)), ("pixel", 0)):
        config = small_config(network__precondition=precondition)
        transform = build.transform(config, source.levels)
        ours = model.statistics(config, source, transform)
        keys = jax.random.split(jax.random.key(0), len(source))
        x = np.asarray(objectives.model_space(config, transform, keys, images), np.float64)
        np.testing.assert_allclose(ours["mean"], np.broadcast_to(x.mean(axis=axes), (8, 8, 1)), atol=5e-3)
        np.testing.assert_allclose(ours["std"], np.broadcast_to(x.std(axis=axes), (8, 8, 1)), atol=5e-3)
        spread = 2 / 17 * np.sqrt(np.asarray(images, np.float64).var(axis=axes) + 1 / 12)  # of levels and of u
        np.testing.assert_allclose(ours["std"], np.broadcast_to(spread, (8, 8, 1)), rtol=1e-6)
    config = small_config(network__precondition="levels")
    prior = model.statistics(config, source, transform)["log_prior"]
    pixel = np.asarray(images)[:, 3, 4, 0]
    expected = [math.log(((pixel == level).sum() + 0.1) / (1350 + 1.7)) for level in range(17)]
    np.testing.assert_allclose(prior[3, 4, 0], expected, rtol=1e-6)
    like = model.statistics_shapes(config, model.describe(config, source))
    assert like["log_prior"].shape == prior.shape
    config = small_config(network__precondition="levels", network__cells=5)
    merged = model.statistics(config, source, transform)
    edges = np.round((merged["edges"] + 1) * 17 / 2).astype(int)
    assert len(edges) == 6 and edges[0] == 0 and edges[-1] == 17
    expected = [math.log((((low <= pixel) & (pixel < high)).sum() + 0.1) / 1350.5) for low, high in pairwise(edges)]
    np.testing.assert_allclose(merged["log_prior"][3, 4, 0], expected, rtol=1e-6)
    assert counts == 4 * [*13 * [100], 50]
    # What nothing looks at is not read: published sets of 256x256x3 images need no memory for it.
    unused = model.statistics(small_config(network__precondition="none"), source, transform)
    assert len(counts) == 4 * 14 and (unused["mean"] == 0).all() and (unused["std"] == 1).all()
    assert {name: (a.shape, a.dtype) for name, a in unused.items()} == dict.fromkeys(
        ("mean", "std"), ((8, 8, 1), np.float32)
    )
