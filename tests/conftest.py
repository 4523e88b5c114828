"""One strict session for every test: CPU, 8 simulated devices, no silent promotion, programs compiled quickly, once."""

import contextlib
import gc
import os
import pathlib
import random
import shutil
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Compiling is most of the fast tests' time: without LLVM's optimisations and XLA's newer emitters of fusions it takes
# less, and programs run slower. With JDIFF_TEST_OPTIMISED=1, as in the slow tests, they are compiled as users do.
if not os.environ.get("JDIFF_TEST_OPTIMISED"):
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1"
    )

import jax
import pytest

# Tracing makes many objects and few cycles: looking for cycles less often spares some of its time.
gc.set_threshold(100_000, 20, 100)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# One folder a worker: JAX does not write its cache atomically, and a worker must not read what another is writing.
_CACHE = pathlib.Path(os.environ.get("JDIFF_TEST_CACHE", pathlib.Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", str(_CACHE / os.environ.get("PYTEST_XDIST_WORKER", "main")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="the files, and the tests of each, in random order")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config, items):
    """Make slow what slow_but leaves out; shuffle the files and the tests of each, whose fixtures are made once."""
    some, found = set(), set()
    for item in items:
        if (marker := item.get_closest_marker("slow_but")) is not None:
            where = item.nodeid.partition("[")[0]
            fast = {(where, name) for name in marker.args if f"-{name}-" in f"-{item.callspec.id}-"}
            some |= {(where, name) for name in marker.args}
            found |= fast
            if not fast:
                item.add_marker("slow")
    if some != found and not any("::" in arg for arg in config.args):
        raise pytest.UsageError(f"slow_but names cases that are not there: {sorted(some - found)}")
    if (seed := config.getoption("shuffle")) is not None:
        draw, files = random.Random(seed), {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        for tests in (groups := list(files.values())):
            draw.shuffle(tests)
        draw.shuffle(groups)
        items[:] = [item for tests in groups for item in tests]


@pytest.fixture(scope="session")
def _digits(tmp_path_factory):
    """The digits, prepared once a worker."""
    from jdiff import data

    folder = tmp_path_factory.mktemp("tfds")
    data.load("digits", "train", data_dir=folder)
    return folder


@contextlib.contextmanager
def _data_in(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        yield


@pytest.fixture(scope="module")
def digits(_digits):
    """TFDS_DATA_DIR with the digits in it, for the tests of a file and its fixtures."""
    with _data_in(_digits):
        yield


@pytest.fixture(scope="session")
def done(_digits, tmp_path_factory):
    """The run folder of small_config(), trained once a worker; what the training left in it no test changes."""
    from experiments_cases import small_config

    from experiments.artefacts import Run
    from experiments.train import train

    run = Run(tmp_path_factory.mktemp("runs") / "done")
    with _data_in(_digits):
        assert train(small_config(), run) == 0
    return run


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """The folder of checkpoint_cases.py's steps 2 and 4, and the states that belong to them; no test changes it."""
    from checkpoint_cases import save_original

    path = tmp_path_factory.mktemp("original") / "steps"
    return path, save_original(path)


@pytest.fixture
def steps(original, tmp_path):
    """A copy of the original, to be spoilt."""
    return pathlib.Path(shutil.copytree(original[0], tmp_path / "steps"))


@pytest.fixture(scope="module")
def both_layouts():
    """In all checkpoints of a file."""
    from checkpoint_cases import both_layouts

    with both_layouts():
        yield


@pytest.fixture(scope="module")
def orphaned_reads():
    """Where a read fails, Orbax closes its event loop under TensorStore's other reads, whose threads then complain."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda args: None if "Event loop is closed" in str(args.exc_value) else hook(args)
    yield
    time.sleep(0.5)
    sys.unraisablehook = hook


@pytest.fixture(scope="session")
def place(_digits, tmp_path_factory):
    """What the processes that test_reliability_*.py start share: the digits, and a folder for compiled programs."""
    folder = tmp_path_factory.mktemp("reliability")
    (folder / "tfds").symlink_to(_digits)
    return folder


@pytest.fixture(scope="session")
def undisturbed(place):
    """The run that every disturbed one must equal, made once a worker; no test changes it."""
    from reliability_cases import finish, start

    from experiments.artefacts import Run

    run = Run(str(place / "undisturbed"))
    code, out = finish(start(place, run.path))
    assert code == 0, out
    return run


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield
