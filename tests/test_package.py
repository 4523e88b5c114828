"""The package as a stranger meets it: light to import, every public name documented, versions that agree."""

import configparser
import importlib
import inspect
import json
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import jdiff

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(jdiff.__path__, "jdiff."))
PUBLIC = [name for name in MODULES if not any(part.startswith("_") for part in name.split(".")[1:])]

IMPORT = """
import json, sys, time, warnings
warnings.simplefilter("error")
import jax, flax.linen
before, start = set(sys.modules), time.process_time()
import jdiff
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
from jax._src import xla_bridge
print(json.dumps({"seconds": seconds, "new": sorted(new), "backends": sorted(xla_bridge._backends)}))
"""


def test_import_is_light():
    out = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    report = json.loads(out)  # and nothing else was printed
    heavy = {
        "tensorflow",
        "tensorflow_datasets",
        "grain",
        "sklearn",
        "matplotlib",
        "diffrax",
        "equinox",
        "orbax",
        "PIL",
    }
    assert not heavy & set(report["new"]), report["new"]
    assert report["seconds"] < 2.0  # processor time beyond jax and flax
    assert report["backends"] == []  # no device is taken, no computation run, at import


def test_importing_data_is_light():
    code = "import sys, jdiff.data; print({'tensorflow_datasets', 'grain', 'sklearn'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip() == "set()"


@pytest.mark.parametrize("name", ["jdiff", *PUBLIC])
def test_public_names_exist_and_are_documented(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module), f"{name} has no docstring"
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, v in vars(module).items() if not n.startswith("_") and _defined_in(v, name)]
    else:
        assert len(set(names)) == len(names) and list(names) == sorted(names, key=_isort_style), f"{name}.__all__"
    for public in names:
        thing = getattr(module, public)
        if inspect.isroutine(thing) or inspect.isclass(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"


def _defined_in(thing, name):
    return (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == name


def _isort_style(name):
    """CONSTANTS, Classes, functions, as ruff sorts __all__."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2, name)


def test_versions_agree():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert jdiff.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert setup["options"]["python_requires"] == ">=3.11"


def test_no_machine_paths_in_the_repository():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(r"/work/|/root/|/home/\w+/")
    faults = []
    for name in listing.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".cfg", ".toml", ".cff", ".json", ""} and path.is_file():
            faults += [name] if machine.search(path.read_text()) and path != pathlib.Path(__file__) else []
    assert not faults


def test_a_stranger_can_use_it_under_his_own_jit():
    # The two functions of the README, with a closure as the network: data N(0, 1) has the score -x under VP at every t.
    @jax.jit
    def draw(scale, key):
        process = jdiff.VP()
        flow = jdiff.probability_flow(process, lambda x, t: -scale * x)
        return jdiff.sample(key, process, jdiff.solvers.heun(flow), (16, 2, 3), jdiff.times.karras(process, 18))

    @jax.jit
    def log_prob(scale, key, x):
        return jdiff.log_likelihood(key, jdiff.VP(), lambda x, t: -scale * x, x)

    # With the exact score the flow stands still: samples are the prior's draws, the density is the normal one.
    x = draw(1.0, jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 16)
    assert x.shape == (16, 2, 3)
    got = log_prob(1.0, keys, x)
    expected = -0.5 * np.sum(np.asarray(x) ** 2, axis=(1, 2)) - 3 * np.log(2 * np.pi)
    np.testing.assert_allclose(got.log_prob, expected, rtol=1e-5)
