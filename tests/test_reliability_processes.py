"""Several processes and other devices: one run, whichever of them is stopped, dies, fails or has a full disk."""

import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from reliability_cases import (
    FULL_FOR_A_WHILE,
    finish,
    finish_all,
    lines_of,
    several,
    start,
    state_of,
    wait_for,
    wait_for_step,
)

from experiments import lock
from experiments.artefacts import Run, read_json, read_jsonl
from experiments.processes import together
from jdiff import checkpoint, parallel, training


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
    wait_for(early[0], (run / lock.NAME).exists)  # then all are connected, and JAX listens
    early[0].send_signal(signal.SIGTERM)
    results = finish_all(early)
    assert [code for code, _ in results] == [143] * count, results
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


def kill_the_second(processes):
    """By SIGKILL; the first ends soon and says that a peer is gone."""
    processes[1].kill()
    killed = time.monotonic()
    code, out = finish(processes[0], timeout=60)
    processes[1].communicate()
    assert code != 0 and time.monotonic() - killed < 40
    assert re.search(r"heartbeat|another task died|Gloo|connection|peer", out, re.IGNORECASE), out


@pytest.mark.slow
def test_a_process_that_dies_stops_the_others(place, tmp_path):
    run = Run(str(tmp_path / "run"))
    settings = {"training.steps": 100_000}
    processes = several(place, run.path, 2, **settings)
    wait_for_step(processes[0], run, 12)
    kill_the_second(processes)
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    processes = several(place, run.path, 2, **settings)
    wait_for_step(processes[0], run, saved + 3)
    for process in processes:
        process.kill()
        process.communicate()
    assert min(line["step"] for line in read_jsonl(run / "metrics.jsonl")) == 3


@pytest.mark.slow
def test_what_one_process_cannot_begin_with_stops_all(place, tmp_path):
    """metrics.jsonl, which process 0 alone reads, is damaged inside: it says so, and the other says who does."""
    run = Run(str(tmp_path / "run"))
    run.path.mkdir()
    run.write("metrics.jsonl", '{"step"\n{"step": 3}\n')
    results = finish_all(several(place, run.path, 2), timeout=60)
    assert [code for code, _ in results] == [2, 2], results
    assert "metrics.jsonl is not JSON lines" in results[0][1], results
    assert "the records of the run: failed in process 0, which says why" in results[1][1], results


FAILS_INSIDE_OF_ORBAX = """
import runpy, sys
import orbax.checkpoint as ocp

save, sys.argv = ocp.CheckpointManager.save, ["train", *sys.argv[1:]]

def failing(self, step, *args, **options):
    if step == 18:
        raise OSError("the cable is out")
    return save(self, step, *args, **options)

ocp.CheckpointManager.save = failing
runpy.run_module("experiments.train", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_fails_while_others_wait_inside_of_orbax(place, tmp_path, which):
    """It says why and ends; the other, which waits for it, by heartbeat; all go on from the step before."""
    runs = [Run(str(tmp_path / name)) for name in ("whole", "broken")]
    whole, run = runs
    programs = [None, None]
    programs[which] = ["-c", FAILS_INSIDE_OF_ORBAX, "--workdir", str(run.path)]
    began = time.monotonic()
    results = finish_all(several(place, run.path, 2, programs=programs))
    assert all(code != 0 for code, _ in results) and time.monotonic() - began < 90, results
    assert "the cable is out" in results[which][1] and "the cable is out" not in results[1 - which][1], results
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal()) == ["12", "6"]
    for each in runs:
        results = finish_all(several(place, each.path, 2))
        assert [code for code, _ in results] == [0, 0], results
    assert state_of(run) == state_of(whole) and lines_of(run) == lines_of(whole)


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
    wait_for(processes[1], lambda: sum(int(file.stem) % 2 for file in done()) >= 20)
    kill_the_second(processes)
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
    wait_for(processes[1], lambda: len(records(1)) >= 16)
    kill_the_second(processes)
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


def test_processes_of_one_number_on_two_machines_write_one_file(tmp_path, monkeypatch):
    run = Run(str(tmp_path))
    replace = type(run.path).replace

    def overtaken(self, target):
        monkeypatch.undo()
        run.write("file", "of the other")
        return replace(self, target)

    monkeypatch.setattr(type(run.path), "replace", overtaken)
    run.write("file", "of this one")
    assert (run / "file").read_text() == "of this one" and len(list(run.path.iterdir())) == 1


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
