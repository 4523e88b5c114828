"""The house has one staircase: who may import whom, read from the sources."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Room -> rooms of jdiff it may import. A room may always import itself.
FLOOR = {"_pytree": set(), "_typing": set(), "_array": {"_typing"}}
BELOW = {"_pytree", "_typing", "_array"}
ROOMS = {
    **FLOOR,
    "processes": BELOW,
    "predictions": BELOW | {"processes"},
    "sde": BELOW | {"processes", "predictions"},
    "_divergence": BELOW,
    "score_matching": BELOW | {"_divergence"},
    **dict.fromkeys(["solvers", "guidance", "losses"], BELOW | {"processes", "predictions", "sde"}),
    **dict.fromkeys(
        ["sampling", "likelihood", "cnf", "grid_search"],
        BELOW | {"_divergence", "processes", "predictions", "sde", "solvers", "guidance", "losses"},
    ),
    **dict.fromkeys(["operators", "conditions"], BELOW),
    **dict.fromkeys(["control", "editing"], BELOW | {"processes", "solvers", "operators"}),
    "levels": BELOW | {"processes", "predictions"},
    "saturation": BELOW | {"processes", "predictions", "guidance"},
    "_decoders": BELOW | {"transforms"},
    "bounds": BELOW | {"_decoders", "processes", "predictions", "sde", "losses", "transforms"},
    "dequantisation": BELOW | {"processes", "transforms"},
    # Beside the staircase: they stand on the processes, and nothing of the library stands on them.
    **dict.fromkeys(["analytic", "times", "transforms"], BELOW | {"processes"}),
    "coupling": BELOW,
    "interpolants": BELOW | {"sde"},
    # These know no diffusion at all; the mappings run the one training step.
    "training": BELOW,
    "checkpoint": BELOW,
    "parallel": BELOW | {"training"},
    **dict.fromkeys(["nn", "metrics", "data"], BELOW),
    "importers": BELOW | {"nn"},
}

# Room -> packages it may import besides the standard library, JAX and NumPy.
PACKAGES = {
    "solvers": {"diffrax", "lineax"},  # the adapter only, at its call
    "coupling": {"optax"},
    "training": {"optax"},
    "parallel": {"optax"},
    "checkpoint": {"orbax", "etils"},
    "nn": {"flax"},
    "importers": {"flax"},
    "data": {"tensorflow_datasets", "grain", "etils", "sklearn"},
}

# Host work, hidden state and code from files have no place in the library (CONTRIBUTING.md says why).
FORBIDDEN_IMPORTS = {
    "logging",
    "absl",
    "ml_collections",
    "tqdm",
    "pickle",
    "marshal",
    "shelve",
    "argparse",
    "tensorflow",
}
FORBIDDEN_CALLS = {"print", "input", "eval", "exec", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {"pure_callback", "io_callback", "host_callback"}


def imports(tree: ast.AST, package: list[str]) -> list[str]:
    """Every module that a source imports, wherever in it, by its absolute name; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def violations(source: str, path: str) -> list[str]:
    """What a file at this path inside the repository does against the rules."""
    parts = pathlib.PurePath(path).with_suffix("").parts
    package, tree = list(parts[:-1]), ast.parse(source)
    top, room = parts[0], parts[1]
    found = []
    for name in imports(tree, package):
        head, *rest = name.split(".")
        where = f"{path} imports {name}"
        if top != "jdiff":
            if top == "configs" and head in {"jdiff", "experiments"}:
                found.append(f"{where}: a configuration is data")
            if top == "examples" and head in {"experiments", "configs", "benchmarks", "tests"}:
                found.append(f"{where}: examples use the library alone")
            continue
        if head in {"experiments", "configs", "examples", "benchmarks", "tests"}:
            found.append(f"{where}: jdiff knows nothing of what is built on it")
        elif head == "jdiff" and room != "__init__":
            target = rest[0] if rest else "__init__"
            if room not in ROOMS:
                found.append(f"{path}: the room {room} is not in the plan: enter it in {pathlib.Path(__file__).name}")
            elif target != room and target not in ROOMS[room]:
                found.append(f"{where}: {room} may import {sorted(ROOMS[room])} only")
        elif head in FORBIDDEN_IMPORTS:
            found.append(f"{where}: host work belongs to experiments/")
        elif head not in sys.stdlib_module_names | {"jax", "numpy", "jdiff"} | PACKAGES.get(room, set()):
            found.append(f"{where}: not among the packages of {room}")
    if top != "jdiff":
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{path}:{node.lineno} calls {node.func.id}")
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if node.attr in FORBIDDEN_ATTRIBUTES or (".debug." in f".{name}." and node.attr in {"print", "callback"}):
                found.append(f"{path}:{node.lineno} uses {name}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"{path}:{node.value.lineno} unpickles")
    return found


def sources():
    return sorted(
        path for top in ("jdiff", "configs", "experiments", "examples") for path in (ROOT / top).rglob("*.py")
    )


def test_the_repository_keeps_the_rules():
    paths = sources()
    assert len(paths) > 20
    found = [fault for path in paths for fault in violations(path.read_text(), path.relative_to(ROOT).as_posix())]
    assert not found, "\n".join(found)


def test_every_room_of_the_plan_is_reached_from_below():
    # The plan itself runs one way: some order of the rooms has every import pointing backwards.
    placed: set[str] = set()
    while len(placed) < len(ROOMS):
        ready = {room for room, allowed in ROOMS.items() if room not in placed and allowed <= placed}
        assert ready, f"a cycle among {sorted(set(ROOMS) - placed)}"
        placed |= ready


@pytest.mark.parametrize(
    ("path", "source", "match"),
    [
        ("jdiff/processes.py", "from jdiff import solvers", "imports jdiff.solvers"),
        ("jdiff/processes.py", "import jdiff.sde", "imports jdiff.sde"),
        ("jdiff/processes.py", "from .sde import SDE", "imports jdiff.sde.SDE"),
        ("jdiff/processes.py", "from . import sampling", "imports jdiff.sampling"),
        ("jdiff/_typing.py", "from jdiff import _array", "imports jdiff._array"),
        ("jdiff/solvers/ode.py", "from ..sampling import sample", "imports jdiff.sampling.sample"),
        ("jdiff/solvers/ode.py", "def f():\n    from jdiff.losses import denoising", "imports jdiff.losses"),
        ("jdiff/losses.py", "from jdiff.guidance import classifier", "imports jdiff.guidance"),
        ("jdiff/sampling.py", "from jdiff.likelihood import log_likelihood", "imports jdiff.likelihood"),
        ("jdiff/nn/unet.py", "if True:\n    import jdiff.processes as p", "imports jdiff.processes"),
        ("jdiff/training.py", "from jdiff.losses import denoising", "imports jdiff.losses"),
        ("jdiff/training.py", "import flax", "imports flax"),
        ("jdiff/processes.py", "import jdiff", "imports jdiff"),
        ("jdiff/data/x.py", "from jdiff.transforms import random_flip", "imports jdiff.transforms"),
        ("jdiff/new.py", "from jdiff import sde", "not in the plan"),
        ("jdiff/sde.py", "import experiments.build", "knows nothing"),
        ("jdiff/__init__.py", "from configs import digits", "knows nothing"),
        ("jdiff/sde.py", "from absl import logging", "host work"),
        ("jdiff/sde.py", "import tqdm.auto", "host work"),
        ("jdiff/sde.py", "import scipy", "not among"),
        ("jdiff/solvers/ode.py", "print('hello')", "calls print"),
        ("jdiff/sde.py", "jax.debug.print('x')", "uses jax.debug.print"),
        ("jdiff/sde.py", "from jax import debug\ndebug.callback(f)", "uses debug.callback"),
        ("jdiff/sde.py", "jax.pure_callback(f, s)", "uses jax.pure_callback"),
        ("jdiff/sde.py", "jax.experimental.io_callback(f, s)", "uses jax.experimental.io_callback"),
        ("jdiff/importers/x.py", "import pickle", "imports pickle"),
        ("jdiff/importers/x.py", "np.load(f, allow_pickle=True)", "unpickles"),
        ("configs/digits.py", "from experiments import build", "a configuration is data"),
        ("jdiff/sde.py", "from examples import render", "knows nothing"),
        ("examples/minimal.py", "from experiments import build", "the library alone"),
    ],
)
def test_a_planted_violation_is_found(path, source, match):
    found = violations(source, path)
    assert len(found) == 1 and match in found[0], found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jdiff/sampling.py", "from jdiff.solvers.base import integrate\nfrom jdiff import guidance, _array"),
        ("jdiff/solvers/ode.py", "from .base import Solver\nfrom . import base\nfrom jdiff.sde import SDE"),
        ("jdiff/solvers/__init__.py", "from .base import Solver\nfrom jdiff.solvers import ode"),
        ("jdiff/__init__.py", "from jdiff import solvers, processes\nfrom jdiff.sde import SDE"),
        ("jdiff/nn/unet.py", "import flax.linen as nn\nfrom jdiff._array import expand"),
        ("jdiff/importers/x.py", "from jdiff.nn import UNet"),
        ("jdiff/data/x.py", "np.load(f, allow_pickle=False)"),
        ("experiments/train.py", "import jdiff.data\nfrom configs import digits\nprint('hello')"),
    ],
)
def test_what_is_allowed_is_not_found(path, source):
    assert violations(source, path) == []
