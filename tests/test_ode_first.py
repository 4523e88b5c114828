"""The claims of docs/ode_first.md, by the functions that make its figures, on smaller sizes."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import jdiff
from experiments.ode_first import common, conditional_mean, continuity, determinant, heat, marginals, path
from experiments.ode_first.__main__ import FIGURES, main

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "ode_first.md").read_text()
CODE = {file.stem: file.read_text() for file in (ROOT / "experiments" / "ode_first").glob("*.py")}


@pytest.fixture
def backwards(monkeypatch):
    """The velocity with the wrong sign: whatever claims to check it has to see that."""
    right = common.velocity

    def wrong(process, data):
        velocity = right(process, data)
        return lambda x, t: -velocity(x, t)

    monkeypatch.setattr(common, "velocity", wrong)


def test_the_determinant_of_a_step_and_of_a_trajectory(x64):
    numbers = determinant.measure(points=12, layers=(50, 100, 200))["numbers"]
    assert abs(numbers["order of |log|det(I + hJ)| - h tr J|"] - 2) < 0.05
    assert abs(numbers["order of log p by layers"] - 1) < 0.05
    assert numbers["mean error of log p, 200 layers"] < 0.02
    assert numbers["largest error of jdiff.log_likelihood"] < 1e-8


def test_the_determinant_of_a_linear_step(x64):
    # The determinant itself, against what it is of a matrix with known eigenvalues; also where it is negative.
    rotate = np.array([[0.6, -0.8], [0.8, 0.6]])
    matrix = rotate @ np.diag([2.0, -3.0]) @ rotate.T
    got, trace = determinant.step_determinant(lambda x: matrix @ x, np.ones((3, 2)), 0.5)
    np.testing.assert_allclose(got, np.full(3, np.log(2 * 0.5)), atol=1e-12)
    np.testing.assert_allclose(trace, np.full(3, -0.5), atol=1e-12)


@pytest.mark.slow_but("VP", "Rectified")
@pytest.mark.parametrize("name", common.PROCESSES)
def test_continuity(x64, name):
    found = continuity.measure(points=24, grids=(32, 64, 128), processes={name: common.PROCESSES[name]})["numbers"]
    assert abs(found[f"{name}: order"] - 2) < 0.05
    assert found[f"{name}: residual, 128 spacings a side"] < 0.01
    assert found[f"{name}: residual, automatic differentiation"] < 1e-12


def test_continuity_sees_the_sign(x64, backwards):
    found = continuity.measure(points=24, grids=(32, 64, 128), processes={"VE": jdiff.VE()})["numbers"]
    assert found["VE: residual, 128 spacings a side"] > 1.9
    assert found["VE: residual, automatic differentiation"] > 1.9


def test_heat(x64):
    numbers = heat.measure(points=24, spacings=(0.02, 0.01, 0.005))["numbers"]
    assert numbers["residual, h = 0.005"] < 1e-4
    assert abs(numbers["order"] - 2) < 0.05


def test_a_velocity_from_a_distribution_function(x64):
    """F = Phi((x - a t) / (1 + b t)): a Gaussian that drifts and widens, v = a + b (x - a t) / (1 + b t)."""
    a, b = 0.7, 1.3
    velocity = path.velocity_from_cdf(
        lambda x, t: jax.scipy.stats.norm.cdf((x - a * t[:, None]) / (1 + b * t[:, None]))
    )
    x, t = np.linspace(-2, 2, 7)[:, None], np.linspace(0, 1, 7)
    want = a + b * (x - a * t[:, None]) / (1 + b * t[:, None])
    np.testing.assert_allclose(velocity(x, t), want, rtol=1e-10)


def test_the_solved_velocity_moves_the_mass_of_every_cell(x64):
    rng = np.random.default_rng(0)
    n, h = 12, 0.3
    p = rng.uniform(0.1, 1, (n, n))
    dp_dt = rng.normal(size=(n, n))
    dp_dt -= dp_dt.mean()
    vx, vy = path.velocity_on_faces(p, dp_dt, h)
    through_x = np.pad(0.5 * (p[1:] + p[:-1]) * vx, ((1, 1), (0, 0)))
    through_y = np.pad(0.5 * (p[:, 1:] + p[:, :-1]) * vy, ((0, 0), (1, 1)))
    divergence = (np.diff(through_x, axis=0) + np.diff(through_y, axis=1)) / h
    np.testing.assert_allclose(divergence, -dp_dt, atol=1e-10)
    # A gradient: nothing goes around a corner of four cells.
    np.testing.assert_allclose(np.diff(vy, axis=0) - np.diff(vx, axis=1), np.zeros((n - 1, n - 1)), atol=1e-10)


def test_the_solved_velocity_converges_to_the_gradient():
    """p = 2 + cos(pi x), phi = cos(pi x) cos(pi y) on the unit square: second order."""
    errors = []
    for n in (16, 32, 64):
        c = (np.arange(n) + 0.5) / n
        x, y = np.meshgrid(c, c, indexing="ij")
        cos, sin = np.cos(np.pi * x), np.sin(np.pi * x)
        dp_dt = np.pi**2 * np.cos(np.pi * y) * (4 * cos + 2 * cos**2 - sin**2)  # -div(p grad phi)
        vx, _ = path.velocity_on_faces(2 + cos, dp_dt, 1 / n)
        want = -np.pi * np.sin(np.pi * np.arange(1, n) / n)[:, None] * np.cos(np.pi * c)[None]
        errors.append(np.abs(vx - want).max())
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), [2, 2], atol=0.1)


def test_the_interpolated_field_keeps_linear_velocities(x64):
    n, ts = 16, np.array([0.0, 0.1, 0.4, 1.0])
    h = 2 * path.HALF / n
    middles, faces = (np.arange(n) + 0.5) * h - path.HALF, np.arange(1, n) * h - path.HALF
    vx = lambda x, y, t: 1 + 2 * x - 3 * y + 0.5 * t
    vy = lambda x, y, t: -2 + x + 0.7 * y - 4 * t
    along_x = vx(faces[None, :, None], middles[None, None], ts[:, None, None])
    along_y = vy(middles[None, :, None], faces[None, None], ts[:, None, None])
    x = np.random.default_rng(0).uniform(-path.HALF + h, path.HALF - h, size=(9, 2))
    t = np.linspace(0, 1, 9)
    got = path.interpolate(along_x, along_y, ts, h)(x, t)
    np.testing.assert_allclose(got, np.stack([vx(*x.T, t), vy(*x.T, t)], axis=1), atol=1e-12)


@pytest.mark.slow
def test_particles_follow_the_chosen_paths(x64):
    found = path.measure(particles=1000, n=48, times=17, steps=50, plane_particles=10_000)
    numbers = found["numbers"]
    assert numbers["1-D: largest change of F(x_t, t) along a trajectory"] < 1e-6
    assert numbers["1-D: KS p-value at t = 0"] > 0.01
    assert [at["t"] for at in found["shown"]][::2] == [1, 0]
    for at in found["shown"]:
        # chi2 has the mean `cells` and the variance 2 cells (p = 1e-3 at most); particles that stay where they are have
        # 100 times as much.
        assert abs(at["chi2"] - at["cells"]) < 4 * np.sqrt(2 * at["cells"])
    stay = path._chi2(found["shown"][0]["x"], found["shown"][-1]["p"], 2 * path.HALF / 48)
    assert stay[0] > 50 * stay[1]


def test_rectified_flow_is_the_conditional_mean(x64):
    numbers = conditional_mean.measure(pairs=40_000, paths=12, cells=10)["numbers"]
    assert numbers["largest difference of field and quadrature"] < 1e-10
    freedom = numbers["regression: degrees of freedom"]
    assert freedom > 50
    assert abs(numbers["regression: chi2 / degrees of freedom"] - 1) < 4 * np.sqrt(2 / freedom)
    assert abs(numbers["its excess beyond E|f - v|^2, in standard errors"]) < 4
    assert numbers["loss of 0.8 v + 0.3 x"] > numbers["loss of the field"] + 0.1
    assert numbers["crossings of conditional paths"] > 5
    assert numbers["crossings of trajectories"] == 0
    assert numbers["largest error of trajectories"] < 1e-6


def test_the_conditional_mean_sees_the_sign(x64, backwards):
    numbers = conditional_mean.measure(pairs=40_000, paths=12, cells=10)["numbers"]
    assert numbers["largest difference of field and quadrature"] > 1
    assert numbers["regression: chi2 / degrees of freedom"] > 10


@pytest.mark.slow_but("VP", "Rectified")
@pytest.mark.parametrize("name", common.PROCESSES)
def test_the_noise_of_the_reverse_process_keeps_the_marginals(x64, name):
    residual, mean, variance = marginals.laws(common.PROCESSES[name], etas=(0.0, 0.7, 2.0), points=16)
    assert residual < 1e-12
    assert mean < 1e-7
    assert variance < 1e-6


def test_samples_of_every_eta_have_one_law(x64):
    ts, paths, tests = marginals.walks(etas=(0.0, 2.0), particles=1000, steps=200)
    assert all(test.pvalue > 0.01 for test in tests.values())
    # The paths are others: without noise they are smooth, with it their squared increments add up to int w^2 dt.
    variation = {eta: np.mean(np.sum(np.diff(walk, axis=0) ** 2, axis=0)) for eta, walk in paths.items()}
    assert variation[0.0] < 0.05
    np.testing.assert_allclose(variation[2.0], np.trapezoid((2 * ts[::-1]) ** 2, ts[::-1]), rtol=0.1)


def test_the_document_shows_the_code_that_runs():
    imports, *blocks = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    assert imports.startswith("import jax")
    assert len(blocks) >= 6
    # Ruff has its own mind about empty lines.
    plain = lambda code: "".join(f"{line.strip()}\n" for line in code.splitlines() if line.strip())
    for block in blocks:
        assert any(plain(block) in plain(code) for code in CODE.values()), f"not in experiments/ode_first:\n{block}"
    assert re.findall(r"^python -m experiments\.ode_first (\w+)$", DOCUMENT, re.M) == list(FIGURES)
    for name in FIGURES:
        assert f"(images/ode_first_{name}.png)" in DOCUMENT
        assert (ROOT / "docs" / "images" / f"ode_first_{name}.png").stat().st_size > 10_000


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ode_first", "heat", "--out", str(tmp_path / "new")])
    main()
    assert (tmp_path / "new" / "ode_first_heat.png").read_bytes()[:4] == b"\x89PNG"
    assert "residual, h = 0.005 = " in capsys.readouterr().out
    assert not jax.config.jax_enable_x64


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_by_its_command(tmp_path, name):
    command = [sys.executable, "-m", "experiments.ode_first", name, "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert (tmp_path / f"ode_first_{name}.png").exists()
