"""Damage, full disks, folders that become read-only: a run says so, goes on, and loses nothing."""

import errno
import os
import pathlib
import re
import shutil
import signal
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reliability_cases import FULL_FOR_A_WHILE, finish, lines_of, same_run, start, state_of, wait_for_step

from experiments.artefacts import Metrics, Run, read_jsonl
from jdiff import checkpoint


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
