"""Killed or told to stop at any moment, a run that is started again is the undisturbed one."""

import re
import shutil
import signal
import time

import numpy as np
import pytest
from reliability_cases import finish, lines_of, same_run, start, state_of, wait_for_step

from configs import digits
from experiments import lock
from experiments.artefacts import Run, read_jsonl


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


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(place, undisturbed, tmp_path):
    """Whatever the first has begun: the step, its save, the end. Nothing older is lost."""
    run, codes = Run(str(tmp_path / "run")), []
    for step, gap in [(12, 0.003), (20, 0.02), (28, 0.1), (36, 0.3)]:
        process = start(place, run.path)
        wait_for_step(process, run, step)
        process.send_signal(signal.SIGINT)
        time.sleep(gap)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, out = finish(process)
        assert code in (130, -signal.SIGINT) and time.monotonic() - asked < 10, out
        codes.append(code)
    assert -signal.SIGINT in codes
    code, out = finish(start(place, run.path))
    assert code == 0, out
    assert state_of(run) == state_of(undisturbed)


@pytest.mark.slow
def test_the_demo_stops_in_time(place, tmp_path):
    run, demo = Run(str(tmp_path / "run")), digits.get_config()
    network = {"network.name": demo.network.name, "network.options": demo.network.options.to_dict()}
    steps = {name: demo.training[name] for name in ("steps", "batch_size", "checkpoint_every")}
    settings = network | {f"training.{name}": value for name, value in steps.items()}
    process = start(place, run.path, "--config=configs/digits.py", **settings)
    wait_for_step(process, run, 30)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    code, out = finish(process)
    assert code == 143 and time.monotonic() - asked < 20
    assert state_of(run, int(re.search(r"interrupted: step (\d+) is saved", out)[1]))
