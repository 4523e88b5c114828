"""A run folder on gs://, in memory: all but checkpoints; test_bucket.py has a whole run."""

import os

import fsspec
import numpy as np
import pytest
from etils.epath import backend

from experiments import lock, pictures, records
from experiments.artefacts import Metrics, Run, read_json, read_jsonl


@pytest.fixture
def bucket(monkeypatch):
    """gs:// in memory."""
    memory = fsspec.filesystem("memory", skip_instance_cache=True)

    class InMemory(backend._FileSystemSpecBackend):
        def fs(self, path):
            return memory

    stripped = lambda path: str(path).removeprefix("gs:/")
    for name in ("open", "exists", "isdir", "listdir", "makedirs", "mkdir", "rmtree", "remove"):
        method = getattr(InMemory, name)
        monkeypatch.setattr(
            InMemory, name, lambda self, path, *a, m=method, **k: m(self, stripped(path), *a, **k), raising=False
        )
    glob = lambda self, path: [f"gs:/{found}" for found in memory.glob(stripped(path))]
    monkeypatch.setattr(InMemory, "glob", glob, raising=False)
    from etils.epath import gpath

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", InMemory())
    yield memory
    memory.store.clear()


def test_a_folder_in_a_bucket(bucket, tmp_path):
    """What the scripts do with a run folder they do alike on gs:// and on a disk."""
    from configs import smoke

    config = smoke.get_config()
    for run in (Run("gs://bucket/runs/a"), Run(str(tmp_path / "a"))):
        run.open(config)
        run.open(config)
        assert run.config()["data"]["name"] == "digits"
        with lock.Lock(run):
            assert read_json(run / lock.NAME)["process"] == os.getpid()
        assert not (run / lock.NAME).exists()
        metrics = Metrics(run, 0)
        metrics.write(1, {"loss": 2.0})
        metrics.write(2, {"loss": 1.0})
        metrics.close()
        metrics = Metrics(run, 1)  # resumed from step 1
        metrics.write(2, {"loss": 1.5})
        metrics.close()
        assert [(line["step"], line["loss"]) for line in read_jsonl(run / "metrics.jsonl")] == [(1, 2.0), (2, 1.5)]
        pairs = [(i, 0) for i in range(6)]
        for k in (0, 1):
            files = records.Records(run, "likelihood_test", {"a": 1}, (k, 2))
            write = files.writer()
            for i, d in files.share(pairs):
                write([{"index": i, "draw": d, "bits_per_dim": float(i)}])
        assert sorted(records.Records(run, "likelihood_test", {"a": 1}).read()) == pairs
        pictures.grid(run / "samples.png", np.zeros((2, 4, 4, 1), np.int32), 17)
        pictures.loss_curve(run / "loss.png", read_jsonl(run / "metrics.jsonl"))
        row = {"step": 2, "seconds": 9.0, "bits_per_dim": 1.5, "standard_error": None}
        pictures.learning_curve(run / "learning_curve.png", [row], "test")
        for name in ("samples", "loss", "learning_curve"):
            assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert any("bucket/runs/a/config.json" in name for name in bucket.store)
