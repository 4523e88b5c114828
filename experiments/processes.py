"""What the processes of one run share out and wait for; with one process, nothing."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils


def primary() -> bool:
    """Whether this process writes what there is one of: pictures, summaries, metrics."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Block until all processes are here; what: the same words in each."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
