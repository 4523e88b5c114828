"""Data parallelism: a mesh, where arrays live on it, one training step under three mappings, and several processes."""

from jdiff.parallel.placement import data_mesh, place, replicate, shard_batch, state_sharding
from jdiff.parallel.processes import start_processes
from jdiff.parallel.steps import data_parallel

__all__ = ["data_mesh", "data_parallel", "place", "replicate", "shard_batch", "start_processes", "state_sharding"]
