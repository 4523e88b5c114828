"""The likelihood script: kills, shards and batch sizes change no number, and each number comes with its ingredients."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import jdiff
from configs import smoke
from experiments import build, checks, cli, errors, evaluation, likelihood, methods, model, song2021
from experiments.artefacts import Run, read_json, read_jsonl
from jdiff import bounds, checkpoint, data, dequantisation

SETTINGS = {"likelihood__draws": 2, "likelihood__probes": 2, "likelihood__rtol": 1e-2, "likelihood__atol": 1e-2}


def _config(**changes):
    """A residual MLP of width 8 on the digits."""
    config = smoke.get_config()
    for text in (
        "network.name=mlp",
        'network.options={"width": 8, "depth": 1}',
        "likelihood.images=12",
        "likelihood.batch_size=8",
        "likelihood.tolerance_images=4",
        *(f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in changes.items()),
    ):
        cli.override(config, text)
    checks.check(config)
    return config


@pytest.fixture
def folder(tmp_path, digits):
    """Return make(name, seed): a run folder with a checkpoint of an untrained network."""

    def make(name, seed=0):
        run, config = Run(tmp_path / name), _config()
        run.open(config)
        source = data.load("digits", "train")
        described = model.describe(config, source)
        params = model.initialise(config, described, jax.random.key(seed))
        statistics = model.statistics(config, source, described.transform)
        with checkpoint.open_manager(str(run / "checkpoints")) as manager:
            checkpoint.save(manager, 7, {"ema": params, "statistics": statistics}, force=True)
        return run

    return make


def _bits(run):
    return errors.table(read_jsonl(run / "likelihood_test.jsonl"), "bits_per_dim")


def _pairs(batch):
    return list(zip(batch["index"].tolist(), batch["draw"].tolist(), strict=True))


def test_killed_sharded_and_in_other_batches_it_is_the_same_evaluation(folder, monkeypatch):
    whole, traces = folder("whole"), []
    log_likelihood = methods.log_likelihood
    counted = lambda *args, **options: traces.append(1) or log_likelihood(*args, **options)
    monkeypatch.setattr(methods, "log_likelihood", counted)
    summary = likelihood.likelihood(_config(**SETTINGS), whole)
    assert len(traces) == 1  # all batches, both tolerances
    assert summary == read_json(whole / "likelihood_test.json")
    expected = _bits(whole)
    assert expected.shape == (12, 2) and summary["bits_per_dim"] == pytest.approx(expected.mean(), abs=1e-12)
    assert [len(part["sources"]) for part in summary["parts"]] == [1, 1, 1]
    assert summary["settings"]["version"] == "1.0.0" and summary["settings"]["step"] == 7
    assert summary["tolerance"]["images"] == 4 and 0 < summary["tolerance"]["mean"] < 0.1

    # Killed in the second batch, in the middle of a line; resumed with other batches.
    killed = folder("killed")
    shard_batch, placed = evaluation.parallel.shard_batch, []

    def killing(batch, mesh):
        placed.append(_pairs(batch))
        if len(placed) == 2:
            raise KeyboardInterrupt
        return shard_batch(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.parallel, "shard_batch", killing)
        with pytest.raises(KeyboardInterrupt):
            likelihood.likelihood(_config(**SETTINGS), killed)
        (file,) = killed.path.glob("likelihood_test-*.jsonl")
        file.write_text(file.read_text() + '{"index": 8, "dr')
        assert not (killed / "likelihood_test.json").exists()
        resumed = likelihood.likelihood(_config(**SETTINGS, likelihood__batch_size=16), killed)
    assert set(placed[2]) == {(i, d) for d in range(2) for i in range(12)} - set(placed[0])  # the missing ones only
    np.testing.assert_allclose(_bits(killed), expected, rtol=2e-4)
    assert resumed["settings"] == summary["settings"]

    # Three shards, of which the last to finish merges.
    split = folder("split")
    config = _config(**SETTINGS, likelihood__batch_size=4)
    with pytest.raises(ValueError, match=r"nothing to merge yet: 28 records of test are missing"):
        likelihood.likelihood(config, split, merge=True)
    for k in (2, 0):
        assert likelihood.likelihood(config, split, shard=(k, 3)) is None
    with monkeypatch.context() as patch:
        last = likelihood.likelihood(config, split, shard=(1, 3))
        patch.setattr(methods, "_exact_evaluator", None)
        assert likelihood.likelihood(config, split, merge=True) == last == likelihood.likelihood(config, split)
    assert len(list(split.path.glob("likelihood_test-*.1-of-3.jsonl"))) == 2  # two tolerances
    np.testing.assert_allclose(_bits(split), expected, rtol=2e-4)
    for name in ("bits_per_dim", "standard_error", "noise_error"):
        assert last[name] == pytest.approx(summary[name], rel=2e-3)
    with pytest.raises(ValueError, match=r"shard is k/n with 0 <= k < n, got 3/3"):
        likelihood.likelihood(config, split, shard=(3, 3))
    with pytest.raises(ValueError, match="--error needs one process"):
        likelihood.likelihood(config, split, shard=(1, 3), error=1e-3)

    # Fewer images and draws are taken from what is there; more go on from it.
    count = len(traces)
    likelihood.likelihood(_config(**SETTINGS | {"likelihood__draws": 1}, likelihood__images=8), whole)
    assert likelihood.per_image(whole, "test") == pytest.approx(expected[:8, 0]) and len(traces) <= count + 1
    placed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.parallel, "shard_batch", lambda *a: placed.append(_pairs(a[0])) or shard_batch(*a))
        likelihood.likelihood(_config(**SETTINGS | {"likelihood__draws": 3}, likelihood__images=16), whole)
    missing = {(i, d) for d in range(3) for i in range(16)} - {(i, d) for d in range(2) for i in range(12)}
    assert [pair for batch in placed[:3] for pair in batch] == sorted(missing, key=lambda pair: pair[::-1])
    np.testing.assert_array_equal(_bits(whole)[:12, :2], expected)
    assert _bits(whole).shape == (16, 3) and np.isfinite(_bits(whole)).all()


def test_the_tolerance_is_chosen_and_said_and_two_models_are_compared(folder, capsys):
    ours, other = folder("ours"), folder("other", seed=1)
    config = _config(likelihood__probes=2)
    summary = likelihood.likelihood(config, ours, error=1e-3)
    tried = summary["tolerances_tried"]
    assert summary["settings"]["rtol"] == tried[-1]["tolerance"] == summary["settings"]["atol"]
    assert tried[-1]["mean"] <= 1e-3 < min([t["mean"] for t in tried[:-1]], default=math.inf)
    assert summary["tolerance"]["mean"] == tried[-1]["mean"]  # of the same images
    likelihood._show(ours, config, "test", summary)
    out = capsys.readouterr().out
    for said in (
        f"{summary['bits_per_dim']:.4f} +- {summary['standard_error']:.4f}",
        "12 images of digits/test, 1 draw;",
        "test-set sampling and dequantisation together 0.",
        "; probes 0.",
        f"noise of one probe: {summary['probe_noise']:.4f} bits/dim an image",
        f"bias {summary['tolerance']['bias']:+.1e} +- ",
        "on 4 images",
        "chosen for an error of 0.001: 0.01 gave",
        "data digits 1.0.0, split test; dequantisation uniform; rademacher divergence, 2 probes; VP to t_min = 1e-05",
        "protocol jdiff; matmul precision highest; 8 cpu;",
        "step 7, parameters ",
    ):
        assert said in out, said
    for name in ("likelihood_test.png", "likelihood_test_extremes.png"):
        assert (ours / name).read_bytes()[:4] == b"\x89PNG"

    with pytest.raises(FileNotFoundError, match=r"other has no likelihood_test.json: evaluate it first"):
        likelihood.against(ours, other, "test")
    tolerance = summary["settings"]["rtol"]
    config = _config(likelihood__probes=2, likelihood__rtol=tolerance, likelihood__atol=tolerance)
    there = likelihood.likelihood(config, other)
    assert there["settings"]["parameters"] != summary["settings"]["parameters"]
    result = likelihood.against(ours, other, "test")
    assert result["common_noise"] and result["images"] == 12
    assert result["difference"] == pytest.approx(summary["bits_per_dim"] - there["bits_per_dim"], abs=1e-9)
    there["settings"]["version"] = "2.0.0"
    other.write_json("likelihood_test.json", there)
    with pytest.raises(ValueError, match=r"other data: version is '1.0.0' here, '2.0.0'"):
        likelihood.against(ours, other, "test")


def test_the_exact_divergence_has_no_probe_noise_and_a_limit(folder, monkeypatch):
    run = folder("exact")
    config = _config(likelihood__divergence="exact", likelihood__images=8, likelihood__tolerance_images=0)
    summary = likelihood.likelihood(config, run)
    assert summary["parts"][-1] == {"sources": [errors.PROBES], "error": 0.0} and summary["probe_noise"] == 0
    assert summary["tolerance"] is None and "not estimated" in likelihood.details(summary)
    monkeypatch.setattr(evaluation, "_EXACT_LIMIT", 63)
    with pytest.raises(ValueError, match=r"for D <= 63; images of digits have D = 64: use rademacher"):
        likelihood.likelihood(config, run)


def test_dequantisations_and_bounds_are_the_librarys_with_the_keys_that_are_promised(folder, capsys):
    run, source = folder("bounds"), data.load("digits", "test")
    config = _config(
        likelihood__dequantisation="truncated_normal",
        likelihood__draws=2,
        likelihood__importance_samples=2,
        likelihood__divergence="exact",
        likelihood__rtol=1e-3,
        likelihood__atol=1e-3,
        likelihood__images=8,
        likelihood__tolerance_images=0,
        likelihood__bounds="continuous, levels,steps_3",
        likelihood__bound_draws=4,
    )
    summary = likelihood.likelihood(config, run, bound=True)
    rows = {row["name"]: row for row in summary["bounds"]}
    assert list(rows) == ["ODE", "ODE, importance-weighted", "continuous", "levels", "steps_3"]
    assert rows["ODE"]["gap"] == 0 and rows["ODE, importance-weighted"]["gap"] < 0
    assert rows["ODE, importance-weighted"]["bits_per_dim"] == summary["bits_per_dim"]
    for row in list(rows.values())[2:]:
        assert row["gap"] == pytest.approx(row["bits_per_dim"] - rows["ODE"]["bits_per_dim"])
        assert row["standard_error"] > 0 and row["gap_error"] > 0
    assert [row["evaluations"] for row in rows.values()][2:] == [6, 4, 3]
    text = likelihood.details(summary)
    assert "truncated_normal, weighted over 2; exact divergence" in text and "\n  steps_3 " in text

    # Draw 1 of image 5, by hand.
    trained = model.load(config, run, source)
    process, transform = build.process(config), trained.model.transform
    image = source.read(np.asarray([5]))["image"]
    field = build.field(config, trained.model.module, trained.params, trained.statistics)
    fold = lambda *numbers: functools.reduce(jax.random.fold_in, numbers, jax.random.key(config.seed))[None]
    t_min = float(dequantisation.start_time(process, transform))
    assert summary["settings"]["t_min"] == t_min
    draw = dequantisation.truncated_normal(fold(1, 5, 0), transform, image, process, t_min)
    options = {"predict": config.network.predict, "t_min": t_min}
    result = jdiff.log_likelihood(
        None, process, field, draw.x, divergence="exact", rtol=1e-3, atol=1e-3, variable="t", **options
    )
    ode, continuous = (
        dequantisation.level_bits(value - draw.log_q, (8, 8, 1))
        for value in (
            result.log_prob,
            bounds.density_bound(fold(1, 5, 2), process, field, draw.x, draws=4, **options).value,
        )
    )
    files = [read_jsonl(file) for file in run.path.glob("likelihood_test-*.jsonl")]
    found = {
        lines[0]["settings"].get("bound", "ODE"): {(r["index"], r["draw"]): r["bits_per_dim"] for r in lines[1:]}
        for lines in files
    }
    assert found["ODE"][5, 1] == pytest.approx(float(ode[0]), rel=1e-3)
    assert found["continuous"][5, 1] == pytest.approx(float(continuous[0]), rel=1e-3)
    assert (len(found["ODE"]), len(found["continuous"])) == (32, 16)
    for name in ("", "elbo", "steps_", "steps_0", "steps_x"):
        with pytest.raises(ValueError, match=f"likelihood.bounds has '{name}'; it may have continuous, levels"):
            likelihood.likelihood(_more(config, bounds=name), run, bound=True)


def test_the_protocol_of_2021_goes_through_whole_batches(folder, monkeypatch):
    """Each pass in another order, remainders dropped, batches solved together; a resumed one computes whole batches."""
    run, calls = folder("old"), []

    def bits_per_dim(key, process, score, images, *weights, transform, probe, rtol, atol):
        calls.append((images, rtol, atol, jax.random.key_data(key).tolist()))
        assert probe == "rademacher" and transform.levels == 17 and isinstance(rtol, float)
        assert jax.config.jax_default_matmul_precision == "default"
        x = jax.numpy.zeros((2, 8, 8, 1))
        assert score(x, jax.numpy.full((2,), 0.5), *weights).shape == x.shape
        return {"bits_per_dim": images.mean(axis=(1, 2, 3)) + rtol, "evaluations": 100 + len(calls)}

    monkeypatch.setattr(song2021, "bits_per_dim", bits_per_dim)
    config = _config(protocol="song2021", likelihood__draws=3, likelihood__batch_size=5)
    summary = likelihood.likelihood(config, run)
    images = data.load("digits", "test").read(np.arange(12))["image"].mean(axis=(1, 2, 3))
    records = read_jsonl(run / "likelihood_test.jsonl")
    assert (
        len(records) == 3 * 10 and len(calls) == 3 * 2 + 1
    )  # 12 images make two batches of 5; one batch solved tighter
    assert [call[1:3] for call in calls] == [(0.01, 0.01)] * 6 + [(0.001, 0.001)]
    assert len({str(call[3]) for call in calls}) == 6 and calls[0][3] == calls[6][3]  # the tighter has the same noise
    for draw in range(3):
        assert len({r["index"] for r in records if r["draw"] == draw}) == 10
    assert len({tuple(r["index"] for r in records if r["draw"] == draw) for draw in range(3)}) > 1
    for r in records:
        assert r["bits_per_dim"] == pytest.approx(images[r["index"]] + 0.01)
    assert summary["bits_per_dim"] == pytest.approx(np.mean([r["bits_per_dim"] for r in records]))
    assert summary["settings"]["protocol"] == "song2021" and summary["settings"]["matmul_precision"] == "default"
    assert summary["tolerance"]["images"] == 5 and summary["tolerance"]["bias"] == pytest.approx(0.009)
    assert "protocol song2021; matmul precision default; 1 cpu" in likelihood.details(summary)

    file = next(f for f in run.path.glob("likelihood_test-*") if len(f.read_text().splitlines()) == 31)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:23]) + "\n")  # two records into the fifth batch
    assert likelihood.likelihood(config, run)["bits_per_dim"] == summary["bits_per_dim"]
    assert len(calls) == 7 + 2
    for name, value in (("probes", 2), ("variable", "log_snr"), ("dequantisation", "truncated_normal"), ("t_min", 0.1)):
        with pytest.raises(ValueError, match=f"protocol song2021 has likelihood.{name} = "):
            likelihood.likelihood(_more(config, **{name: value}), run)
    with pytest.raises(ValueError, match="--bounds are of protocol jdiff"):
        likelihood.likelihood(config, run, bound=True)


def _more(config, **changes):
    config = config.copy_and_resolve_references()
    config.likelihood.update(changes)
    return config


def test_no_number_without_its_ingredients(folder, monkeypatch):
    run, load = folder("unknown"), data.load
    unknown = lambda *names: dataclasses.replace(load(*names), version=None)
    monkeypatch.setattr(evaluation.data, "load", unknown)
    with pytest.raises(ValueError, match="digits/test is of unknown version"):
        likelihood.likelihood(_config(), run)


def test_a_folder_of_an_earlier_version_is_still_read(folder):
    """Fields that came later have their defaults; those of another model are still told apart."""
    run = folder("old")
    values = read_json(run / "config.json")
    del values["likelihood"]["matmul_precision"], values["training"]["ema_warmup"]
    run.write_json("config.json", values)
    config = cli.from_dict(run.config())
    assert config.likelihood.matmul_precision == "highest" and config.training.ema_warmup is True
    run.match(_config())
    with pytest.raises(ValueError, match=r"training.ema_warmup: True there, False here"):
        run.match(_config(training__ema_warmup=False))


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_of_them_merges(folder):
    run, expected = folder("processes"), folder("one")
    sets = ["likelihood.images=12", "likelihood.rtol=1e-2", "likelihood.tolerance_images=4"]
    command = [sys.executable, "-m", "experiments.likelihood", "--workdir", str(run.path)]
    command += [f"--set={text}" for text in sets]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {**os.environ, "XLA_FLAGS": "", "JAX_COORDINATOR_ADDRESS": address}
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(n)},
            cwd=pathlib.Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["bits/dim on 12 images" in out for out, _ in outputs] == [True, False]
    assert len(list(run.path.glob("likelihood_test-*-of-2.jsonl"))) == 4  # both had a share, at both tolerances
    likelihood.likelihood(_config(likelihood__rtol=1e-2, likelihood__tolerance_images=4), expected)
    np.testing.assert_allclose(_bits(run), _bits(expected), rtol=2e-4)


@pytest.mark.parametrize("text", ["", "1", "2/2", "a/2", "-1/2", "1/2/3", "/"])
def test_a_shard_is_two_numbers(text):
    with pytest.raises(ValueError, match="--shard is k/n"):
        likelihood._shard(text)
    assert likelihood._shard("0/4") == (0, 4)
