"""From foreign parameters to ours: pure functions of arrays, no files, no pickles."""

from jdiff.importers import score_sde

__all__ = ["score_sde"]
