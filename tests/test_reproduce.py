"""The table of Song et al. 2021: which value agrees, what a row lacks, and the road from a checkpoint to a row."""

import json
import math
import pathlib
import re
import sys
import types

import numpy as np
import pytest

import experiments
from configs.song2021 import PUBLISHED
from experiments import reproduce
from experiments.artefacts import Run
from experiments.lock import LockedError
from jdiff.checkpoint import DamagedCheckpointError

ROW = "vp/cifar10_ddpmpp_continuous"
GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "reproduce.md"


def _summary(bits, standard=0.01, noise=0.001, images=10_000, draws=2, **settings):
    return {
        "bits_per_dim": bits,
        "standard_error": standard,
        "noise_error": noise,
        "settings": {"images": images, "draws": draws, "data": "cifar10", "protocol": "jdiff", **settings},
    }


@pytest.mark.parametrize("sign", [-1, 1])
def test_agreement_is_two_sided_and_within_rounding_plus_errors(sign):
    c = reproduce.compare(3.16, _summary(3.16, noise=0.001))
    # 784 of 10,000 images left out of a pass, five passes; 20,000 against 46,080 evaluations.
    theirs = math.sqrt((0.0784 * 10_000 * 0.01**2 + 20_000 * 0.001**2) / 46_080)
    assert c.error == pytest.approx(math.hypot(0.001, theirs))
    assert c.margin == pytest.approx(0.005 + 1.96 * c.error) and c.agrees and c.difference == 0
    inside, outside = (3.16 + sign * (c.margin + step) for step in (-1e-6, 1e-6))
    assert reproduce.compare(3.16, _summary(inside)).agrees
    assert not reproduce.compare(3.16, _summary(outside)).agrees
    # The published rows are told apart from one another, and from themselves a rounding away.
    assert not reproduce.compare(3.16, _summary(3.13)).agrees and not reproduce.compare(3.16, _summary(3.175)).agrees


def test_the_whole_error_counts_on_fewer_images_or_with_one_draw():
    few = reproduce.compare(3.16, _summary(3.16, standard=0.1, images=100))
    assert few.error > 0.1
    one = reproduce.compare(3.16, _summary(3.16, noise=None, draws=1))
    assert one.error > 0.01
    # Their protocol leaves images out, as theirs did: twice the variance.
    ours, both = (reproduce.compare(3.16, _summary(3.16, draws=5, protocol=p)) for p in ("jdiff", "song2021"))
    assert both.error == pytest.approx(math.sqrt(2 * (ours.error**2 - 0.001**2)))


def test_the_error_is_that_of_both_protocols():
    """Many worlds with a known spread: the difference over its error has unit variance."""
    rng = np.random.RandomState(0)
    n, spread, noise = 10_000, 0.9, 0.3
    z = []
    for _ in range(200):
        image = 3 + spread * rng.standard_normal(n)
        theirs = np.mean([(image + noise * rng.standard_normal(n))[rng.permutation(n)[:9216]].mean() for _ in range(5)])
        bits = image[:, None] + noise * rng.standard_normal((n, 2))
        summary = _summary(
            bits.mean(),
            standard=bits.mean(axis=1).std(ddof=1) / math.sqrt(n),
            noise=math.sqrt(bits.var(axis=1, ddof=1).mean() / 2 / n),
        )
        c = reproduce.compare(theirs, summary)
        z.append(c.difference / c.error)
    # Of 200 unit normals: p = 4e-4 and 3e-3.
    assert abs(np.mean(z)) < 0.25 and 0.85 < np.std(z) < 1.15


def test_rows_are_known_by_name():
    with pytest.raises(ValueError, match=r"no row 'vp/cifar10_ddpmp_continuous': did you mean vp/cifar10_ddpmpp_con"):
        reproduce.config("vp/cifar10_ddpmp_continuous")


def test_every_row_tells_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    entry = reproduce.status(ROW, str(tmp_path))
    assert entry["published"] == {"bits_per_dim": 3.16, "fid_pc": 2.55, "fid_ode": 3.93}
    assert entry["ours"] is None and entry["comparison"] is None
    checkpoint, images = entry["needs"]
    assert "checkpoint" in checkpoint and "dataset 'cifar10' is not prepared" in images
    json.dumps(entry)


def test_a_row_is_imported_evaluated_and_compared(tmp_path, monkeypatch, capsys):
    """The wiring, with an importer and an evaluation that only note what they are asked for."""
    asked = {}

    def import_checkpoint(config, run, path, *, sha256):
        asked["import"] = (config.network.name, run.path, path, sha256)

    def evaluate(config, run):
        asked["evaluation"] = (config.protocol, *(config.likelihood[k] for k in ("images", "batch_size", "draws")))
        run.path.mkdir(parents=True)
        run.write_json("likelihood_test.json", _summary(3.162, protocol=config.protocol))

    module = types.SimpleNamespace(import_checkpoint=import_checkpoint)
    monkeypatch.setitem(sys.modules, "experiments.import_checkpoint", module)
    monkeypatch.setattr(experiments, "import_checkpoint", module, raising=False)
    monkeypatch.setattr(reproduce.likelihood, "likelihood", evaluate)
    runs, file, report = str(tmp_path / "runs"), tmp_path / "checkpoint_26", tmp_path / "table.json"
    command = ["reproduce", "--row", ROW, "--path", str(file), "--runs", runs, "--sha256", "ab", "--json", str(report)]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        return reproduce.main(), capsys.readouterr()

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    code, said = run()
    assert code == 2 and not asked
    assert f"needs more: there is no checkpoint {file}; dataset 'cifar10' is not prepared" in said.err
    file.write_bytes(b"")
    monkeypatch.setattr(reproduce.data, "load", lambda name, split: None)
    code, said = run("--protocol", "song2021", "--set", "likelihood.images=500")
    assert code == 0 and "agrees: +0.0020" in said.out
    assert asked["import"] == ("ddpmpp", pathlib.Path(runs) / ROW, str(file), "ab")
    assert asked["evaluation"] == ("song2021", 500, 1024, 5)
    (entry,) = json.loads(report.read_text())
    assert entry["row"] == ROW and entry["comparison"]["agrees"]
    code, said = run("--set", "likelihood.image=500")
    assert code == 2 and "unknown configuration field 'likelihood.image'" in said.err


def test_the_table_judges_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    for row, bits in ((ROW, 3.1612), ("subvp/cifar10_ddpmpp_continuous", 3.07), ("ve/cifar10_ncsnpp_continuous", 3.4)):
        run = Run(tmp_path / row)
        run.path.mkdir(parents=True)
        run.write_json("likelihood_test.json", _summary(bits))
    text = reproduce.table([reproduce.status(row, str(tmp_path)) for row in reproduce.rows()])
    for row in reproduce.rows():
        assert f"\n    python -m experiments.reproduce --row {row} --path CHECKPOINT" in text
        published = PUBLISHED[row].bits_per_dim if row in PUBLISHED else None
        assert re.search(rf"\n{row} +{'-' if published is None else f'{published:.2f}'} ", text)
    assert re.search(rf"\n{ROW} +3\.16 +3\.1612 \+- 0\.0100  agrees: \+0\.0012, allowed 0\.00", text)
    assert re.search(r"\nsubvp/cifar10_ddpmpp_continuous +3\.02 +3\.0700 \+- 0\.0100  DISAGREES: \+0\.0500", text)
    assert re.search(r"\nve/cifar10_ncsnpp_continuous +- +3\.4000 \+- 0\.0100  nothing published to compare with", text)
    Run(tmp_path / ROW).write_json("likelihood_test.json", _summary(3.1612, None, None, images=1))
    entry = reproduce.status(ROW, str(tmp_path))
    assert entry["comparison"] is None
    assert "3.1612  not compared: one image has no standard error (1 images of" in reproduce.table([entry])


def test_the_smoke_twins_stop_where_one_is_interrupted_or_fails(tmp_path, monkeypatch, capsys):
    """With the exit codes of training; nothing half-trained is evaluated."""
    asked = []
    monkeypatch.setattr(reproduce.train, "train", lambda config, run: asked.append(run) or 130)
    monkeypatch.setattr(sys, "argv", ["reproduce", "--smoke", "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert stopped.value.code == 130 and len(asked) == 1
    for error in (FloatingPointError, DamagedCheckpointError, LockedError):

        def fail(config, run, error=error):
            raise error("why")

        monkeypatch.setattr(reproduce.train, "train", fail)
        assert reproduce.main() == 3 and capsys.readouterr().err == f"{error.__name__}: why\n"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json", str(tmp_path / "table.json")])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert "--json is of the table" in capsys.readouterr().err
