"""Data: the same images for everybody, the same global batches for any number of processes, clear words when not."""

import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from jdiff import data


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data directory with the digits, and sets with PNG images as TFDS's own have them."""
    directory = tmp_path_factory.mktemp("tfds")
    data.load("digits", "test", data_dir=directory)
    with data.prepared._quiet():
        for builder in (Colours, Ragged, Wordy, Graded, Split):
            builder(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


class _Small(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = tfds.features.FeaturesDict(self.columns())
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}


def colours(number):
    return np.random.default_rng(number).integers(0, 256, (5, 4, 3), np.uint8)


class Colours(_Small):
    def columns(self):
        return {"image": tfds.features.Image(shape=(5, 4, 3))}

    def _generate_examples(self):
        for number in range(7):
            file = io.BytesIO()
            Image.fromarray(colours(number)).save(file, "png")
            file.seek(0)
            yield number, {"image": file}


class Ragged(Colours):
    def columns(self):
        return {"image": tfds.features.Image(shape=(None, None, 3))}


class Wordy(_Small):
    def columns(self):
        return {"text": tfds.features.Text()}

    def _generate_examples(self):
        yield 0, {"text": "no image"}


class Graded(_Small):
    KIND, LABELS = np.float32, (0.7, 1.2)

    def columns(self):
        image = tfds.features.Tensor(shape=(1, 1, 1), dtype=np.uint8)
        return {"image": image, "label": tfds.features.Scalar(self.KIND)}

    def _generate_examples(self):
        for number, label in enumerate(self.LABELS):
            yield number, {"image": np.zeros((1, 1, 1), np.uint8), "label": label}


class Split(Graded):
    KIND, LABELS = np.bool_, (True, False)


@pytest.fixture(scope="module")
def digits(data_dir):
    return data.load("digits", "train", data_dir=data_dir)


def test_digits_are_scikit_learns_in_the_promised_order(data_dir):
    raw = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    seen = 0
    for split, size in {"train": 1350, "validation": 150, "test": 297}.items():
        source = data.load("digits", split, data_dir=data_dir)
        assert (len(source), source.shape, source.levels, source.classes) == (size, (8, 8, 1), 17, 10)
        part, arrays = order[seen : seen + size], source.arrays()
        assert arrays["image"].dtype == np.uint8 and arrays["label"].dtype == np.int32
        np.testing.assert_array_equal(arrays["image"][..., 0], raw.images[part])
        np.testing.assert_array_equal(arrays["label"], raw.target[part])
        seen += size
    assert seen == 1797
    last = source[-1]
    np.testing.assert_array_equal(last["image"][..., 0], raw.images[order[-1]])
    with pytest.raises(IndexError, match="297"):
        source[297]


def test_slices_of_splits(data_dir):
    whole = data.load("digits", "train", data_dir=data_dir)
    part = data.load("digits", "train[100:110]", data_dir=data_dir)
    np.testing.assert_array_equal(part.arrays()["image"], whole.read(np.arange(100, 110))["image"])


def test_png_images_without_labels(data_dir):
    source = data.load("colours", "train", data_dir=data_dir)
    assert (source.levels, source.classes, source.shape) == (256, None, (5, 4, 3))
    arrays = source.arrays()
    assert list(arrays) == ["image"]
    np.testing.assert_array_equal(arrays["image"], [colours(number) for number in range(7)])
    assert set(next(data.batches(source, 2, seed=0))) == {"image", "index"}


def test_labels_of_two_kinds_are_integers(data_dir):
    labels = data.load("split", "train", data_dir=data_dir).arrays()["label"]
    np.testing.assert_array_equal(labels, np.array([1, 0], np.int32), strict=True)


FIRST_USE = """
import sys, hashlib
import jdiff.data
import sklearn.datasets, jdiff.data.digits  # what the first use imports
print("ready", flush=True)
sys.stdin.readline()  # all start at once
source = jdiff.data.load("digits", "test")
print(hashlib.sha256(source.arrays()["image"].tobytes()).hexdigest())
"""


def test_first_use_by_several_processes(tmp_path, data_dir):
    environment = {"TFDS_DATA_DIR": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_USE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = pathlib.Path(__file__).parents[1]
    processes = [subprocess.Popen(command, env=environment, cwd=root, **pipes) for _ in range(2)]
    ready = [process.stdout.readline() for process in processes]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=240) for process in processes]
    assert ready == ["ready\n"] * 2, (ready, outputs)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1 and len(outputs[0][0].split()) == 1, outputs  # nothing else is printed
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]  # no half-written folder is left


def test_a_failed_first_use_leaves_nothing_behind(tmp_path, monkeypatch):
    from jdiff.data.digits import Digits

    def broken(self, images, labels):
        yield 0, {"image": images[0], "label": 0}
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Digits, "_generate_examples", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            data.load("digits", "test", data_dir=tmp_path)
    assert list((tmp_path / "digits").iterdir()) == []
    assert data.prepare("digits", data_dir=tmp_path) == str(tmp_path / "digits" / "1.0.0")
    assert len(data.load("digits", "test", data_dir=tmp_path)) == 297


def test_the_slower_of_two_processes_takes_what_the_faster_one_wrote(tmp_path, data_dir, monkeypatch):
    rename = os.rename

    def slower(source, goal):
        if pathlib.Path(goal) == tmp_path / "digits" / "1.0.0":
            shutil.copytree(data_dir / "digits" / "1.0.0", goal)
        rename(source, goal)

    monkeypatch.setattr(os, "rename", slower)
    assert len(data.load("digits", "test", data_dir=tmp_path)) == 297
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_data_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.data_directory() == str(tmp_path / "tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", "~/elsewhere")
    assert data.data_directory() == str(tmp_path / "elsewhere")
    assert data.data_directory("/given") == "/given"


@pytest.mark.parametrize("name", ["cifar10", "digits/other", "digits:2.0.0", "colours:1.0.0"])
def test_unprepared_dataset_is_named_before_any_download(name, data_dir, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, "train", data_dir=data_dir)
    message = str(caught.value)
    assert f"{data_dir}/{name.split('/')[0].split(':')[0]}" in message
    # The last line is a command to paste; the Python in it must at least compile.
    command = message.splitlines()[-1].strip()
    assert command.startswith("python -c '") and f'"{data_dir}"' in command
    compile(command.split("'")[1], "command", "exec")


def test_unwritable_data_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="TFDS_DATA_DIR"):
        data.load("digits", "train", data_dir=tmp_path / "file" / "below")


def test_nothing_is_prepared_in_a_bucket(tmp_path, monkeypatch):
    """pathlib would make the folder gs: in the working directory, and array_record opens no URL to write."""
    from etils import epath

    place = "gs://bucket/tfds"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(epath.Path(place)), "is_dir", lambda self: False)  # an empty bucket
    for name, ask in (("digits", lambda: data.load("digits", "train", data_dir=place)),
                      ("digits", lambda: data.prepare("digits", data_dir=place)),
                      ("mnist", lambda: data.prepare("mnist", data_dir=place))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} cannot be prepared in {place}, which is a URL: .* on a disk"):
            ask()
    assert not list(tmp_path.iterdir())


def test_newest_version_wins(tmp_path, data_dir):
    for version in ("1.2.0", "1.10.0", "1.9.0"):
        goal = tmp_path / "colours" / version
        shutil.copytree(data_dir / "colours" / "1.2.0", goal)
        info = json.loads((goal / "dataset_info.json").read_text())
        (goal / "dataset_info.json").write_text(json.dumps(info | {"version": version}))
    (tmp_path / "colours" / "2.0.0").mkdir()  # a download cut off
    parts = data.prepared._parse("colours")
    assert data.prepared._find("colours", parts, tmp_path).endswith("1.10.0")
    assert len(data.load("colours:1.9.0", "train", data_dir=tmp_path)) == 7


def test_other_file_formats_are_refused(tmp_path, data_dir):
    shutil.copytree(data_dir / "colours", tmp_path / "colours")
    path = tmp_path / "colours" / "1.2.0" / "dataset_info.json"
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="stored as tfrecord, which has no random access"):
        data.load("colours", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "match"),
    [
        ("digits", "dev", "no split 'dev'.*'validation': 150"),
        ("digits", "train[5:5]", "empty"),
        ("ragged", "train", "one size"),
        ("wordy", "train", "no feature named 'image'.*text"),
        ("graded", "train", "labels of graded have dtype float32"),
        ("di gits", "train", "name/config"),
    ],
)
def test_bad_datasets_and_splits(name, split, match, data_dir):
    with pytest.raises(ValueError, match=match):
        data.load(name, split, data_dir=data_dir)


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "grain"])
def test_missing_packages_say_how_to_get_them(missing, digits, data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install jdiff\[experiments\]"):
        data.batches(data.load("digits", "train", data_dir=data_dir), 2, seed=0)


# The order ------------------------------------------------------------------------------------------------------------


def numbered(size):
    """A source whose images and labels are their own position."""
    image = np.arange(size, dtype=np.uint16).reshape(size, 1, 1, 1)
    return data.from_arrays(image, np.arange(size), levels=max(size, 2))


def draw(source, steps, batch_size, state=None, **options):
    iterator = data.batches(source, batch_size, **options)
    if state is not None:
        iterator.set_state(state)
    return [next(iterator) for _ in range(steps)], iterator


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def test_every_epoch_is_a_permutation_of_its_own():
    order = labels(draw(numbered(21), 12, 7, seed=5)[0]).reshape(4, 21)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(21), (4, 1)))
    assert len({tuple(epoch) for epoch in order}) == 4
    assert tuple(order[0]) != tuple(range(21))
    np.testing.assert_array_equal(labels(draw(numbered(21), 3, 7, seed=5)[0]), order[0])
    assert not np.array_equal(labels(draw(numbered(21), 3, 7, seed=6)[0]), order[0])
    np.testing.assert_array_equal(labels(draw(numbered(5), 4, 3, seed=0, shuffle=False)[0]), np.arange(12) % 5)


def test_batches_straddle_epochs_without_loss():
    order = labels(draw(numbered(10), 15, 4, seed=1)[0])
    np.testing.assert_array_equal(np.sort(order.reshape(6, 10), axis=1), np.tile(np.arange(10), (6, 1)))


@pytest.mark.parametrize("count", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(count):
    alone, _ = draw(numbered(30), 9, 8, seed=3)
    shares = [draw(numbered(30), 9, 8, seed=3, process_index=p, process_count=count)[0] for p in range(count)]
    for step, batch in enumerate(alone):
        assert set(batch) == {"image", "label", "index"}
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([share[step][name] for share in shares]), batch[name])
        np.testing.assert_array_equal(batch["index"], np.arange(8))
        assert batch["index"].dtype == np.int32


def test_state_continues_exactly_also_on_another_number_of_processes():
    whole, _ = draw(numbered(30), 12, 8, seed=3)
    _, iterator = draw(numbered(30), 5, 8, seed=3, process_index=1, process_count=2)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed, _ = draw(numbered(30), 7, 8, state, seed=3)
    np.testing.assert_array_equal(labels(resumed), labels(whole[5:]))
    shares = [draw(numbered(30), 7, 8, state, seed=3, process_index=p, process_count=4)[0] for p in range(4)]
    merged = [np.concatenate([share[step]["label"] for share in shares]) for step in range(7)]
    np.testing.assert_array_equal(np.concatenate(merged), labels(whole[5:]))


def test_files_and_memory_give_the_same_batches(digits):
    on_disk, _ = draw(digits, 3, 64, seed=0)
    in_memory, _ = draw(digits.in_memory(), 3, 64, seed=0)
    for a, b in zip(on_disk, in_memory):
        assert a["image"].shape == (64, 8, 8, 1) and a["image"].dtype == np.uint8
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(("size", "batch_size", "count"), [(10, 4, 1), (10, 4, 2), (3, 8, 4), (8, 4, 2)])
def test_evaluation_covers_each_example_once(size, batch_size, count):
    source = numbered(size)
    shares = [
        list(data.evaluation_batches(source, batch_size, process_index=p, process_count=count)) for p in range(count)
    ]
    seen = []
    for step in zip(*shares, strict=True):
        batch = {name: np.concatenate([share[name] for share in step]) for name in step[0]}
        assert batch["image"].shape == (batch_size, 1, 1, 1) and batch["mask"].dtype == bool
        np.testing.assert_array_equal(batch["label"][batch["mask"]], batch["index"][batch["mask"]])
        seen.append(batch)
    np.testing.assert_array_equal(np.concatenate([batch["label"][batch["mask"]] for batch in seen]), np.arange(size))
    index = np.concatenate([batch["index"] for batch in seen])
    np.testing.assert_array_equal(index, np.arange(len(seen) * batch_size))
    later = list(data.evaluation_batches(source, batch_size, start=1))
    assert len(later) == len(seen) - 1
    if later:
        np.testing.assert_array_equal(later[0]["index"], seen[1]["index"])


# Bad input ------------------------------------------------------------------------------------------------------------

IMAGES = np.zeros((4, 2, 2, 1), np.uint8)
NAN = np.zeros((4, 2, 2, 1))
NAN[2, 0, 1, 0] = np.nan


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: data.from_arrays(IMAGES[:0]), ValueError, "arrays/train is empty"),
        (lambda: data.from_arrays(NAN), ValueError, "image 2 .* NaN"),
        (lambda: data.from_arrays(NAN[:2]), TypeError, "integer levels, got float64"),
        (lambda: data.from_arrays(IMAGES[0]), ValueError, r"\(N, H, W, C\)"),
        (lambda: data.from_arrays(IMAGES + 20, levels=17), ValueError, "levels 20 to 20, levels=17 allows 0 to 16"),
        (lambda: data.from_arrays(IMAGES.astype(np.int8) - 1), ValueError, "levels -1 to -1"),
        (lambda: data.from_arrays(IMAGES, levels=1), ValueError, "at least 2"),
        (lambda: data.from_arrays(IMAGES, [0, 1]), ValueError, "labels"),
        (lambda: data.from_arrays(IMAGES, [0.0, 1.0, 2.0, 3.0]), TypeError, "labels .* integers"),
        (lambda: data.from_arrays(IMAGES, [0, 1, 2, 3], classes=3), ValueError, "outside of 0 to 2"),
        (lambda: data.batches(numbered(3), 0, seed=0), ValueError, "batch_size must be at least 1"),
        (lambda: data.batches(numbered(3), 3, seed=0, process_count=2), ValueError, "not a multiple"),
        (lambda: data.batches(numbered(3), 2, seed=0, process_index=2, process_count=2), ValueError, "got 2 of 2"),
        (lambda: data.batches(numbered(3), 2, seed=-1), ValueError, "seed"),
        (lambda: data.evaluation_batches(numbered(3), 2, start=3), ValueError, r"start must be in \[0, 2\]"),
        (lambda: data.evaluation_batches(numbered(3), 3, process_count=2), ValueError, "not a multiple"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
