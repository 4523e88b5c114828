"""Records of a likelihood: shares are all pairs once, what was written survives a kill, settings are told apart."""

import json
import math

import pytest

from experiments.artefacts import Run
from experiments.records import Records


def _run(tmp_path):
    (tmp_path / "run").mkdir(exist_ok=True)
    return Run(tmp_path / "run")


def test_shares_are_all_pairs_once():
    pairs = [(i, d) for d in range(2) for i in range(7)]
    for n in (1, 2, 3, 4, 20):
        shares = [Records(Run("nowhere"), "x", {}, (k, n)).share(pairs) for k in range(n)]
        assert [pair for share in shares for pair in share] == pairs
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_records_survive_a_kill_and_know_their_settings(tmp_path):
    run, settings = _run(tmp_path), {"rtol": 1e-5, "split": "test"}
    record = lambda i, bits=1.0: {"index": i, "draw": 0, "bits_per_dim": bits}
    files = Records(run, "x", settings, (0, 2))
    assert files.read() == {}
    files.writer()([record(0), record(1, math.nan)])
    (file,) = run.path.glob("x-*.0-of-2.jsonl")
    with open(file, "a") as torn:
        torn.write('{"index": 2, "dra')
    assert sorted(files.read()) == [(0, 0), (1, 0)] and files.read()[1, 0]["bits_per_dim"] is None
    files.writer()([record(3)])  # cuts the torn line off and appends
    assert sorted(files.read()) == [(0, 0), (1, 0), (3, 0)]
    assert all(json.loads(line) for line in file.read_text().splitlines())

    # Another number of processes sees the same records; other settings see none of them.
    Records(run, "x", settings, (1, 3)).writer()([record(0, 9.0), record(5)])
    assert sorted(Records(run, "x", settings).read()) == [(0, 0), (1, 0), (3, 0), (5, 0)]
    assert files.read()[0, 0]["bits_per_dim"] == 1.0
    assert Records(run, "x", {**settings, "rtol": 1e-4}).read() == {}

    lines = file.read_text().splitlines()
    lines[0] = json.dumps({"settings": {**settings, "rtol": 1e-3}})
    file.write_text("\n".join(lines) + "\n")
    for call in (files.read, files.writer):
        with pytest.raises(ValueError, match=r"0-of-2.* other settings: rtol: 0.001 there, 1e-05 here"):
            call()
    file.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ValueError, match="does not begin with the settings"):
        files.read()
    file.write_text("{]\n{}\n")
    with pytest.raises(ValueError, match="is not JSON lines"):
        files.read()
