"""A trained model on a split of its data: which records are wanted, which are there, and how to make the others."""

from __future__ import annotations

import math
import sys
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import methods, model
from experiments.artefacts import Run
from experiments.processes import primary, together, wait_for_all
from experiments.records import Pair, Records
from jdiff import data, parallel

_EXACT_LIMIT = 256


class Evaluation:
    """A model on a split: which records are wanted, which are there, and how to make the others."""

    def __init__(self, config: ConfigDict, run: Run, split: str, step: int | None, shard: tuple[int, int], merge: bool):
        k, n = shard
        if not 0 <= k < n:
            raise ValueError(f"a shard is k/n with 0 <= k < n, got {k}/{n}")
        self.split, self.missing = split, 0
        self._config, self._run, self._shard, self._merge = config, run, shard, merge
        self._source = source = data.load(config.data.name, split)
        if source.version is None:
            raise ValueError(f"{config.data.name}/{split} is of unknown version: no number without it")
        self.size = size = math.prod(source.shape)
        if config.likelihood.divergence == "exact" and size > _EXACT_LIMIT and config.network.name != "coupling":
            raise ValueError(
                f'likelihood.divergence = "exact" takes D derivatives an evaluation and is for D <= {_EXACT_LIMIT}; '
                f"images of {config.data.name} have D = {size}: use rademacher, with more likelihood.probes"
            )
        self._trained = model.load(config, run, source, step=step)
        self._parameters = model.digest(self._trained)
        self.images = min(config.likelihood.images or len(source), len(source))
        self._mesh = mesh = parallel.data_mesh(jax.local_devices())
        share = -(-self.images * config.likelihood.draws * config.likelihood.importance_samples // n)
        self._batch_size = -(-min(config.likelihood.batch_size, share) // mesh.size) * mesh.size
        if config.protocol == "song2021":
            self._batch_size = min(config.likelihood.batch_size, self.images)
        self._placed = None
        self._functions = {}

    def pairs(self, draws: int) -> list[Pair]:
        """Return all pairs of image and draw, the first draw of all images first.

        Protocol song2021: each pass in an order of its own, and without the images that do not fill a batch.
        """
        if self._config.protocol == "jdiff":
            return [(i, d) for d in range(draws) for i in range(self.images)]
        whole = self.images // self._batch_size * self._batch_size
        orders = [np.random.default_rng([self._config.seed, d]).permutation(self.images) for d in range(draws)]
        return [(int(i), d) for d, order in enumerate(orders) for i in order[:whole]]

    def few(self, count: int) -> list[Pair]:
        """Return about so many pairs to estimate the solver's error on, spread over the split; of song2021 a batch."""
        if self._config.protocol == "jdiff":
            return [(int(i), 0) for i in np.unique(np.linspace(0, self.images - 1, count).round().astype(int))]
        return self.pairs(1)[: self._batch_size] if count else []

    def settings(self, method: methods.Method) -> dict:
        """Return what a record depends on besides image and draw."""
        c = self._config.likelihood
        return {
            "data": self._config.data.name,
            "version": self._source.version,
            "split": self.split,
            "process": self._config.process.name,
            "step": self._trained.step,
            "parameters": self._parameters,
            "seed": self._config.seed,
            "protocol": self._config.protocol,
            "t_min": methods.start(self._config, self._trained.model.transform, discrete=method.discrete),
            "dequantisation": c.dequantisation,
            "matmul_precision": c.matmul_precision,
            **method.settings,
        }

    def records(self, pairs: list[Pair], method: methods.Method) -> list[dict] | None:
        """Return the records of all pairs in order, those missing evaluated first; None where other shards owe some."""
        files = Records(self._run, f"likelihood_{slug(self.split)}", self.settings(method), self._shard)
        there = files.read()
        wait_for_all(f"work on {method.name}")  # all saw the same records, whoever is the first to add some
        mine = files.share(pairs, self._batch_size if method.joint else 1)
        todo = [pair for pair in mine if pair not in there]
        if method.joint:  # what is missing of a batch is computed with the rest of it
            size = self._batch_size
            batches = [mine[first : first + size] for first in range(0, len(mine), size)]
            todo = [pair for batch in batches if any(pair not in there for pair in batch) for pair in batch]
        with together(f"records of {method.name}"):  # the others finish their parts, which are kept
            if todo and not self._merge:
                self._compute(todo, method, files.writer())
        there = files.read()
        missing = sum(pair not in there for pair in pairs)
        self.missing += missing
        return None if missing else [there[pair] for pair in sorted(pairs)]

    def _compute(self, pairs, method, write):
        mesh = self._mesh
        if method.joint:
            self._placed = self._trained.params, self._trained.statistics
        elif self._placed is None:
            self._placed = parallel.replicate((self._trained.params, self._trained.statistics), mesh)
        if method.name not in self._functions:  # one program for all batches and tolerances
            self._functions[method.name] = method.evaluator(self._config, self._trained.model, self._source.shape)
        evaluate = self._functions[method.name]
        numbers = method.numbers if method.joint else [np.float32(number) for number in method.numbers]
        device = f"{1 if method.joint else mesh.size} {jax.local_devices()[0].device_kind}"
        total, count = 0.0, 0
        interval = 0.5 if sys.stderr.isatty() else 15
        with tqdm(
            total=len(pairs),
            desc=f"{method.name} {self.split}",
            unit="image",
            mininterval=interval,
            disable=not primary(),
        ) as bar:
            for first in range(0, len(pairs), self._batch_size):
                start = time.perf_counter()
                rows = pairs[first : first + self._batch_size]
                # Filled up with real images: one shape, one program, nothing for adaptive solvers to stumble over.
                index, draw = np.resize(np.asarray(rows, np.int32), (self._batch_size, 2)).T
                batch = {"image": self._source.read(index)["image"], "index": index, "draw": draw}
                if not method.joint:
                    batch = parallel.shard_batch({k: np.ascontiguousarray(v) for k, v in batch.items()}, mesh)
                out = jax.device_get(evaluate(*self._placed, batch, *numbers))
                seconds = (time.perf_counter() - start) / len(rows)
                records = [
                    {"index": i, "draw": d, **{k: v[row].item() for k, v in out.items()}}
                    | {"device": device, "seconds": round(seconds, 6)}
                    for row, (i, d) in enumerate(rows)
                ]
                write(records)
                total, count = total + sum(r["bits_per_dim"] for r in records), count + len(records)
                bar.update(len(rows))
                bar.set_postfix_str(f"{total / count:.3f} bits/dim")


def slug(split: str) -> str:
    """Return the part of a file's name that stands for a split."""
    return "".join(c if c.isalnum() else "_" for c in split)
