"""What the processes of one run share out and wait for; with one process, nothing."""

from __future__ import annotations

import contextlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils


def primary() -> bool:
    """Whether this process writes what there is one of: pictures, summaries, metrics."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Block until all processes are here; what: the same words in each."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def together(what: str):
    """A context that all processes leave together: where it fails in one, it fails in all, after what they do in it.

    Raises:
      ChildProcessError: in the others; it says which process to look at.
    """
    fault = None
    try:
        yield
    except Exception as error:
        fault = error
    if jax.process_count() > 1:
        if fault is not None:  # said at once: the others may have work to finish before they are here
            print(f"{what}: {type(fault).__name__}: {fault}", file=sys.stderr, flush=True)
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(fault is not None)))
        if failed.size and fault is None:
            raise ChildProcessError(f"{what}: failed in process {', '.join(map(str, failed))}, which says why")
    if fault is not None:
        raise fault
