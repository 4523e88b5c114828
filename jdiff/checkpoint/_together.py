"""What the processes of one run agree on while they save: that what failed in one failed in all."""

import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class OtherProcessError(OSError):
    """What failed, failed in another process."""


def agreed(fault: Exception | None) -> Exception | None:
    """The fault of this process, or one that names those that have one; all processes call it at the same point."""
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(fault is not None)))
        if failed.size and fault is None:
            return OtherProcessError(f"failed in process {', '.join(map(str, failed))}, which says why")
    return fault


class Barrier:
    """Orbax's barrier for what it does in the background, which does not wait for a process that has failed.

    Orbax's threads of all processes come to the same barriers in the same order, each with a name. One that fails
    leaves out the next one and comes to a later one, where it would wait for the others, and they for it, until a limit
    of many minutes. Here the n-th barrier of one process is the n-th of all; where they differ in the name, somebody
    has failed: all of them raise, and at the barriers after it each raises at once.
    """

    def __init__(self, place: str):
        """place: the same words in all processes, and in no other barrier."""
        self._place, self._count, self._turn, self.broken = place, 0, threading.Lock(), False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait until all processes are here.

        Raises:
            OtherProcessError: they are not at the same barrier.
        """
        if jax.process_count() == 1:
            return
        with self._turn:  # where one of Orbax's threads has failed, another may come here while it waits
            if not self.broken:
                self.broken = len(self._names(key, timeout_ms)) > 1
            if self.broken:
                raise OtherProcessError("failed in another process, which says why")

    def _names(self, key, timeout_ms):
        """Wait for all, and return the names that they came with."""
        # JAX has no public way to JAX's coordination service; a collective must not run beside those of the training.
        from jax._src import distributed

        client: Any = distributed.global_state.client
        client.key_value_set(f"{self._place}/{self._count}/{jax.process_index()}", key)
        client.wait_at_barrier(f"{self._place}/{self._count}", timeout_ms)
        here = {name for _, name in client.key_value_dir_get(f"{self._place}/{self._count}/")}
        if self._count:  # all have read those of the barrier before
            client.key_value_delete(f"{self._place}/{self._count - 1}/{jax.process_index()}")
        self._count += 1
        return here
