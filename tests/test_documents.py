"""What the documents show works: their Python runs, their commands are understood, the reference is complete."""

import argparse
import ast
import importlib
import importlib.util
import io
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from absl import app, flags
from test_layers import ROOMS, imports

from configs.common import defaults
from experiments import cli
from jdiff import data

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
# Commands are shown in these docstrings as well.
SHOWN = PAGES | {
    path.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    for room in ("configs", "experiments", "benchmarks", "examples")
    for path in sorted((ROOT / room).rglob("*.py"))
}
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
# What a page prints, where that is not just anything.
PRINTED = {
    "README.md": r"\(16, 8\) \(16,\)\n",
    "docs/control.md": r"\(4, 28, 28, 1\)\n",
    "docs/guidance.md": r"\(4, 8\)\n",
    "docs/parallel.md": r"20 \d\.\d+ True\n256\n100 \{'next_index': 100\} \(3, 3\)\n",
    "docs/add-a-process.md": r"\[ *0\.[45]\d* +-(0\.9|1\.0)\d* *\] \[0\.[34]\d* +0\.[34]\d* *\]\n",
}
CIFAR10 = "docs/reproduce.md"


def blocks(text, language):
    """The code of the fenced blocks of a language, without the indentation of the list that they stand in."""
    for indent, found, code in FENCE.findall(text):
        if found == language:
            yield re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory with data of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path


# Tutorials are scripts of examples/, whose own test runs them small and compares these pages with them.
TUTORIALS = "docs/tutorials/"
WITH_PYTHON = [p for p, text in PAGES.items() if any(blocks(text, "python")) and not p.startswith(TUTORIALS)]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page, folder, capsys):
    """In order and in one namespace, as a reader would type it; tests that a page shows are run."""
    if page == CIFAR10:
        _archive(folder)
    names = {"__name__": "page"}
    for code in blocks(PAGES[page], "python"):
        if "sys.argv" not in code:  # a program: below
            exec(compile(code, page, "exec"), names)
    printed = capsys.readouterr().out
    assert re.fullmatch(PRINTED.get(page, r"(?s:.*)"), printed), printed
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()
    if page == CIFAR10:
        _is_the_archive(folder)


def test_a_tutorial_is_a_script():
    for page in PAGES:
        if page.startswith(TUTORIALS):
            assert (ROOT / "examples" / f"{pathlib.Path(page).stem}.py").exists(), page


def test_what_looks_like_python_is_run_or_needs_what_is_not_here():
    """A block with another name of the language would not be run: only the one that needs PyTorch may have one."""
    for page, text in PAGES.items():
        for other in ("py", "python3", "pycon", "Python"):
            for code in blocks(text, other):
                assert "import torch" in code and ast.parse(code), page


def test_the_program_of_two_processes(folder):
    (code,) = (code for code in blocks(PAGES["docs/parallel.md"], "python") if "sys.argv" in code)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (folder / "program.py").write_text(code.replace(":9911", f":{free.getsockname()[1]}"))
    run = [sys.executable, "program.py"]
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(folder)}
    pair = [subprocess.Popen([*run, n], stdout=subprocess.PIPE, env=env, text=True) for n in "01"]
    assert [process.communicate(timeout=120)[0] for process in pair] == ["0 1 2 (16,)\n", "1 1 2 (16,)\n"]


def _archive(folder):
    """CIFAR-10's archive with 20 images a file, of pixels that tell where they are from."""
    files = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for n, file in enumerate(files):
            pixels = np.random.RandomState(n).randint(0, 256, (20, 3072))
            rows = np.c_[np.arange(20) % 10, pixels].astype(np.uint8).tobytes()
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
            entry.size = len(rows)
            archive.addfile(entry, io.BytesIO(rows))


def _is_the_archive(folder):
    test, train = data.load("cifar10", "test"), data.load("cifar10", "train")
    assert (len(test), len(train), test.shape, test.levels, test.version) == (20, 100, (32, 32, 3), 256, "3.0.2")
    # As sets: TFDS shuffles. Red, green and blue planes become the last axis.
    read = {(int(y), x.tobytes()) for x, y in zip(*(test.arrays()[k] for k in ("image", "label")))}
    planes = np.random.RandomState(5).randint(0, 256, (20, 3072)).astype(np.uint8).reshape(20, 3, 32, 32)
    assert read == {(n % 10, image.transpose(1, 2, 0).tobytes()) for n, image in enumerate(planes)}


def commands(text):
    """(module, arguments) of each `python -m ...` in the fenced blocks, the indented lines and the code of a text."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = [line for _, language, code in FENCE.findall(text) if language in ("", "bash") for line in code.split("\n")]
    rest = FENCE.sub("", text)
    lines += re.findall(r"^    .*", rest, re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    for line in lines:
        for module, arguments in re.findall(r"python3? -m ([\w.]+)([^&;|]*)", line):
            arguments = re.sub(r"\s#.*|\.\.\.|\[(?=--)", " ", arguments)  # [--what may be left out]
            if arguments.count('"') % 2:  # a quotation around the command ends behind it
                arguments = arguments.replace('"', "")
            words = shlex.split(arguments)
            yield module, [word[:-1] if word.count("]") > word.count("[") else word for word in words]


class _Found(Exception):
    """Carries what a script would have parsed its arguments with."""


@pytest.fixture(scope="module")
def options():
    """module -> {option: check of its value}, from the parsers that its main() makes."""
    patch = pytest.MonkeyPatch()

    def found(*args, **kwargs):
        raise _Found(args[0])

    patch.setattr(argparse.ArgumentParser, "parse_args", found)
    patch.setattr(app, "run", found)
    known = {}

    def of(module):
        if module not in known:
            package = importlib.util.find_spec(module).submodule_search_locations
            before = set(flags.FLAGS)
            try:
                importlib.import_module(f"{module}.__main__" if package else module).main()
            except _Found as caught:
                parser = caught.args[0]
            new = set(flags.FLAGS) - before
            known[module] = (
                {name: _choice(action.choices, action.type) for name, action in parser._option_string_actions.items()}
                if isinstance(parser, argparse.ArgumentParser)
                else {f"--{name}": flags.FLAGS[name].parser.parse for name in new} | {"--dry-run": bool}
            )
            for name in new:
                delattr(flags.FLAGS, name)
        return known[module]

    yield of
    patch.undo()


def _choice(choices, kind):
    def parse(value):
        value = (kind or str)(value)
        assert choices is None or value in choices, f"{value} is not one of {choices}"

    return parse


@pytest.mark.parametrize("page", [page for page, text in SHOWN.items() if any(commands(text))])
def test_the_commands_of_a_page_are_understood(page, options):
    for module, words in commands(SHOWN[page]):
        command = f"{page}: python -m {module} {' '.join(words)}"
        assert importlib.util.find_spec(module), command
        if module == "pytest":
            assert all(_there(word, page) for word in words if word.endswith(".py")), command
        if module.partition(".")[0] not in ("experiments", "benchmarks"):
            continue
        known = options(module)
        for word, value in zip(words, [*words[1:], "--"]):
            name, equals, given = word.partition("=")
            if not name.startswith("--"):
                continue
            assert name in known, f"{command}: {module} has no {name}; it has {sorted(known)}"
            value = given if equals else value
            if (
                not value
                or value.startswith("--")
                or value.isupper()
                or "$" in value
                or "NAME" in value
                or value == "a.b=c"
            ):
                continue  # no value, or one for the reader to fill in
            known[name](value)
            if name == "--set" and f"+    c.{value.partition('=')[0]} = " not in SHOWN[page]:  # which a page may add
                cli.override(defaults(), value)
            if name == "--config" and value.endswith(".py"):
                assert _there(value, page), command


def _there(path, page):
    """Whether a file exists, or is the one that a page has its reader write."""
    return any(ROOT.glob(path)) or f": `{path}`\n" in SHOWN[page]


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in PAGES.items():
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{page}: make {target}"


def test_the_architecture_lists_the_rooms_in_the_order_of_their_imports():
    text = PAGES["docs/architecture.md"].partition("## Rooms")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    order = [room for row in rows for room in re.findall(r"`(\w+)`", row)]
    assert sorted(order) == sorted(ROOMS)
    for path in (ROOT / "jdiff").rglob("*.py"):
        package = path.relative_to(ROOT).with_suffix("").parts
        for name in imports(ast.parse(path.read_text()), list(package[:-1])):
            top, *rest = name.split(".")
            if top == "jdiff" and rest and package[1] in order:
                assert order.index(rest[0]) <= order.index(package[1]), f"{path.name} imports {name}"
    flow = PAGES["docs/architecture.md"].partition("## From a configuration")[2].partition("\n## ")[0]
    for module, name in re.findall(r"`([\w.]+)\.(\w+)`", flow):
        top = (
            ""
            if module.startswith("jdiff")
            else "experiments."
            if importlib.util.find_spec(f"experiments.{module}")
            else "jdiff."
        )
        assert hasattr(importlib.import_module(top + module), name), f"{module}.{name}"


def test_every_public_module_has_a_page_and_docstrings_become_what_they_say():
    """docs/api_reference.py: the list of modules, and docstrings into reStructuredText."""
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "docs" / "api_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    modules = reference.public_modules()
    assert {"jdiff", "jdiff.sde", "jdiff.solvers", "jdiff.nn", "jdiff.importers.score_sde"} <= set(modules)
    assert not [name for name in modules if "._" in name or name.startswith("jdiff.solvers.")]
    for name in modules:
        page = reference.page(name)
        for public in reference.names(importlib.import_module(name)):
            assert re.search(rf"\b{re.escape(name)}(\.\w+)?\.{public}\b", page), f"{name}.{public}"
    text = ["Return a * b of *all* `process`es and `x[0] +\n1`.", "", "    |x|_2 * y", "", "After x_, done."]
    lines = "\n".join(text).split("\n")
    expected = [
        r"Return a \* b of *all* `process`\ es and ``x[0] + 1``.",
        "",
        "::",
        "",
        "    |x|_2 * y",
        "",
        r"After x\_, done.",
    ]
    assert reference.markup(lines) == expected
