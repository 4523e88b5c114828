"""One training run a folder: a file says who is writing, and is renewed while it is; a dead owner's is taken over."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid

from etils import epath

from experiments.artefacts import Run, read_json


class LockedError(RuntimeError):
    """Another process writes into the folder."""


NAME = "lock.json"
RENEWED_EVERY = 15.0
"""Seconds between renewals; one that is four times older is a dead owner's."""
_STALE = 4 * RENEWED_EVERY
_SETTLE = 0.2


class Lock:
    """A context that owns a run folder, in the process that writes into it.

    The file holds host, process and the time of the last renewal. It is taken over where its process is on this host
    and no longer there, or where it has not been renewed for a minute: clocks of hosts that share a folder must agree
    within that. File systems of clouds have no exclusive creation: each of two that start together writes, waits a
    little and looks whose file it is.
    """

    def __init__(self, run: Run):
        self._run = run
        self._identity = uuid.uuid4().hex
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lock:
        """Own the folder.

        Raises:
          LockedError: another process does; the message names it.
        """
        if owner := self._other():
            raise _taken(self._run, owner)
        self._write()
        time.sleep(_SETTLE)
        self.check()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        try:
            if not self._other():
                (self._run / NAME).unlink(missing_ok=True)
        except OSError:
            pass  # a folder that is gone or read-only needs no release

    def check(self) -> None:
        """Raise LockedError where another process has taken the folder over: this one was silent for too long."""
        if owner := self._other():
            raise _taken(self._run, owner)

    def _other(self):
        """Return what the file says of a living owner other than this object, or None."""
        try:
            owner = read_json(self._run / NAME)
        except Exception:  # none, half a file, or a bucket's hiccup, whose errors are of many kinds
            return None
        if not isinstance(owner, dict) or owner.get("identity") == self._identity:
            return None
        # This very process number was another process's before: a container that was started again.
        dead = owner.get("machine") == _machine() and not _alive(owner.get("process"))
        renewed = owner.get("renewed")
        stale = not isinstance(renewed, int | float) or time.time() - renewed > _STALE
        return None if dead or stale else owner

    def _write(self):
        owner = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "process": os.getpid(),
            "identity": self._identity,
        }
        self._run.write_json(NAME, owner | {"renewed": time.time()})

    def _renew(self):
        while not self._done.wait(RENEWED_EVERY):
            try:
                if not self._other():
                    self._write()
            except Exception:
                pass  # a full disk: the run itself reports it; what is tried again later is better than no thread


def _machine():
    """Where numbers of processes mean something: this boot, this namespace (containers may share a host's name)."""
    try:
        boot = epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _alive(process):
    if not isinstance(process, int) or process <= 0 or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _taken(run, owner):
    age = time.time() - owner["renewed"]
    return LockedError(
        f"{run.path} is being written by process {owner.get('process')} on {owner.get('host')}, which was there "
        f"{age:.0f} s ago. Stop it, or use another --workdir; if it is gone, wait {_STALE:.0f} s or delete {run / NAME}"
    )
