"""Records of an evaluation, one line for each image and draw: appended as they are computed, by one process or many.

What a record depends on is its settings; their digest is part of the file's name, so that records of other settings are
neither mixed with these nor lost. Each process (or machine) appends to a file of its own. Evaluated are the
records that no file has; merged are those of all files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable

from experiments.artefacts import Run, read_jsonl

Pair = tuple[int, int]
"""(index of the image in its split, number of the draw)."""


class Records:
    """The files `<name>-<digest of the settings>.<k>-of-<n>.jsonl` of a run folder."""

    def __init__(self, run: Run, name: str, settings: dict, shard: tuple[int, int] = (0, 1)):
        self.settings = json.loads(json.dumps(settings))
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        self._run, self._stem, self._shard = run, f"{name}-{digest}", shard

    def share(self, pairs: list[Pair], whole: int = 1) -> list[Pair]:
        """Return this process's part of the pairs: the k-th of n contiguous ones, in groups of `whole` each."""
        k, n = self._shard
        groups = len(pairs) // whole
        return pairs[k * groups // n * whole : (k + 1) * groups // n * whole]

    def read(self) -> dict[Pair, dict]:
        """Return the records of all files; a line cut short by a kill is left out.

        Raises:
          ValueError: a file that is damaged or of other settings.
        """
        found: dict[Pair, dict] = {}
        for file in sorted(self._run.path.glob(f"{self._stem}.*-of-*.jsonl")):
            lines = read_jsonl(file)
            self._check(file, lines)
            for record in lines[1:]:
                found.setdefault((record["index"], record["draw"]), record)
        return found

    def writer(self) -> Callable[[list[dict]], None]:
        """Return write(records), which appends to this process's file; what a kill left of a line is cut off first."""
        k, n = self._shard
        name = f"{self._stem}.{k}-of-{n}.jsonl"
        lines = read_jsonl(self._run / name)
        self._check(self._run / name, lines)
        self._run.write(name, _lines(lines or [{"settings": self.settings}]))

        def write(records: list[dict]) -> None:
            self._run.append(name, _lines(records))

        return write

    def _check(self, file, lines):
        if not lines:
            return
        old = lines[0].get("settings") if isinstance(lines[0], dict) else None
        if not isinstance(old, dict):
            raise ValueError(f"{file} does not begin with the settings of its records")
        differing = [k for k in sorted(old | self.settings) if old.get(k) != self.settings.get(k)]
        if differing:
            different = "; ".join(f"{k}: {old.get(k)!r} there, {self.settings.get(k)!r} here" for k in differing)
            raise ValueError(f"{file} holds records of other settings: {different}")


def plain(record: dict) -> dict:
    """Return a record as JSON holds it: None for numbers that are not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _lines(records):
    return "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records)
