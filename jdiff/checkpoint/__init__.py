"""Checkpoints that are what was saved, or an error: Orbax, with a digest of every array that is checked at restore."""

from jdiff.checkpoint.manager import (
    DamagedCheckpointError,
    DamagedCheckpointWarning,
    Manager,
    NoCheckpointError,
    SaveError,
    open_manager,
)
from jdiff.checkpoint.store import restore, save

__all__ = [
    "DamagedCheckpointError",
    "DamagedCheckpointWarning",
    "Manager",
    "NoCheckpointError",
    "SaveError",
    "open_manager",
    "restore",
    "save",
]
