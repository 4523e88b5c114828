"""Finished batches, one file each, until all are there: a run that was killed goes on with those missing."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np

from experiments.artefacts import Run


class Parts:
    """Numbered files of arrays in a folder inside a run folder, each written whole or not at all.

    The folder's name has a digest of all that the arrays depend on, so that batches of other settings are never mixed.
    """

    def __init__(self, run: Run, name: str, depends: Any):
        """Open the folder, or create it; depends: a value of JSON."""
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = run / f"{name}-{digest}.parts"
        self._run = run
        self.folder.mkdir(parents=True, exist_ok=True)

    def _name(self, n):
        return f"{self.folder.name}/{n:06d}.npz"

    def has(self, n: int) -> bool:
        """Whether part n is there."""
        return (self._run / self._name(n)).exists()

    def write(self, n: int, **arrays: np.ndarray) -> None:
        """Write part n."""
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        self._run.write(self._name(n), packed.getvalue())

    def read(self, n: int) -> dict[str, np.ndarray]:
        """Return part n."""
        return read(self._run / self._name(n))

    def remove(self) -> None:
        """Delete the folder."""
        self.folder.rmtree(missing_ok=True)


def read(file) -> dict[str, np.ndarray]:
    """Return the arrays of one file."""
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
        return dict(arrays)
