"""The order in which examples are visited: an endless shuffled one to train, one pass to evaluate."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jdiff._array import check_count
from jdiff.data.optional import require
from jdiff.data.sources import Source

__all__ = ["batches", "evaluation_batches"]


def batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Any:
    """Endless training batches, this process's share of each.

    The examples of all epochs form one sequence, each epoch in an order of its own given by ``(seed, epoch)``. Global
    batch ``b`` is positions ``[b * batch_size, (b + 1) * batch_size)`` of it (it may straddle two epochs), and process
    ``p`` of ``P`` takes the ``p``-th of ``P`` contiguous parts: the global batch does not depend on how many there are.

    Args:
      source: what to read.
      batch_size: examples in a *global* batch, a multiple of ``process_count``.
      seed: in ``[0, 2**32)``; with the position it determines the order.
      shuffle: False visits the examples in file order.
      process_index: this process, ``jax.process_index()``.
      process_count: ``jax.process_count()``.
      threads: threads that read ahead.
      prefetch: batches read ahead.

    Returns:
      A `grain.DatasetIterator` of dicts ``image`` ``(batch_size / process_count, H, W, C)``, ``index`` (int32, the
      position in the global batch, from which the trainer derives keys) and, where there are labels, ``label``.
      ``get_state()`` is a small JSON-able dict, the same in every process, which ``set_state`` continues from exactly,
      also under another number of processes.

    Raises:
      ValueError: an empty source, a batch size that is not positive or no multiple of ``process_count``, a bad index,
        seed or number of threads.
      TypeError: another source, a number that is no integer.
      ImportError: Grain is not installed.
    """
    share = _share(source, batch_size, process_index, process_count)
    for name, value, least in (("threads", threads, 0), ("prefetch", prefetch, 0), ("seed", seed, 0)):
        check_count(value, name, least)
    if seed >= 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    grain = require("grain")
    index = np.arange(process_index * share, (process_index + 1) * share, dtype=np.int32)
    # The pipeline carries positions only, so that a batch is one read; which pixels they stand for is decided last.
    positions = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        positions = positions.shuffle()
    # Local batch b * P + p of the endless sequence is part p of global batch b. Nothing remains to be dropped: it makes
    # Grain count batches by integers, and not by floats, which overflow for batches of one.
    local = positions.repeat().batch(share, drop_remainder=True)[process_index::process_count]
    dataset = local.map(lambda chosen: source.read(np.asarray(chosen)) | {"index": index})
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))


def evaluation_batches(
    source: Source, batch_size: int, *, process_index: int = 0, process_count: int = 1, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Every example exactly once, in file order, this process's share of each global batch.

    The last global batch is filled up with examples from the beginning (real images, so that adaptive solvers do not
    stumble over padding), which ``mask`` marks False. Every process gets the same number of batches of the same shape.

    Args:
      source: what to read.
      batch_size: examples in a *global* batch, a multiple of ``process_count``.
      process_index: this process.
      process_count: the number of processes.
      start: the global batch to begin with, to continue an evaluation that was cut off.

    Yields:
      Dicts ``image``, ``label`` (where there are labels), ``mask`` (bool) and ``index`` (int32): here the example's
      number in the split, so that keys folded from it do not depend on the batch size. Padding goes on counting.

    Raises:
      ValueError: an empty source, a batch size that is not positive or no multiple of ``process_count``, a bad index or
        start; raised at the call, before the first batch.
      TypeError: another source, a number that is no integer.
    """
    share = _share(source, batch_size, process_index, process_count)
    total = -(-len(source) // batch_size)
    check_count(start, "start", 0)
    if start > total:
        raise ValueError(f"start must be in [0, {total}], the number of batches, got {start}")

    def generate() -> Iterator[dict[str, np.ndarray]]:
        for batch in range(start, total):
            first = batch * batch_size + process_index * share
            index = np.arange(first, first + share, dtype=np.int32)
            yield source.read(index % len(source)) | {"index": index, "mask": index < len(source)}

    return generate()


def _share(source: Source, batch_size: int, process_index: int, process_count: int) -> int:
    if not isinstance(source, Source):
        raise TypeError(f"source must be a Source, got {type(source).__name__}")
    if len(source) == 0:
        raise ValueError(f"{source.name}/{source.split} is empty: no batch can be drawn from it")
    check_count(batch_size, "batch_size")
    check_count(process_count, "process_count")
    check_count(process_index, "process_index", 0)
    if process_index >= process_count:
        raise ValueError(f"process_index must be in [0, process_count), got {process_index} of {process_count}")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a multiple of the {process_count} processes")
    return batch_size // process_count
