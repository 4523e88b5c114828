"""What a directory of checkpoints is opened with, and what can be wrong with it."""

import contextlib
import dataclasses
import itertools
import os

import jax
import orbax.checkpoint as ocp
from etils import epath

from jdiff._array import check_count
from jdiff.checkpoint._together import Barrier, OtherProcessError, agreed

__all__ = [
    "DamagedCheckpointError",
    "DamagedCheckpointWarning",
    "Manager",
    "NoCheckpointError",
    "SaveError",
    "open_manager",
]

_UNFINISHED = ".orbax-checkpoint-tmp"
_WRITERS = itertools.count(1)


class NoCheckpointError(FileNotFoundError):
    """There is no checkpoint, or none of the step asked for."""


class SaveError(OSError):
    """A checkpoint could not be written, now or in the background before; the message names its step and the fault."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is not what was saved; the message names step, file and fault."""


class DamagedCheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over and an older one restored; the message names step, file and fault."""


class Manager(ocp.CheckpointManager):
    """An Orbax `CheckpointManager` that remembers what this process saved, restored and found damaged.

    From Orbax: `all_steps()`, `latest_step()`, `close()` (`wait_until_finished()`, then release threads; also at the
    end of `with open_manager(...) as manager`).
    """

    interrupted: bool = False
    """Whether a wait for a save was cut short, as by Ctrl-C."""

    def __init__(self, directory: epath.Path, options: ocp.CheckpointManagerOptions) -> None:
        self._given, self._number = options, next(_WRITERS) if not options.read_only else 0
        self._failures, self._left_over, self._closing = 0, False, False
        self._writing: int | None = None
        self._open(directory)
        self.every: int = options.save_interval_steps
        self.read_only: bool = options.read_only
        self.trusted: set[int] = set()
        self.damaged: set[int] = set()

    def write(self, step: int, args: ocp.args.Composite) -> None:
        """Begin to write a step; see `save`, which is the function to call."""
        self.wait_until_finished()
        with self._all(step):
            self._make_room()
        try:
            self.save(step, args=args, force=True)
        except Exception as error:
            if jax.process_count() > 1:  # the others may wait inside of Orbax: this process ends, and they by heartbeat
                raise
            raise self._failed(step, error) from error
        self._writing = step

    def reached_preemption(self, step: int) -> bool:
        """Return False: when to stop is the caller's affair, and JAX's notice may be asked for by one of the two."""
        return False

    def wait_until_finished(self) -> None:
        """Block until the last save is on disk; in a run of several processes all of them call it.

        Raises:
            SaveError: it could not be written, by this process or another one. The next save may be tried as if
                nothing had happened.
        """
        before, self.interrupted = self.interrupted, True
        with self._all(self._writing) if self._writing is not None else contextlib.nullcontext():
            super().wait_until_finished()
        self._writing, self.interrupted = None, False
        if before:  # Orbax has forgotten the step that it waited for
            self.reload()

    def close(self) -> None:
        """Wait for the last save and release threads; a process that ends alone does not wait for the others."""
        self._closing = True
        super().close()

    @contextlib.contextmanager
    def _all(self, step):
        """What fails in one process fails in all, at the end of the context."""
        fault = None
        try:
            yield
        except Exception as error:
            fault = error
        if not self._closing:
            fault = agreed(fault)
        if fault is not None:
            raise self._failed(step, fault) from fault

    def _failed(self, step, error):
        """Forget a step that could not be written, and what was written of it."""
        self.trusted.discard(step)
        self._failures, self._writing, self.interrupted = self._failures + 1, None, False
        self._barrier.broken = True  # no thread waits there for processes that have failed
        # Orbax raises the error of a background save at every later call: only a new manager writes again.
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        if not self._closing:
            with contextlib.suppress(OSError):  # a folder that cannot be read now may be at the next save
                self._open(self.directory)
        self._clear()
        while isinstance(error, OtherProcessError) and error.__context__ is not None:
            error = error.__context__  # it came to the wrong barrier because of this
        text = (" ".join(str(error).split()) or type(error).__name__)[:600]
        if jax.process_count() == 1 and self._opened and step in self.all_steps():
            self.trusted.add(step)  # it is whole: older steps could not be deleted after it
            return SaveError(f"step {step} was written to {self.directory}, but not what follows it: {text}")
        return SaveError(f"step {step} could not be written to {self.directory}: {text}")

    def _open(self, directory):
        """Be a new Orbax manager; after the first time without waiting for the other processes."""
        self._opened = False
        self._barrier = Barrier(f"jdiff_save_{self._number}_{self._failures}")
        # Else threads wait for minutes for folders that could not be made, and the process at its end for them.
        threads = ocp.AsyncOptions(create_directories_asynchronously=False, barrier_sync_fn=self._barrier)
        create = self._given.create and not self._failures
        super().__init__(directory, options=dataclasses.replace(self._given, async_options=threads, create=create))
        self._opened = True

    def _make_room(self):
        """Be ready to write, or raise what Orbax would meet in one process while it waits in the others."""
        if not self._opened:
            self._open(self.directory)
        if self._left_over:
            self._clear()
        if jax.process_count() > 1 and jax.process_index() == 0:
            probe = self.directory / f"probe{_UNFINISHED}"
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmtree(missing_ok=True)

    def _clear(self):
        """Remove what unfinished saves left; what their threads still write meanwhile, the next time."""
        self._left_over = False
        if jax.process_index():
            return
        with contextlib.suppress(OSError):
            for left in self.directory.glob(f"*{_UNFINISHED}*"):
                self._left_over = True  # looked at once more, however it goes
                with contextlib.suppress(OSError):
                    left.rmtree(missing_ok=True)


def open_manager(directory: str | os.PathLike, *, keep: int = 3, every: int = 1, read_only: bool = False) -> Manager:
    """Open a directory of checkpoints, one folder a step, and create it unless `read_only`.

    A save that was cut short leaves a folder `<step>.orbax-checkpoint-tmp` (on gs:// a step without its
    `commit_success.txt`), which no step is ever restored from.

    Args:
        directory: local path or a URL that `etils.epath` knows.
        keep: how many steps stay; older ones are deleted after a newer one is complete.
        every: `save` does something at multiples of it only.
        read_only: for evaluation, next to a run that is writing: creates nothing, deletes nothing.

    Raises:
        ValueError: `keep` or `every` below 1, an empty `directory`.
        TypeError: `directory` is no path, `keep` or `every` no integer.
        NoCheckpointError: `read_only` and there is no such directory.
        OSError: the directory cannot be created.
    """
    check_count(keep, "keep")
    check_count(every, "every")
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory must be a path, got {directory!r}")
    if not os.fspath(directory):
        raise ValueError("directory must not be empty: it would be the current one")
    path = epath.Path(directory)
    if "://" not in str(path):  # pathlib would put the working directory before a URL
        path = path.expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a directory of checkpoints")
    if read_only and not path.exists():
        raise NoCheckpointError(f"no checkpoints: {path} does not exist")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        save_interval_steps=every,
        create=not read_only,
        read_only=read_only,
        save_root_metadata=False,
    )
    return Manager(path, options)
