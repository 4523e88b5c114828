"""What the tests of reliability share: processes of the scripts, waiting for them, and what a run has left."""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from experiments.artefacts import read_jsonl
from jdiff import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {
    "network.name": "mlp",
    "network.options": {"width": 16, "depth": 1},
    "training.steps": 60,
    "training.batch_size": 16,
    "training.log_every": 3,
    "training.validate_every": 30,
    "training.checkpoint_every": 6,
}


def start(place, run, *more, devices=1, program=None, **settings):
    """A process of a script, as from the command line; of training where no other program is named."""
    options = [f"--set={name}={json.dumps(value)}" for name, value in (SETTINGS | settings).items()]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "TFDS_DATA_DIR": str(place / "tfds"),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONUNBUFFERED": "1",
    }
    program = program or ["-m", "experiments.train", "--workdir", str(run)]
    command = [sys.executable, *program, "--config", "configs/smoke.py"]
    return subprocess.Popen(
        [*command, *options, *more], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, timeout=240):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def several(place, run, count, *more, devices=2, program=None, programs=None, **settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator={address}", f"--processes={count}", "--heartbeat=10"]
    return [
        start(place, run, *flags, f"--process={n}", *more, devices=devices, program=program, **settings)
        for n, program in enumerate(programs or [program] * count)
    ]


def finish_all(processes, timeout=240):
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:  # a pipe that nobody reads holds its process up
            return list(pool.map(lambda process: finish(process, timeout), processes))
    finally:
        for process in processes:
            process.kill()


def wait_for(process, done, timeout=120):
    """Wait until done() is true, or the process has ended."""
    end = time.monotonic() + timeout
    while process.poll() is None and not done():
        assert time.monotonic() < end, f"not done in {timeout} s"
        time.sleep(0.01)


def wait_for_step(process, run, step):
    """Wait until metrics.jsonl has a line of that step or a later one, or the process has ended."""
    wait_for(process, lambda: any(line["step"] >= step for line in read_jsonl(run / "metrics.jsonl")[-1:]))


def lines_of(run):
    """metrics.jsonl without its times."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_jsonl(run / "metrics.jsonl")]


def state_of(run, step=60):
    """All that the checkpoint of a step holds, as bits, by name, with the position in the data."""
    with checkpoint.open_manager(str(run / "checkpoints"), read_only=True) as manager:
        assert manager.latest_step() == step
        meta = json.loads((run / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return meta["items"]


def same_run(run, undisturbed):
    assert state_of(run) == state_of(undisturbed)
    assert lines_of(run) == lines_of(undisturbed)


FULL_FOR_A_WHILE = """
import resource, runpy, sys, threading, time
from experiments.artefacts import Run, read_jsonl

run, limit, sys.argv = Run(sys.argv[1]), int(sys.argv[2]), ["train", *sys.argv[3:], "--workdir", sys.argv[1]]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

def lift():
    while not any(line["step"] >= 42 for line in read_jsonl(run / "metrics.jsonl")):
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

threading.Thread(target=lift, daemon=True).start()
runpy.run_module("experiments.train", run_name="__main__")
"""
