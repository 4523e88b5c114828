"""Several processes of one run: from flags, the environment or the cluster."""

import os

import jax

from jdiff._array import check_count

__all__ = ["start_processes"]


def start_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    *,
    detect: bool = False,
    timeout: int = 300,
    heartbeat: int = 100,
) -> None:
    """Join this process to the others of the run; with one process, do nothing. Call it before anything else of JAX.

    The flags win. A flag not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; failing
    these, where SLURM (inside `srun`), Open MPI or a TPU worker list announces several processes,
    `jax.distributed.initialize` finds out the rest. A Cloud TPU VM announces itself by its metadata server only: pass
    `detect=True` there.

    From then on JAX catches SIGTERM as a notice of pre-emption: it does not end the process any more.

    Args:
        coordinator: "host:port" of process 0, the same for all.
        processes: how many there are.
        index: which of them this is, 0 <= index < processes.
        detect: always ask JAX's cluster detection for what is missing.
        timeout: seconds to wait for the others.
        heartbeat: seconds of silence after which a process counts as dead, and the others abort.

    Raises:
        ValueError: flags that are incomplete or contradict each other, a number out of range.
        TypeError: a number that is no integer, a coordinator that is no string.
        RuntimeError: JAX has been used already.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    processes = _integer("JAX_NUM_PROCESSES") if processes is None else processes
    index = _integer("JAX_PROCESS_ID") if index is None else index
    detect = detect or _announced() > 1
    given = {"coordinator": coordinator, "processes": processes, "index": index}
    if not isinstance(coordinator, str | None):
        raise TypeError(f"coordinator must be 'host:port', got {coordinator!r}")
    check_count(timeout, "timeout")
    check_count(heartbeat, "heartbeat")
    if processes is not None:
        check_count(processes, "processes")
    if index is not None:
        check_count(index, "index", 0)
    if index is not None and processes is not None and index >= processes:
        raise ValueError(f"index must lie in [0, processes), got index={index}, processes={processes}")
    if processes == 1 or (not detect and all(value is None for value in given.values())):
        return
    if not detect and (missing := [name for name, value in given.items() if value is None]):
        raise ValueError(f"{', '.join(missing)} missing: {given}, and no SLURM, Open MPI or TPU environment to ask")
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=index,
        cluster_detection_method=None if detect else "deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=heartbeat,  # one that fails waits no longer for the others to end as well
    )


def _integer(name):
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return None if value is None else int(value)


def _announced():
    """How many processes the launcher's environment speaks of; 1 where it speaks of none."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        return _integer("SLURM_NTASKS") or 1
    if "OMPI_COMM_WORLD_SIZE" in env:
        return _integer("OMPI_COMM_WORLD_SIZE")
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    return len(workers.split(","))
