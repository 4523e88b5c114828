"""The package as a stranger meets it: light to import, every public name documented, versions that agree."""

import ast
import configparser
import functools
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
CALLED = {"__call__", "__getitem__", "__init__", "__len__"}
PUBLIC = [name for name in MODULES if not any(part.startswith("_") for part in name.split(".")[1:])]

IMPORT = """
import json, sys, warnings
warnings.simplefilter("error")
import jax, flax.linen
before = set(sys.modules)
import jdiff
new = {name.partition(".")[0] for name in set(sys.modules) - before}
from jax._src import xla_bridge
print(json.dumps({"new": sorted(new), "backends": sorted(xla_bridge._backends)}))
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
    assert report["backends"] == []  # no device is taken, no computation run, at import


def test_importing_data_is_light():
    code = "import sys, jdiff.data; print({'tensorflow_datasets', 'grain', 'sklearn'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip() == "set()"


@pytest.mark.parametrize("name", ["jdiff", *PUBLIC])
def test_public_names_are_declared_sorted_and_documented(name):
    module = importlib.import_module(name)
    names = list(module.__all__)
    assert len(set(names)) == len(names) and names == sorted(names, key=_isort_style), f"{name}.__all__"
    assert inspect.getdoc(module), f"{name} has no docstring"
    for public in names:
        thing = getattr(module, public)
        if inspect.isroutine(thing) or inspect.isclass(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"
    # What has no underscore and is not declared is shared with a neighbour (or a test), or it was forgotten.
    for own in set(_defined_in(module)) - set(names):
        assert any(own in names for other, names in _imported().items() if other != name), f"{name}.{own}"


def test_packages_hand_on_what_their_modules_declare():
    missing = []
    for name in PUBLIC:
        parent, _, last = name.rpartition(".")
        package = importlib.import_module(parent)
        if parent == "jdiff":
            reached = last in package.__all__ or f"`{name}`" in package.__doc__
            missing += [] if reached else [f"{name} is neither in jdiff.__all__ nor named in its docstring"]
        elif last not in package.__all__ and any(f"{name}." in found for found in _imported_by(package)):
            missing += [f"{name}.{n}" for n in set(importlib.import_module(name).__all__) - set(package.__all__)]
    assert not missing


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_say_what_they_raise_and_are_annotated(name):
    module = importlib.import_module(name)
    tree = ast.parse(inspect.getsource(module))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in module.__all__]
    functions = [(node, "") for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in module.__all__]
    for cls in classes:
        methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
        functions += [(node, f"{cls.name}.") for node in methods if node.name in CALLED or node.name[0] != "_"]
    for function, prefix in functions:
        where, told = f"{name}.{prefix}{function.name}", ast.get_docstring(function) or ""
        raised = {
            node.exc.func.id
            for node in ast.walk(function)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        }
        silent = [error for error in raised & {"ValueError", "TypeError"} if error not in told]
        assert not silent, f"{where} raises {silent} and does not say so"
        signature = function.args
        given = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs, signature.vararg, signature.kwarg]
        bare = [a.arg for a in given if a is not None and a.annotation is None and a.arg != "self"]
        assert not bare and function.returns is not None, f"{where} has no type for {bare or 'its result'}"


def _defined_in(module):
    """Names of the functions and classes of a module that have no underscore."""
    nodes = ast.parse(inspect.getsource(module)).body
    return [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]


def _imported_by(module):
    package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
    nodes = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.ImportFrom)]
    assert all(node.level == 0 for node in nodes), f"relative imports in {package}"
    return [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]


@functools.cache
def _imported():
    """{module: the names it takes from other modules of jdiff}."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    found = {name: {n.rpartition(".")[2] for n in _imported_by(module)} for name, module in modules.items()}
    tests = [ast.walk(ast.parse(path.read_text())) for path in (ROOT / "tests").glob("test_*.py")]
    froms = [node for nodes in tests for node in nodes if isinstance(node, ast.ImportFrom)]
    return found | {"tests": {alias.name for node in froms for alias in node.names}}


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
