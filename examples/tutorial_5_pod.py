"""From one device to a pod.

One training program, started on one device, on eight, and as several processes, gives the same numbers everywhere:
noise belongs to (key, step, position in the global batch), never to a device. This page runs it in all these ways on
one CPU, whose eight devices are simulated; on accelerators nothing changes but what `jax.devices()` returns.
"""

# %%
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jdiff
from jdiff import checkpoint, losses, nn, parallel, processes, solvers, times, training

# Eight devices of a CPU, simulated: on accelerators leave out these two lines.
jax.config.update("jax_platforms", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
parallel.start_processes()  # joins the others where the environment speaks of several processes; else does nothing

SMALL = "--small" in sys.argv  # seconds, for the tests
STEPS, BATCH = (4, 16) if SMALL else (60, 256)
PICTURES = pathlib.Path("docs/images/tutorials")
PICTURES.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The program
#
# A flow of spirals in the plane, with a network of 217,000 parameters. The loss is what it would be on one device:
# `keys` are one per example, `batch["key"]` is common to the step. A batch is made from its number alone, and each
# process makes the rows that its devices hold; every example says by `index` where it stands in the global batch.

# %%
process = jdiff.Rectified()
net = nn.ResidualMLP(lambda t: processes.log_snr(process, t), width=128, depth=3, dropout=0.0)
tx = training.adam(training.learning_rate(2e-3, warmup=10), clip=1.0)
KEY = jax.random.key(1)


def loss_fn(params, keys, batch):
    """One loss per example."""
    t, _ = times.stratified(batch["key"], process, batch["index"], BATCH)
    return losses.denoising(keys, nn.as_field(net, params), process, batch["x"], t, predict="velocity"), {}


def rows_of(n):
    """Return this process's rows of batch n."""
    rng = np.random.default_rng(n)
    turn = np.sqrt(rng.uniform(size=BATCH)) * 3 * np.pi
    x = np.stack([np.cos(turn), np.sin(turn)], axis=1) * turn[:, None] / 6 + 0.05 * rng.normal(size=(BATCH, 2))
    mine = np.arange(BATCH)[jax.process_index() :: jax.process_count()]
    return {"x": x[mine].astype(np.float32), "index": mine}


def new_state():
    """Return the state before the first step."""
    return training.init_state(net.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.ones(1))["params"], tx)


def train(mesh, state, places, steps, how="jit"):
    """Take the given steps; return the state and the loss of each step."""
    step = parallel.data_parallel(loss_fn, tx, mesh, how, ema_decay=0.99, sharding=places)
    found = []
    for n in steps:
        state, metrics = step(state, KEY, parallel.shard_batch(rows_of(n), mesh))
        found.append(float(metrics["loss"]))  # waits for the step, as several processes on CPUs must
    return state, found


def whole(mesh, how="jit"):
    """Train with a copy of the state on every device of the mesh."""
    return train(mesh, parallel.replicate(new_state(), mesh), None, range(STEPS), how)


# %% [markdown]
# This file, started as one of several processes, says its losses and ends here; the last section starts it so.

# %%
if jax.process_count() > 1:
    _, found = whole(parallel.data_mesh())
    print(json.dumps(found))
    sys.exit()

# %% [markdown]
# ## One device, eight devices, three mappings
#
# A mesh is which devices take part. `data_parallel` puts the one step on it: by `jit` (XLA decides on the
# communication), `shard_map` (the step does) or `pmap` (for code that is built on it).

# %%
devices = jax.devices()
state, reference = whole(parallel.data_mesh(devices[:1]))
curves = {"1 device, jit": reference}
print(f"{'1 device, jit':34} last loss {reference[-1]:.6f}")


def compare(name, found):
    """Say how far the losses are from those of one device."""
    curves[name] = found
    print(f"{name:34} last loss {found[-1]:.6f}, largest difference {np.abs(np.subtract(found, reference)).max():.1e}")


for count, how in ((2, "jit"), (8, "jit"), (8, "shard_map"), (8, "pmap")):
    compare(f"{count} devices, {how}", whole(parallel.data_mesh(devices[:count]), how)[1])

# %% [markdown]
# The differences are those of float32 sums in another order, which training makes larger from step to step. A sampler
# needs nothing but keys that lie on the devices: sample `i` depends on key `i`, so that eight devices draw what one
# draws.


# %%
@jax.jit
def draw(params, keys):
    """Return one sample per key."""
    flow = jdiff.probability_flow(process, nn.as_field(net, params), predict="velocity")
    return jdiff.sample(keys, process, solvers.heun(flow), (*keys.shape, 2), times.linear(process, 20))


keys = jax.random.split(jax.random.key(2), 512)
mesh = parallel.data_mesh()
alone = draw(state.ema, keys)
spread = draw(parallel.replicate(state.ema, mesh), parallel.shard_batch(keys, mesh))
difference = np.abs(np.subtract(spread, alone)).max()
print(f"samples on {len(spread.sharding.device_set)} devices, largest difference from one: {difference:.1e}")

# %% [markdown]
# ## A state in parts
#
# A large network does not fit as a whole copy on every device. `data_mesh(fsdp=4)` makes groups of four devices that
# share one copy: parameters, average and the optimiser's moments are split, and each step gathers what it needs.

# %%
mesh = parallel.data_mesh(fsdp=4)
shapes = jax.eval_shape(new_state)
places = parallel.state_sharding(shapes, mesh)
start = jax.jit(new_state, out_shardings=places)()
held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(start))
total = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
print(f"the state is {total / 2**20:.2f} MiB, of which a device holds {held / 2**20:.2f}")
half, found = train(mesh, start, places, range(STEPS // 2))

# %% [markdown]
# ## Another mesh in the middle of the run
#
# The job is cut off after half of its steps, and goes on where fewer devices are free. A checkpoint does not know
# what mesh it was saved from: `restore` is told where each array goes, and compares every array's digest with the one
# taken before it was saved.

# %%
with tempfile.TemporaryDirectory() as folder:
    with checkpoint.open_manager(folder) as manager:
        checkpoint.save(manager, STEPS // 2, half._asdict())
    smaller = parallel.data_mesh(devices[:2], fsdp=2)
    new_places = parallel.state_sharding(shapes, smaller)
    with checkpoint.open_manager(folder) as manager:
        restored = checkpoint.restore(manager, shapes._asdict(), new_places._asdict())
resumed, rest = train(smaller, training.TrainState(**restored), new_places, range(STEPS // 2, STEPS))
compare("8 devices in fours, then 2", found + rest)

# %% [markdown]
# ## Several processes
#
# A pod is several machines, each with a process of its own that sees its own devices. They find each other by three
# variables (or by SLURM, Open MPI, the TPU's metadata: `docs/pods.md`), and then the program above runs unchanged:
# the mesh holds the devices of all.

# %%
with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
started = []
for index in range(2):
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, os.path.abspath(__file__), *(["--small"] if SMALL else [])]
    started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | joined | flags))
for index, process_of in enumerate(started):
    said = process_of.communicate(timeout=240)[0]
    compare(f"2 processes of 4 devices, process {index}", json.loads(said.splitlines()[-1]))

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
for name, found in curves.items():
    left.plot(found, label=name)
    if name != "1 device, jit":
        middle.semilogy(np.abs(np.subtract(found, reference)) + 1e-9, ".", ms=3)
left.set(title="loss of all runs", xlabel="step")
middle.set(title="difference from one device", xlabel="step")
kernel = half.params["block_0_film"]["kernel"]
owner = np.zeros(kernel.shape)
for shard in kernel.addressable_shards:
    owner[shard.index] = shard.device.id % 4
right.imshow(owner, cmap=plt.get_cmap("tab10", 4), aspect="auto", interpolation="nearest")
right.set(title="a kernel in four parts", xticks=[], yticks=[])
figure.savefig(PICTURES / "pod.png", dpi=80)

# %% [markdown]
# ![Losses of all runs, their differences, and a kernel in parts](../images/tutorials/pod.png)
#
# Left, eight curves that lie on each other; in the middle their distances from the first (1e-9 is drawn for none);
# right, which device of a group holds which columns of a layer.
#
# ## The pod's command line
#
# `experiments.train` is this program with configurations, data, checkpoints and restarts. On a TPU pod slice every
# worker runs
#
# ```bash
# python -m experiments.train --detect --config configs/subvp/cifar10_ddpmpp_continuous.py --workdir gs://BUCKET/runs/cifar10
# ```
#
# and under SLURM the same, after `srun` and without `--detect`. [Pods](../pods.md) has the scripts and says what was
# tried without a pod at hand; [many devices](../parallel.md) has the functions of this page one by one;
# [reliability](../reliability.md) says what survives what.
