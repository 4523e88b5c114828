"""Nothing lost: kills, signals, full disks, damage, two owners, remote folders: what docs/reliability.md promises."""

import concurrent.futures
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend
from jax.experimental import multihost_utils

from experiments import lock, pictures, records
from experiments.artefacts import Metrics, Run, read_json, read_jsonl
from experiments.processes import together
from jdiff import checkpoint, parallel, training

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


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    """A folder with the compiled programs that every process of these tests shares."""
    return tmp_path_factory.mktemp("reliability")


def start(place, run, *more, devices=1, program=None, **settings):
    """A process of a script, as from the command line; of training where no other program is named."""
    options = [f"--set={name}={json.dumps(value)}" for name, value in (SETTINGS | settings).items()]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
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


def wait_for_step(process, run, step, timeout=120):
    """Wait until metrics.jsonl has a line of that step or a later one, or the process has ended."""
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        lines = read_jsonl(run / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.01)
    assert process.poll() is not None or time.monotonic() < end, f"no step {step} in {timeout} s"


def lines_of(run):
    """metrics.jsonl without its times."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_jsonl(run / "metrics.jsonl")]


def state_of(run, step=60):
    """All that the checkpoint of a step holds, as bits, by name, with the position in the data."""
    with checkpoint.open_manager(str(run / "checkpoints"), read_only=True) as manager:
        assert manager.latest_step() == step
        meta = json.loads((run / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return meta["items"]


@pytest.fixture(scope="module")
def undisturbed(place):
    """The run that every disturbed one must equal."""
    run = Run(str(place / "undisturbed"))
    code, out = finish(start(place, run.path))
    assert code == 0, out
    return run


def same_run(run, undisturbed):
    assert state_of(run) == state_of(undisturbed)
    assert lines_of(run) == lines_of(undisturbed)


def killed_at_random(place, run, kills, rng):
    """Kill a run with SIGKILL at random moments, also while it saves, until so many kills hit; then let it end."""
    hits, inside_a_save = 0, 0
    while hits < kills:
        process = start(place, run.path)
        lines = read_jsonl(run / "metrics.jsonl")
        first = lines[-1]["step"] if lines else 0
        wait_for_step(process, run, first + 3 if hits % 2 else first + 6)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hits += 1
        assert process.wait() in (0, -signal.SIGKILL)
        process.stdout.close()
        inside_a_save += any("tmp" in path.name for path in (run / "checkpoints").iterdir())
        steps = [line["step"] for line in read_jsonl(run / "metrics.jsonl")]
        if steps and steps[-1] >= 54 and hits < kills:  # nearly done: begin again, and keep on killing
            shutil.rmtree(run.path)
    code, out = finish(start(place, run.path))
    assert code == 0, out
    return inside_a_save


def test_killed_it_is_the_same_run(place, undisturbed, tmp_path):
    run = Run(str(tmp_path / "run"))
    killed_at_random(place, run, 1, np.random.default_rng(0))
    same_run(run, undisturbed)


@pytest.mark.slow
def test_killed_thirty_times_it_is_the_same_run(place, undisturbed, tmp_path):
    run = Run(str(tmp_path / "run"))
    inside = killed_at_random(place, run, 30, np.random.default_rng(1))
    same_run(run, undisturbed)
    assert inside > 0


@pytest.mark.slow_but("143")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(place, undisturbed, tmp_path, number, code):
    run = Run(str(tmp_path / "run"))
    process = start(place, run.path)
    wait_for_step(process, run, 12)
    process.send_signal(number)
    asked = time.monotonic()
    returned, out = finish(process)
    assert returned == code and time.monotonic() - asked < 20
    step = int(re.search(r"interrupted: step (\d+) is saved", out)[1])
    assert 12 <= step < 60 and not (run / lock.NAME).exists()
    assert state_of(run, step)
    returned, out = finish(start(place, run.path))
    assert returned == 0
    assert state_of(run) == state_of(undisturbed)
    ours, expected = ({line["step"]: line for line in lines_of(r)} for r in (run, undisturbed))
    assert ours.keys() - {step} == expected.keys() - {step}


def test_a_damaged_newest_checkpoint(place, undisturbed, tmp_path):
    """Passed over with a word, or refused; the end is the same."""
    run = Run(str(tmp_path / "run"))
    shutil.copytree(undisturbed.path, run.path)
    shutil.rmtree(run / "checkpoints" / "60")
    for file in pathlib.Path(run / "checkpoints" / "54" / "params" / "ocdbt.process_0" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[::64] = bytes(byte ^ 1 for byte in content[::64])  # one alone may lie in what the writer had replaced
        file.write_bytes(content)
    code, out = finish(start(place, run.path, "--resume=strict"))
    assert code == 3 and re.search(r"DamagedCheckpointError: step 54 is damaged: .*params", out), out
    code, out = finish(start(place, run.path))
    assert code == 0 and re.search(r"step 54 is damaged: .*params.*restored step 48 instead", out, re.DOTALL), out
    same_run(run, undisturbed)


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


def test_a_disk_that_is_full_for_a_while(place, undisturbed, tmp_path):
    """A limit on the size of files stands for it: saves fail, are reported, and succeed when there is room again."""
    run = Run(str(tmp_path / "run"))
    process = start(place, run.path, program=["-c", FULL_FOR_A_WHILE, str(run.path), "6000"])
    code, out = finish(process)
    assert code == 0, out
    assert re.search(r"step 6 could not be written to .*checkpoints: .*; tried again at the next save", out), out
    assert not list((run / "checkpoints").glob("*tmp*"))
    assert state_of(run) == state_of(undisturbed) and lines_of(run) == lines_of(undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_stays_full(place, undisturbed, tmp_path):
    """On a tmpfs: the run goes on to its end, says that the last step is not saved, and the last good one is there."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        run = Run(str(tmp_path / "run"))
        (tmp_path / "fill").write_bytes(bytes(1_150_000))
        code, out = finish(start(place, run.path))
        assert code == 2 and re.search(r"SaveError: step 60 could not be written", out), out
        assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == list(range(3, 61, 3))
        (tmp_path / "fill").unlink()
        code, out = finish(start(place, run.path))
        assert code == 0, out
        assert state_of(run) == state_of(undisturbed)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_is_read_only_for_a_while(tmp_path, monkeypatch):
    """No folder can be made: each save says so and leaves what is there; the first one afterwards succeeds."""
    closed, mkdir = [False], os.mkdir

    def making(path, *args, **options):
        if closed[0] and str(tmp_path) in os.fspath(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
        return mkdir(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", making)
    before = set(threading.enumerate())
    values = {"params": {"a": jnp.arange(8.0)}}
    with checkpoint.open_manager(str(tmp_path / "steps")) as manager:

        def attempt(step):
            checkpoint.save(manager, step, jax.tree.map(lambda leaf: leaf + step, values))
            manager.wait_until_finished()

        attempt(1)
        closed[0] = True
        for step in (2, 3):
            with pytest.raises(checkpoint.SaveError, match=f"step {step} could not be written .*Read-only file system"):
                attempt(step)
            np.testing.assert_array_equal(checkpoint.restore(manager, values)["params"]["a"], np.arange(8.0) + 1)
        # Threads that still wait for the folders would keep the process at its end for ten minutes.
        end = time.monotonic() + 5
        waiting = lambda: [t.name for t in threading.enumerate() if t not in before and not t.daemon]
        while waiting() and time.monotonic() < end:
            time.sleep(0.05)
        assert not waiting()
        closed[0] = False
        attempt(4)
        np.testing.assert_array_equal(checkpoint.restore(manager, values)["params"]["a"], np.arange(8.0) + 4)
        assert list(manager.all_steps()) == [1, 4]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("again", [True, False])
def test_a_run_whose_folder_becomes_read_only(place, undisturbed, tmp_path, again):
    """Writable again, the run saves and is the undisturbed one; else it ends with code 2, and a restart goes on."""
    run = Run(str(tmp_path / "run"))
    folder = str(run.path)
    process = start(place, run.path)
    wait_for_step(process, run, 12)
    process.send_signal(signal.SIGSTOP)
    # Over itself: files that are open, as those of TensorBoard, would forbid to remount a file system.
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        process.kill()
        process.communicate()
        pytest.skip("may not mount")
    closed, said = True, ""
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        process.send_signal(signal.SIGCONT)
        for line in process.stdout:
            said += line
            if again and closed and said.count("tried again at the next save") == 2:
                subprocess.run(["umount", folder], check=True)
                closed = False
        assert process.wait(timeout=30) == (0 if again else 2), said
    finally:
        process.kill()
        process.stdout.close()
        if closed:
            subprocess.run(["umount", folder], check=True)
    assert re.search(r"could not be written to .*checkpoints: .*Read-only file system.*tried again", said), said
    if not again:
        assert "SaveError: step 60 could not be written" in said
        code, out = finish(start(place, run.path))
        assert code == 0, out
    same_run(run, undisturbed)


# One owner -----------------------------------------------------------------------------------------------------------


def owner(run, **values):
    known = {"host": socket.gethostname(), "machine": lock._machine(), "process": 1, "identity": "other"}
    known["renewed"] = time.time()
    run.write_json(lock.NAME, known | values)


def test_one_owner_a_folder(tmp_path):
    run = Run(str(tmp_path))
    owner(run)  # process 1 is always there
    with pytest.raises(RuntimeError, match=r"written by process 1 on .*there 0 s ago.*another --workdir.*lock.json"):
        lock.Lock(run).__enter__()
    owner(run, host="elsewhere", machine="another", process=os.getpid())
    with pytest.raises(lock.LockedError, match=f"process {os.getpid()} on elsewhere"):
        lock.Lock(run).__enter__()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for values in (
        {"machine": "another", "renewed": time.time() - 61},
        {"process": gone.pid},
        {"process": os.getpid()},  # of a container that was started again
        {"renewed": "soon"},
    ):
        owner(run, **values)
        with lock.Lock(run) as held:
            assert read_json(run / lock.NAME)["process"] == os.getpid()
            held.check()
        assert not (run / lock.NAME).exists()
    run.write(lock.NAME, '{"host": "a')  # cut short
    with lock.Lock(run) as held:
        owner(run, host="elsewhere", machine="another")  # taken over while this one slept
        with pytest.raises(RuntimeError, match="on elsewhere"):
            held.check()
    assert read_json(run / lock.NAME)["host"] == "elsewhere"


@pytest.mark.slow
def test_a_second_owner_stops_all_processes(place, tmp_path):
    run = Run(str(tmp_path))
    owner(run)
    results = finish_all(several(place, run.path, 2), timeout=60)
    assert [code for code, _ in results] == [3, 2], results
    assert "LockedError" in results[0][1] and "failed in process 0, which says why" in results[1][1]


def test_the_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.02)
    with lock.Lock(Run(str(tmp_path))):
        first = read_json(tmp_path / lock.NAME)["renewed"]
        end = time.monotonic() + 10
        while read_json(tmp_path / lock.NAME)["renewed"] == first and time.monotonic() < end:
            time.sleep(0.02)
        assert read_json(tmp_path / lock.NAME)["renewed"] > first


@pytest.mark.slow
def test_a_second_training_is_refused(place, tmp_path):
    run = Run(str(tmp_path / "run"))
    short = {"training.steps": 12, "training.validate_every": 12}
    first = start(place, run.path, **short)
    wait_for_step(first, run, 3)
    first.send_signal(signal.SIGSTOP)  # alive, but never finished before the second has looked
    try:
        code, out = finish(start(place, run.path, **short))
        assert code == 3 and f"LockedError: {run.path} is being written by process {first.pid}" in out, out
    finally:
        first.send_signal(signal.SIGCONT)
    code, out = finish(first)
    assert code == 0, out


# Remote folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """gs:// in memory."""
    memory = fsspec.filesystem("memory", skip_instance_cache=True)

    class InMemory(backend._FileSystemSpecBackend):
        def fs(self, path):
            return memory

    stripped = lambda path: str(path).removeprefix("gs:/")
    for name in ("open", "exists", "isdir", "listdir", "makedirs", "mkdir", "rmtree", "remove"):
        method = getattr(InMemory, name)
        monkeypatch.setattr(
            InMemory, name, lambda self, path, *a, m=method, **k: m(self, stripped(path), *a, **k), raising=False
        )
    glob = lambda self, path: [f"gs:/{found}" for found in memory.glob(stripped(path))]
    monkeypatch.setattr(InMemory, "glob", glob, raising=False)
    from etils.epath import gpath

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", InMemory())
    yield memory
    memory.store.clear()


def test_a_folder_in_a_bucket(bucket, tmp_path):
    """What the scripts do with a run folder they do alike on gs:// and on a disk."""
    from configs import smoke

    config = smoke.get_config()
    for run in (Run("gs://bucket/runs/a"), Run(str(tmp_path / "a"))):
        run.open(config)
        run.open(config)
        assert run.config()["data"]["name"] == "digits"
        with lock.Lock(run):
            assert read_json(run / lock.NAME)["process"] == os.getpid()
        assert not (run / lock.NAME).exists()
        metrics = Metrics(run, 0)
        metrics.write(1, {"loss": 2.0})
        metrics.write(2, {"loss": 1.0})
        metrics.close()
        metrics = Metrics(run, 1)  # resumed from step 1
        metrics.write(2, {"loss": 1.5})
        metrics.close()
        assert [(line["step"], line["loss"]) for line in read_jsonl(run / "metrics.jsonl")] == [(1, 2.0), (2, 1.5)]
        pairs = [(i, 0) for i in range(6)]
        for k in (0, 1):
            files = records.Records(run, "likelihood_test", {"a": 1}, (k, 2))
            write = files.writer()
            for i, d in files.share(pairs):
                write([{"index": i, "draw": d, "bits_per_dim": float(i)}])
        assert sorted(records.Records(run, "likelihood_test", {"a": 1}).read()) == pairs
        pictures.grid(run / "samples.png", np.zeros((2, 4, 4, 1), np.int32), 17)
        pictures.loss_curve(run / "loss.png", read_jsonl(run / "metrics.jsonl"))
        assert (run / "loss.png").read_bytes()[:4] == (run / "samples.png").read_bytes()[:4] == b"\x89PNG"
    assert any("bucket/runs/a/config.json" in name for name in bucket.store)


def test_metrics_that_cannot_be_written_wait(tmp_path, monkeypatch, capsys):
    run = Run(str(tmp_path))
    metrics, append, fail = Metrics(run, 0), Run.append, [False, True, True, False]

    def appending(self, name, text):
        if fail.pop(0):
            raise OSError(28, "No space left on device")
        append(self, name, text)

    monkeypatch.setattr(Run, "append", appending)
    for step in range(1, 5):
        metrics.write(step, {"loss": float(step)})
    metrics.close()
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "step 3 could not be written and waits: [Errno 28]" in capsys.readouterr().err


def test_tensorboard_that_has_died_does_not_block(tmp_path):
    metrics = Metrics(Run(str(tmp_path)), 0)
    writer = metrics._board.file_writer.event_writer
    writer._worker.stop()
    writer._worker.join()
    for step in range(1, 50):  # more than its queue holds
        metrics.write(step, {"loss": 1.0})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 49


# Other devices -------------------------------------------------------------------------------------------------------


def test_a_state_moves_between_meshes(tmp_path):
    """8 devices sharing a state, 4 in two groups, 1, 8 whole: the same bits each time; the average alone as well."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in {"a": (8, 24), "b": (16,)}.items()}
    tx = training.adam(1e-3)
    state = training.init_state(jax.tree.map(jnp.asarray, params), tx)
    expected = jax.tree.map(np.asarray, state)
    for n, (devices, fsdp) in enumerate([(8, 8), (4, 2), (1, 1), (8, 1), (8, 4)]):
        mesh = parallel.data_mesh(jax.devices()[:devices], fsdp=fsdp)
        sharding = parallel.state_sharding(state, mesh, min_size=1)
        folder = str(tmp_path / "steps")
        with checkpoint.open_manager(folder) as manager:
            if n:
                like = jax.eval_shape(lambda: expected)._asdict()
                del like["step"]
                state = training.TrainState(**checkpoint.restore(manager, like, sharding._asdict()))
                state = state._replace(step=jnp.asarray(n + 1, jnp.int32))
            else:
                state = parallel.place(state, sharding)._replace(step=jnp.asarray(1, jnp.int32))
            checkpoint.save(manager, n + 1, state._asdict())
        assert state.params["a"].sharding.shard_shape((8, 24)) == (8, 24 // fsdp)
        for name in ("params", "ema", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(expected, name))
    with checkpoint.open_manager(folder, read_only=True) as manager:
        shutil.rmtree(tmp_path / "steps" / "5" / "opt_state")  # it is not read
        average = checkpoint.restore(manager, {"ema": jax.eval_shape(lambda: expected.ema)})["ema"]
    jax.tree.map(np.testing.assert_array_equal, average, expected.ema)


# Several processes ---------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize(("count", "fsdp"), [(2, 1), (4, 1), (2, 2)])
def test_several_processes_are_one_run(place, undisturbed, tmp_path, count, fsdp):
    """Two and four processes of two devices train what one trains; one is told to stop, all do, and go on."""
    run = Run(str(tmp_path / "run"))
    sharding = {"training.sharding.fsdp": fsdp, "training.sharding.min_size": 1}
    processes = several(place, run.path, count, **sharding)
    wait_for_step(processes[0], run, 12)
    processes[-1].send_signal(signal.SIGTERM)
    results = finish_all(processes)
    assert [code for code, _ in results] == [143] * count, results
    assert ["is saved" in out for _, out in results] == [True] + [False] * (count - 1)
    step = int(re.search(r"step (\d+) is saved", results[0][1])[1])
    assert 12 <= step < 60 and (run / "checkpoints" / str(step)).exists()
    # Again, with several steps a call and the notice before the first: all hear of it at the first call.
    early = several(place, run.path, count, **sharding, **{"training.steps_per_call": 5})
    time.sleep(6)
    early[0].send_signal(signal.SIGTERM)
    results = finish_all(early)
    assert {code for code, _ in results} <= {143, -signal.SIGTERM, 0}, results  # before JAX listens it just ends
    results = finish_all(several(place, run.path, count, **sharding))
    assert [code for code, _ in results] == [0] * count, results
    ours, expected = ({line["step"]: line for line in lines_of(r)} for r in (run, undisturbed))
    for step in (30, 60):
        for name in ("loss", "validation_loss", "grad_norm"):
            assert ours[step][name] == pytest.approx(expected[step][name], rel=1e-4)


@pytest.mark.slow
def test_two_processes_sample_and_evaluate_what_one_does(place, undisturbed, tmp_path):
    """Samples and bits/dim of two processes of two devices are those of one process."""
    found = {}
    settings = {"sampling.number": 40, "sampling.batch_size": 8, "likelihood.images": 32, "likelihood.batch_size": 8}
    for count in (1, 2):
        run = Run(str(tmp_path / f"{count}"))
        shutil.copytree(undisturbed.path, run.path)
        for script in ("sample", "likelihood"):
            program = ["-m", f"experiments.{script}", "--workdir", str(run.path)]
            results = finish_all(several(place, run.path, count, program=program, **settings))
            assert [code for code, _ in results] == [0] * count, results
            assert ["samples by" in out or "bits/dim" in out for _, out in results] == [True] + [False] * (count - 1)
        with np.load(run / "samples_dpmpp_2m.npz", allow_pickle=False) as images:
            found[count] = images["images"], read_json(run / "likelihood_test.json")["bits_per_dim"]
    assert np.abs(found[1][0].astype(int) - found[2][0]).max() <= 1
    assert (found[1][0] != found[2][0]).mean() < 0.01
    assert found[2][1] == pytest.approx(found[1][1], abs=1e-5)


@pytest.mark.slow
def test_a_process_that_dies_stops_the_others(place, tmp_path):
    run = Run(str(tmp_path / "run"))
    settings = {"training.steps": 100_000}
    processes = several(place, run.path, 2, **settings)
    wait_for_step(processes[0], run, 12)
    processes[1].kill()
    killed = time.monotonic()
    code, out = finish(processes[0], timeout=60)
    assert code != 0 and time.monotonic() - killed < 40
    assert re.search(r"heartbeat|another task died|Gloo|connection|peer", out, re.IGNORECASE), out
    processes[1].communicate()
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    processes = several(place, run.path, 2, **settings)
    wait_for_step(processes[0], run, saved + 3)
    for process in processes:
        process.kill()
        process.communicate()
    assert min(line["step"] for line in read_jsonl(run / "metrics.jsonl")) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("full", "limit"), [(0, 6000), (1, 1000)])
def test_one_disk_of_two_is_full_for_a_while(place, tmp_path, full, limit):
    """Both agree that a step was not written, say so and go on; the first that can be is, and the end is the same."""
    settings = {
        "training.sharding.fsdp": 4,  # so that both have something to write
        "training.sharding.min_size": 1,
        "network.options": {"width": 32, "depth": 1},
    }
    runs = [Run(str(tmp_path / name)) for name in ("whole", "full")]
    for run in runs:
        programs = [None, None]
        if run is runs[1]:
            programs[full] = ["-c", FULL_FOR_A_WHILE, str(run.path), str(limit)]
        results = finish_all(several(place, run.path, 2, programs=programs, **settings))
        assert [code for code, _ in results] == [0, 0], results
    failed, other = results[full][1], results[1 - full][1]
    said = r"step 6 could not be written to .*{}.*; tried again at the next save"
    assert re.search(said.format("Error writing"), failed), failed
    assert re.search(said.format("failed in .*process.*, which says why"), other), other
    reported = [re.findall(r"step (\d+) could not be written", out) for out in (failed, other)]
    assert reported[0] == reported[1] and len(reported[0]) >= 3, reported
    assert not list((runs[1] / "checkpoints").glob("*tmp*"))
    assert state_of(runs[1]) == state_of(runs[0]) and lines_of(runs[1]) == lines_of(runs[0])


@pytest.mark.slow
def test_sampling_that_loses_a_process(place, undisturbed, tmp_path):
    """One of two is killed: the other ends and says so; one process makes the batches that are missing, no others."""
    settings = {"sampling.number": 3200, "sampling.batch_size": 8}
    runs = [Run(str(tmp_path / name)) for name in ("alone", "broken")]
    for run in runs:
        shutil.copytree(undisturbed.path, run.path)
    alone, run = runs
    program = lambda run: ["-m", "experiments.sample", "--workdir", str(run.path)]
    done = lambda: sorted(run.path.glob("samples_*.parts/*.npz"))
    processes = several(place, run.path, 2, program=program(run), **settings)
    while sum(int(file.stem) % 2 for file in done()) < 20 and processes[1].poll() is None:
        time.sleep(0.01)
    processes[1].kill()
    killed = time.monotonic()
    code, out = finish(processes[0], timeout=60)
    processes[1].communicate()
    assert code != 0 and time.monotonic() - killed < 40
    assert re.search(r"heartbeat|another task died|Gloo|connection|peer", out, re.IGNORECASE), out
    kept = done()
    assert 220 <= len(kept) < 400  # all of process 0, some of process 1
    marked = [int(kept[n].stem) for n in (0, -1)]
    for n in marked:  # what is there is taken as it is
        np.savez(run / f"{kept[0].parent.name}/{n:06d}.npz", images=np.full((8, 8, 8, 1), 99, np.int32))
    images = []
    for which in (alone, run):
        code, out = finish(start(place, which.path, program=program(which), devices=2, **settings))
        assert code == 0, out
        with np.load(which / "samples_dpmpp_2m.npz", allow_pickle=False) as file:
            images.append(file["images"].reshape(400, 8, 8, 8, 1))
    assert (images[1][marked] == 99).all()
    others = np.setdiff1d(np.arange(400), marked)
    np.testing.assert_array_equal(images[1][others], images[0][others])


FAILS_IN_THE_MIDDLE = """
import runpy, sys
from experiments.records import Records

writer, sys.argv = Records.writer, ["likelihood", *sys.argv[1:]]

def failing(self):
    write, left = writer(self), [2]

    def third(records):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the cable is out")
        write(records)

    return third

Records.writer = failing
runpy.run_module("experiments.likelihood", run_name="__main__")
"""


@pytest.mark.slow
def test_an_evaluation_that_loses_a_process(place, undisturbed, tmp_path):
    """One of two is killed, then one fails: the other ends and says so; one process ends it with the same number."""
    settings = {"likelihood.images": 192, "likelihood.batch_size": 8, "likelihood.tolerance_images": 0}
    runs = [Run(str(tmp_path / name)) for name in ("alone", "broken")]
    for run in runs:
        shutil.copytree(undisturbed.path, run.path)
    alone, run = runs
    program = lambda run: ["-m", "experiments.likelihood", "--workdir", str(run.path)]
    records = lambda n: [
        line for file in run.path.glob(f"likelihood_test-*.{n}-of-2.jsonl") for line in read_jsonl(file)[1:]
    ]
    processes = several(place, run.path, 2, program=program(run), **settings)
    while len(records(1)) < 16 and processes[1].poll() is None:
        time.sleep(0.01)
    processes[1].kill()
    killed = time.monotonic()
    code, out = finish(processes[0], timeout=60)
    processes[1].communicate()
    assert code != 0 and time.monotonic() - killed < 40
    assert re.search(r"heartbeat|another task died|Gloo|connection|peer", out, re.IGNORECASE), out
    assert 16 <= len(records(1)) < 96

    broken = ["-c", FAILS_IN_THE_MIDDLE, "--workdir", str(run.path)]
    flags = [arg for arg in processes[0].args if arg.startswith(("--coordinator", "--processes", "--heartbeat"))]
    first = start(place, run.path, *flags, "--process=0", program=program(run), devices=2, **settings)
    second = start(place, run.path, *flags, "--process=1", program=broken, devices=2, **settings)
    before = len(records(1))
    (code, out), (failed, said) = finish_all([first, second])
    assert code == failed == 2 and "the cable is out" in said, (out, said)
    assert "records of bits/dim: failed in process 1, which says why" in out, out
    assert len(records(0)) == 96 and len(records(1)) == before + 16

    numbers = []
    for which in (run, alone):
        code, out = finish(start(place, which.path, program=program(which), devices=2, **settings))
        assert code == 0, out
        numbers.append(read_json(which / "likelihood_test.json")["bits_per_dim"])
    assert numbers[0] == numbers[1]


def test_where_one_process_fails_all_fail(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda fault: np.asarray([False, True, bool(fault)]))
    with pytest.raises(ChildProcessError, match="samples: failed in process 1, which says why"), together("samples"):
        pass
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError, match=r"^full$"), together("samples"):
        raise OSError("full")
    assert capsys.readouterr().err == "samples: OSError: full\n"
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda fault: np.asarray([bool(fault)] * 3))
    with together("samples"):
        pass
