"""Several processes: how they are started, and that two of them give the result of one."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from parallel_cases import reference

from jdiff import parallel, training

SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
FLAGS = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    ("env", "arguments", "expected"),
    [
        ({}, {}, None),
        ({}, {"processes": 1}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, {}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),
        ({}, {"coordinator": "h:1", "processes": 2, "index": 1}, ("h:1", 2, 1, "deactivate")),
        (FLAGS, {}, ("h:1", 2, 0, "deactivate")),
        (FLAGS, {"index": 1}, ("h:1", 2, 1, "deactivate")),
        (SLURM, {}, (None, None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}, (None, None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, (None, None, None, None)),
        ({}, {"detect": True}, (None, None, None, None)),
        ({}, {"coordinator": "h:1"}, "processes, index missing"),
        ({}, {"coordinator": "h:1", "processes": 2, "index": 2}, r"index must lie in \[0, processes\)"),
        ({}, {"processes": 0}, "at least 1"),
        ({**FLAGS, "JAX_PROCESS_ID": "x"}, {}, "JAX_PROCESS_ID must be an integer, got 'x'"),
    ],
)
def test_start_processes(monkeypatch, env, arguments, expected):
    for name in (*SLURM, *FLAGS, "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            parallel.start_processes(**arguments)
        assert calls == []
        return
    parallel.start_processes(**arguments, timeout=9, heartbeat=8)
    names = ("coordinator_address", "num_processes", "process_id", "cluster_detection_method")
    assert [tuple(call[name] for name in names) for call in calls] == ([] if expected is None else [expected])
    assert all((call["initialization_timeout"], call["heartbeat_timeout_seconds"]) == (9, 8) for call in calls)


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from jdiff import checkpoint, parallel, training
parallel.start_processes(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
import numpy as np
sys.path.insert(0, sys.argv[4])
import parallel_cases as this

tx = this.TRANSFORMS["sgd"][0]
mesh = parallel.data_mesh()
assert mesh.size == 4 and jax.process_count() == 2
state = parallel.replicate(training.init_state(this.start(), tx), mesh)
step = parallel.data_parallel(this.loss_fn, tx, mesh, sys.argv[5], ema_decay=0.99)
manager = checkpoint.open_manager(sys.argv[3], keep=2, every=1)
mine = slice(jax.process_index(), None, 2)  # every other example of the global batch, as a sharded input pipeline reads
for n, batch in enumerate(this.batches()):
    batch = parallel.shard_batch({name: leaf[mine] for name, leaf in batch.items()}, mesh)
    state, metrics = jax.block_until_ready(step(state, this.KEY, batch))
    if n == 1:
        checkpoint.save(manager, n + 1, {**state._asdict(), "data": {"next": n + 1}})
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        restored = checkpoint.restore(manager, {**state._asdict(), "data": None}, whole)
        assert restored.pop("data") == {"next": 2}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), training.TrainState(**restored), state)
        state = training.TrainState(**restored)
try:
    checkpoint.save(manager, 9, {"data": jax.process_index()})
    raise SystemExit("different data in two processes were accepted")
except ValueError as error:
    assert "same in every process" in str(error), error
checkpoint.save(manager, n + 1, state._asdict())
manager.close()
print("loss", float(metrics["loss"]))
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_two_processes(tmp_path, how):
    """Two processes of two devices train, save, restore and save; this process restores on its own eight."""
    from jdiff import checkpoint

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    here = pathlib.Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": str(here.parent), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROCESS, address]
    arguments = [str(tmp_path / "steps"), str(here), how]
    processes = [
        subprocess.Popen(
            [*command, str(n), *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()  # SIGTERM is a notice of pre-emption to jax.distributed
    assert [process.returncode for process in processes] == [0, 0], outputs
    state, metrics = reference("sgd")
    for out, _ in outputs:
        np.testing.assert_allclose(float(out.split("loss ")[1].split()[0]), metrics[-1]["loss"], rtol=1e-6)
    with checkpoint.open_manager(tmp_path / "steps", read_only=True) as manager:
        restored = training.TrainState(**checkpoint.restore(manager, state._asdict()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), restored, state)
