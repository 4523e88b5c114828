"""The examples run, and each tutorial's page is what its script says."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from examples import render

ROOT = pathlib.Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "examples").glob("tutorial_*.py"))
PAGES = ROOT / render.PAGES
PICTURES = ROOT / "docs" / "images" / "tutorials"


def _start(script, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--small"])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(folder)
    return runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")


def test_minimal_trains_samples_and_evaluates(tmp_path, monkeypatch, capsys):
    found = _start("minimal.py", tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert re.fullmatch(r"step 0: .*\nnew points: +-\d+\.\d+ nats .*, -?\d+\.\d+ in truth\n.* in truth\n", out)
    assert found["samples"].shape == (64, 2) and int(found["state"].step) == 20


def test_the_toy_makes_its_picture(tmp_path, monkeypatch, capsys):
    found = _start("tutorial_1_toy.py", tmp_path, monkeypatch)
    assert "nats, at best -2.079" in capsys.readouterr().out
    assert (tmp_path / "docs" / "images" / "tutorials" / "toy.png").stat().st_size > 1000
    x = found["chessboard"](4000)
    assert set(np.floor(x).sum(axis=1).astype(int) % 2) == {0} and len(np.unique(np.floor(x), axis=0)) == 8


def test_what_was_promised_of_lengths():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py")}
    assert lines["tutorial_1_toy.py"] < 100 and lines["minimal.py"] <= 80
    assert f"trains and samples in {lines['minimal.py']} lines" in (ROOT / "README.md").read_text()
    assert len(TUTORIALS) == 5


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_a_page_is_its_script_with_outputs_and_pictures(script):
    rendered = (PAGES / f"{script.stem}.md").read_text()
    again = f"python -m examples.render examples/{script.name}"
    assert render.without_outputs(rendered) == render.page(script.read_text()), f"render it again: {again}"
    assert rendered.count("```text") >= 1 and f"Made by `{again}` in " in rendered
    prose = "".join(text for _, kind, text in render.cells(script.read_text()) if kind == "text")
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        assert link.startswith("http") or (PAGES / link.partition("#")[0]).exists(), link


def test_pictures_are_small_and_all_in_use():
    pages = "".join(path.read_text() for path in PAGES.glob("*.md"))
    pictures = sorted(PICTURES.iterdir())
    assert pictures
    for picture in pictures:
        assert f"../images/tutorials/{picture.name}" in pages and picture.stat().st_size < 100 * 1024, picture


SCRIPT = '''"""A title.

An introduction.
"""

# %%
a = 1
print("one", a)

# %% [markdown]
# Text, and a list:
#
# - of code
#
#       indented

# %%
def f():
    # a comment
    return a + 1


# %%
print(f() / 0)
'''

PAGE = """# A title

An introduction.

```python
a = 1
print("one", a)
```

Text, and a list:

- of code

      indented

```python
def f():
    # a comment
    return a + 1
```

```python
print(f() / 0)
```
"""


def test_a_page_is_made_of_cells(tmp_path, capsys):
    assert render.page(SCRIPT) == PAGE
    shown = render.page(SCRIPT, ["", "one 1\n", "", "", "2\n"])
    assert shown.count("```text") == 2 and 'print("one", a)\n```\n\n```text\none 1\n```\n\nText' in shown
    assert render.without_outputs(f"{shown}\n---\n\nMade by hand.\n") == PAGE
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    with pytest.raises(ZeroDivisionError) as caught:
        render.run(path)
    assert capsys.readouterr().out == "one 1\n"
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (
        path,
        SCRIPT.splitlines().index("print(f() / 0)") + 1,
    )


def _fake_mnist(folder):
    """Write the digits, enlarged, as an MNIST of TFDS's format."""
    import tensorflow_datasets as tfds
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.kron(digits.images[:128], np.ones((1, 3, 3)))
    images = np.pad(images * 255 / 16, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)[..., None]

    class Mnist(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 96), "test": self._generate_examples(96, 128)}

        def _generate_examples(self, start, end):
            for n in range(start, end):
                yield n, {"image": images[n], "label": int(digits.target[n])}

    Mnist(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.mark.slow
@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_every_tutorial_runs(script, tmp_path):
    if "mnist" in script.name:
        _fake_mnist(tmp_path)
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    env |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "TFDS_DATA_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, script, "--small"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    drawn = {path.name for path in (tmp_path / "docs" / "images" / "tutorials").iterdir()}
    assert drawn == set(re.findall(r"images/tutorials/([\w.]+)", script.read_text()))
