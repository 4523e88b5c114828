"""A run whose folder is gs://: with Google's client, gcsfs and TensorStore, as on a cloud, but a server of our own."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from fake_bucket import serve

from experiments.artefacts import Run
from jdiff import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {
    "network.name": "mlp",
    "network.options": {"width": 16, "depth": 1},
    "training.steps": 40,
    "training.log_every": 4,
    "training.checkpoint_every": 4,
}


def start(name, folder, address, *more):
    options = [f"--set={field}={json.dumps(value)}" for field, value in SETTINGS.items()]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # else TensorStore looks for a machine that gives some
        "GOOGLE_CLOUD_PROJECT": "none",
    }
    command = [sys.executable, "-m", f"experiments.{name}", "--workdir", str(folder), "--config", "configs/smoke.py"]
    return subprocess.Popen(
        [*command, *options, *more], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out


@pytest.mark.slow
def test_a_run_in_a_bucket(digits, tmp_path):
    """Killed in the middle, resumed from the bucket, sampled: the run on a disk, bit for bit."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("google.cloud.storage")
    here, there = tmp_path / "run", "gs://bucket/runs/a"
    with serve() as (address, bucket, _):
        process = start("train", there, address)
        end = time.monotonic() + 120
        while "runs/a/checkpoints/16/commit_success.txt" not in bucket.objects and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        steps = [name for name in bucket.objects if re.fullmatch(r"runs/a/checkpoints/\d+/commit_success.txt", name)]
        assert 1 <= len(steps) <= 4 and "runs/a/checkpoints/40/commit_success.txt" not in steps
        finish(start("train", there, address))
        finish(start("sample", there, address, "--number=8"))
        files = {name.removeprefix("runs/a/"): content for name, (_, content) in bucket.objects.items()}
    finish(start("train", here, address))
    kept = {re.match(r"checkpoints/(\d+)/", name)[1] for name in files if name.startswith("checkpoints/")}
    assert kept == {"32", "36", "40"}
    assert not any("lock" in name or "tmp" in name for name in files)
    meta = "checkpoints/40/meta/metadata"
    assert json.loads(files[meta])["items"] == json.loads((here / meta).read_text())["items"]
    lines = lambda text: [json.loads(line)["loss"] for line in text.splitlines()]
    assert lines(files["metrics.jsonl"].decode()) == lines((here / "metrics.jsonl").read_text())
    assert files["samples_dpmpp_2m.png"][:4] == b"\x89PNG"


def test_a_url_is_no_path_of_this_machine(monkeypatch):
    """Orbax is handed the URL as it is, not below the working directory."""
    seen = []
    monkeypatch.setattr("jdiff.checkpoint.manager.Manager.__init__", lambda self, path, options: seen.append(str(path)))
    monkeypatch.setattr(type(Run("gs://a").path), "exists", lambda self: False)
    checkpoint.open_manager("gs://bucket/runs/a")
    assert seen == ["gs://bucket/runs/a"]
