"""What is measured of a run: likelihoods, learning curves, yardsticks, and the demo from training to the report."""

import base64
import math
import re
import shutil

import numpy as np
import pytest
from experiments_cases import small_config
from scipy import stats

from experiments import demo, learning_curve, likelihood, methods, report, yardsticks
from experiments.artefacts import Run, read_json, read_jsonl
from jdiff import data

pytestmark = pytest.mark.usefixtures("digits")

_LIKELIHOOD = {"likelihood__draws": 2, "likelihood__rtol": 1e-3, "likelihood__atol": 1e-3}


def test_likelihood_does_not_depend_on_the_batch_size(done, monkeypatch):
    config = small_config(likelihood__draws=2, likelihood__rtol=1e-3, likelihood__atol=1e-3)
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
        assert likelihood.likelihood(small_config(**{**_LIKELIHOOD, "likelihood__batch_size": 16}), done) == first
    (done / "likelihood_test.json").unlink()
    likelihood.likelihood(small_config(**{**_LIKELIHOOD, "likelihood__batch_size": 16}), done)
    np.testing.assert_allclose(likelihood.per_image(done, "test"), small, rtol=2e-4)


def test_the_learning_curve_evaluates_every_checkpoint(done, tmp_path, monkeypatch, capsys):
    run = Run(shutil.copytree(done.path, tmp_path / "run"))
    before = set(run.path.iterdir())
    rows = learning_curve.learning_curve(small_config(), run, split="test[:8]")
    assert read_json(run / "learning_curve.json") == {"split": "test[:8]", "points": rows}
    assert (run / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    # The likelihood's own files are of `likelihood` alone; its records are kept.
    new = {file.name for file in set(run.path.iterdir()) - before if "-of-" not in file.name}
    assert new == {"learning_curve.json", "learning_curve.png"}
    assert capsys.readouterr().out.count("bits/dim on 8 images") == 2
    with monkeypatch.context() as patch:  # again, as another than the first of several processes
        patch.setattr(methods, "_exact_evaluator", None)
        patch.setattr(learning_curve, "primary", lambda: False)
        for name in new:
            (run / name).unlink()
        assert learning_curve.learning_curve(small_config(), run, split="test[:8]") == rows
        assert not any((run / name).exists() for name in new) and not capsys.readouterr().out
    assert [row["step"] for row in rows] == [5, 10]
    for row in rows:
        alone = likelihood.likelihood(small_config(), run, split="test[:8]", step=row["step"])
        assert row["bits_per_dim"] == alone["bits_per_dim"]
    assert rows[0]["bits_per_dim"] != rows[1]["bits_per_dim"]
    lines = read_jsonl(run / "metrics.jsonl")
    steps = np.diff([0] + [line["step"] for line in lines])
    seconds = np.cumsum(steps * 8 / np.array([line["images_per_second"] for line in lines]))
    at = [[line["step"] for line in lines].index(step) for step in (5, 10)]
    np.testing.assert_allclose([row["seconds"] for row in rows], seconds[at])


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


def test_the_demo_from_training_to_the_report(done, tmp_path, capsys):
    done = Run(shutil.copytree(done.path, tmp_path / "run"))  # whose configuration the demo sets
    """All of it on the trained run: nothing is trained again, and the report stands alone."""
    config = small_config(sampling__number=4, sampling__batch_size=4, likelihood__images=8)
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
