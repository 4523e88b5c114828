"""One owner a run folder: a second one is refused, a dead one's lock is taken over."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from experiments_cases import small_config
from reliability_cases import finish, finish_all, several, start, wait_for_step

from experiments import lock, train
from experiments.artefacts import Run, read_json


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


def test_a_training_that_is_refused_changes_nothing(digits, tmp_path):
    run = Run(str(tmp_path))
    run.open(small_config())
    owner(run)
    held = lambda: {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    before = held()
    with pytest.raises(lock.LockedError):
        train.train(small_config(sampling__steps=5), run)
    assert held() == before


@pytest.mark.slow
def test_a_second_owner_stops_all_processes(place, tmp_path):
    run = Run(str(tmp_path))
    owner(run)
    results = finish_all(several(place, run.path, 2), timeout=60)
    assert [code for code, _ in results] == [3, 2], results
    assert "LockedError" in results[0][1] and "failed in process 0, which says why" in results[1][1]
    # The same in the middle, at the next save, which the others are waiting to make together.
    run = Run(str(tmp_path / "running"))
    processes = several(place, run.path, 2, **{"training.steps": 100_000})
    wait_for_step(processes[0], run, 12)
    owner(run)
    results = finish_all(processes, timeout=60)
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
