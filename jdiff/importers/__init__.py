"""From foreign parameters to ours: names and layouts of arrays, and one file format."""

from jdiff.importers import flax_msgpack, score_sde, score_sde_pytorch

__all__ = ["flax_msgpack", "score_sde", "score_sde_pytorch"]
