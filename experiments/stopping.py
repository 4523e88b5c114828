"""When a training run stops before its end: Ctrl-C, SIGTERM, and the agreement of all its processes on the step."""

from __future__ import annotations

import os
import signal

import jax
from jax.experimental import multihost_utils

# What a shell reports of a process that died of the signal; the run saved its state first.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stop:
    """A context in which the first Ctrl-C or SIGTERM asks the loop to stop after its step; the second one kills.

    With several processes a signal to any of them is a notice of pre-emption to JAX's coordination service, which names
    one step for all; nothing is exchanged between devices for it.
    """

    def __init__(self):
        self._signal: int | None = None
        self._before: dict[int, object] = {}
        self._joined = jax.distributed.is_initialized()
        self._asked = 0

    def __enter__(self) -> Stop:
        # SIGTERM is JAX's own where processes are joined: it takes it as the notice.
        for number in (signal.SIGINT,) if self._joined else (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                break  # not the main thread: whoever runs us there keeps the signals
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def now(self) -> bool:
        """Return whether to stop here; every process asks after every step, or every call of several."""
        if not self._joined:
            return self._signal is not None
        # JAX names one more than the largest number that a process has asked with, and waits for exactly that one: the
        # numbers must be consecutive, and begin where a notice before the first is heard.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    @property
    def exit_code(self) -> int:
        """What the script exits with."""
        return EXIT_CODES[self._signal or signal.SIGTERM]

    def _handle(self, number, frame):
        self._signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if self._joined:
            os.kill(os.getpid(), signal.SIGTERM)
