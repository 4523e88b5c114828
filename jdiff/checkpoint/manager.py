"""What a directory of checkpoints is opened with, and what can be wrong with it."""

import contextlib
import operator

import jax
import orbax.checkpoint as ocp
from etils import epath

__all__ = [
    "DamagedCheckpointError",
    "DamagedCheckpointWarning",
    "Manager",
    "NoCheckpointError",
    "SaveError",
    "open_manager",
]


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

    def __init__(self, directory: epath.Path, options: ocp.CheckpointManagerOptions) -> None:
        super().__init__(directory, options=options)
        self.every: int = options.save_interval_steps
        self.read_only: bool = options.read_only
        self.trusted: set[int] = set()
        self.damaged: set[int] = set()
        self._given, self._left_over = options, False
        self._writing: int | None = None

    def write(self, step: int, args: ocp.args.Composite) -> None:
        """Begin to write a step; see `save`, which is the function to call."""
        if self._left_over:
            self.wait_until_finished()
            self._clear()
        try:
            self.save(step, args=args, force=True)
        except SaveError:
            raise
        except Exception as error:
            raise self._failed(step, error) from error
        self._writing = step

    def reached_preemption(self, step: int) -> bool:
        """Return False: when to stop is the caller's affair, and JAX's notice may be asked for by one of the two."""
        return False

    def wait_until_finished(self) -> None:
        """Block until the last save is on disk.

        Raises:
            SaveError: it could not be written. The next save may be tried as if nothing had happened.
        """
        try:
            super().wait_until_finished()
        except Exception as error:
            raise self._failed(self._writing, error) from error

    def _failed(self, step, error):
        """Forget a step that could not be written, and what was written of it."""
        self.trusted.discard(step)
        if jax.process_count() == 1:
            # Orbax raises the error of a background save at every later call: only a new manager writes again.
            with contextlib.suppress(Exception):
                self._checkpointer.close()
            with contextlib.suppress(OSError):  # a folder that cannot be read now may be at the next save
                super().__init__(self.directory, options=self._given)
            self._clear()
        text = " ".join(str(error).split()) or type(error).__name__
        return SaveError(f"step {step} could not be written to {self.directory}: {text[:400]}")

    def _clear(self):
        """Make room: remove what unfinished saves left; what their threads still write meanwhile, the next time."""
        self._left_over = False
        for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(OSError):
                left.rmtree(missing_ok=True)
            self._left_over = True  # looked at once more, however it went


def open_manager(directory: str, *, keep: int = 3, every: int = 1, read_only: bool = False) -> Manager:
    """Open a directory of checkpoints, one folder a step, and create it unless `read_only`.

    A save that was cut short leaves a folder `<step>.orbax-checkpoint-tmp`, which no step is ever restored from.

    Args:
        directory: local path or a URL that `etils.epath` knows.
        keep: how many steps stay; older ones are deleted after a newer one is complete.
        every: `save` does something at multiples of it only.
        read_only: for evaluation, next to a run that is writing: creates nothing, deletes nothing.

    Raises:
        ValueError: `keep` or `every` below 1.
        NoCheckpointError: `read_only` and there is no such directory.
        OSError: the directory cannot be created.
    """
    for name, value in {"keep": keep, "every": every}.items():
        if operator.index(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    path = epath.Path(directory).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a directory of checkpoints")
    if read_only and not path.exists():
        raise NoCheckpointError(f"no checkpoints: {path} does not exist")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        save_interval_steps=every,
        create=not read_only,
        read_only=read_only,
        # Else threads wait for minutes for folders that could not be made, and the process at its end for them.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    return Manager(path, options)
