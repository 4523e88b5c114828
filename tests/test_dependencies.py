"""What is declared is used, what is used is declared, and docs/dependencies.md lists it with its licence."""

import ast
import configparser
import functools
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Where a package may be imported: jdiff/ has optional parts, and tests and examples may take all.
EXTRAS = {
    "jdiff": {"", "experiments", "diffrax"},
    "configs": {"", "experiments"},
    "experiments": {"", "experiments"},
    "benchmarks": {"", "experiments", "test"},
    "examples": {"", "experiments", "test"},
    "tests": {"", "experiments", "test", "gcs"},
    "docs": {"", "docs"},
}
IMPORTED_AS = {
    "orbax-checkpoint": "orbax",
    "absl-py": "absl",
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "tensorflow-datasets": "tensorflow_datasets",
    "google-cloud-storage": "google",
}
LICENCES = {
    "Apache License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
}


def rows():
    """package -> its row of docs/dependencies.md, as (extras, licence, what for)."""
    text = (ROOT / "docs" / "dependencies.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {name: (extras, licence, reason) for name, extras, licence, reason in cells[2:]}


def declared():
    """package -> the extras of setup.cfg that it is in, "" for none."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    found = {}
    for extra, lines in lists.items():
        for line in lines.strip().splitlines():
            if extra not in ("cuda", "tpu") and not line.startswith("#"):
                found.setdefault(re.match(r"[\w-]+", line)[0], set()).add(extra)
    return found


@functools.cache
def imported():
    """Top folder -> the packages that its files import, wherever in them, or ask for by name."""
    found = {}
    for top in EXTRAS:
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("require", "pytest.importorskip"):
                    names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                found.setdefault(top, set()).update(name.partition(".")[0] for name in names)
    ours = {*EXTRAS, *(path.stem for path in (ROOT / "tests").glob("*.py")), *sys.stdlib_module_names}
    return {top: names - ours for top, names in found.items()}


def test_what_is_imported_is_declared():
    places = {IMPORTED_AS.get(package, package): extras for package, extras in declared().items()}
    for top, packages in imported().items():
        for package in packages:
            assert places.get(package, set()) & EXTRAS[top], (
                f"{top}/ imports {package}, which setup.cfg does not declare"
            )


def test_what_is_declared_is_used():
    used = set().union(*imported().values())
    for package, (_, _, reason) in rows().items():
        assert (IMPORTED_AS.get(package, package) in used) != reason.startswith("not imported"), package


def test_the_page_lists_what_is_declared():
    extras = {name: {extra.strip() for extra in row[0].split(",")} for name, row in rows().items()}
    assert extras == declared()


@pytest.mark.parametrize("package", rows())
def test_the_licence_is_the_package_s(package):
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    stated = [metadata.get(field) or "" for field in ("License-Expression", "License")]
    stated = [licence.strip().split("\n")[0] for licence in [*stated, *(metadata.get_all("Classifier") or [])]]
    stated = [LICENCES.get(licence, licence) for licence in stated]
    assert rows()[package][1] in stated, stated
