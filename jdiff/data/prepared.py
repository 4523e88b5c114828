"""Datasets on disk: where they are looked for, how they are opened, and what is said when they are not there."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from jdiff.data.optional import require
from jdiff.data.sources import Source

__all__ = ["data_directory", "load", "prepare"]

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.\-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_DIGITS_VERSION = "1.0.0"


def data_directory(data_dir: str | os.PathLike | None = None) -> str:
    """Where the datasets are: the argument, else ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``, TFDS's own.

    Raises:
      TypeError: data_dir is no path.
    """
    if not isinstance(data_dir, str | os.PathLike | None):
        raise TypeError(f"data_dir must be a path or None, got {data_dir!r}")
    return os.path.expanduser(os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def load(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> Source:
    """Open a split of a prepared image dataset. Nothing is ever downloaded here.

    ``digits`` (scikit-learn's 8x8 digits, see `jdiff.data.digits`) is written into the data directory when it is first
    asked for, safely also from several processes at once.

    Args:
      name: as TFDS spells it: ``digits``, ``mnist``, ``cifar10``, ``name/config:1.0.0``; the newest version by default.
      split: a split or a slice of one, as TFDS spells it: ``train``, ``train[:45000]``, ``test[50%:]``.
      data_dir: see `data_directory`.

    Returns:
      A `Source`. Its ``levels`` is the entry of that name in the dataset's TFDS metadata (17 for the digits), else all
      that the dtype can hold (256 for uint8).

    Raises:
      FileNotFoundError: not prepared in the data directory; the message names it and the command that prepares it.
      ValueError: a name that is none, no such split, an empty split, images of varying size, labels that are no
        integers, a file format without random access, digits that are not in a data_dir that is a URL.
      TypeError: name or split are no strings, data_dir is no path.
      ImportError: TensorFlow Datasets is not installed.
    """
    parts = _parse(name)
    if not isinstance(split, str):
        raise TypeError(f"split must be a string such as 'train' or 'train[:90%]', got {split!r}")
    tfds = require("tensorflow_datasets")
    directory = _find(name, parts, data_dir)
    builder = tfds.builder_from_directory(directory)
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{name} in {directory} is stored as {builder.info.file_format.value}, which has no random access; it must "
            f"be array_record: move that directory away and prepare it again (this downloads) with\n"
            f"    {_command(name, data_dir)}"
        )
    size = _split_size(builder, name, split)
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"{name} has no feature named 'image', only {sorted(features)}")
    image = features["image"]
    if len(image.shape) != 3 or None in image.shape or not np.issubdtype(image.np_dtype, np.unsignedinteger):
        raise ValueError(
            f"images of {name} have shape {image.shape} and dtype {np.dtype(image.np_dtype)}; jdiff reads unsigned "
            "integer images of one size: bring them to one size when the dataset is prepared"
        )
    label = features["label"] if "label" in features and not features["label"].shape else None
    if label is not None and not np.issubdtype(label.np_dtype, np.integer) and label.np_dtype != np.bool_:
        raise ValueError(
            f"labels of {name} have dtype {np.dtype(label.np_dtype)}; jdiff reads classes as integers: give that "
            "feature another name when the dataset is prepared"
        )
    examples = builder.as_data_source(split=split)

    def read(positions: np.ndarray) -> dict[str, np.ndarray]:
        rows = examples.__getitems__([int(position) for position in positions])
        arrays = {"image": np.stack([row["image"] for row in rows])}
        if label is not None:
            arrays["label"] = np.asarray([row["label"] for row in rows], np.int32)
        return arrays

    return Source(
        name=name,
        split=split,
        size=size,
        shape=tuple(image.shape),
        dtype=np.dtype(image.np_dtype),
        levels=int((builder.info.metadata or {}).get("levels", np.iinfo(image.np_dtype).max + 1)),
        classes=getattr(label, "num_classes", None),
        read=read,
        version=str(builder.info.version),
    )


def prepare(name: str, *, data_dir: str | os.PathLike | None = None) -> str:
    """Prepare a dataset in the array_record format, downloading what TFDS needs for it (nothing for ``digits``).

    The preparation of some datasets (``mnist`` among them) needs TensorFlow; reading them does not. They can be
    prepared on another machine and the folder be copied.

    Returns:
      The directory of the prepared dataset.

    Raises:
      ValueError: a name that is none, a data directory that is a URL (a bucket): files are written to disks only.
      TypeError: name is no string, data_dir no path.
      ImportError: TensorFlow Datasets, or a package that the preparation of this dataset needs, is not installed.
      PermissionError: the data directory cannot be written.
    """
    if _is_digits(_parse(name)):
        return _prepare_digits(data_dir)
    tfds, directory = require("tensorflow_datasets"), _disk(name, data_dir)
    builder = tfds.builder(name, data_dir=directory, file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise ImportError(
            f"preparing {name} needs a package that is not installed ({error}); prepare it once where it is "
            "(for TensorFlow: pip install tensorflow-cpu). The result is read without it"
        ) from error
    return os.fspath(builder.data_dir)


def _parse(name: str) -> dict[str, str | None]:
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"name must be as name, name/config or name/config:1.0.0, got {name!r}")
    return match.groupdict()


def _is_digits(parts: dict[str, str | None]) -> bool:
    return parts["name"] == "digits" and not parts["config"] and parts["version"] in (None, _DIGITS_VERSION)


def _find(name: str, parts: dict[str, str | None], data_dir: str | os.PathLike | None) -> str:
    """The directory of the newest (or the named) prepared version; the first use of the digits prepares them."""
    from etils import epath  # comes with TFDS; the data directory may be a bucket

    folder = epath.Path(data_directory(data_dir)) / parts["name"] / (parts["config"] or "")
    versions = [path.name for path in folder.iterdir() if _VERSION.fullmatch(path.name)] if folder.is_dir() else []
    versions = [version for version in versions if parts["version"] in (None, version)]
    versions = [version for version in versions if (folder / version / "dataset_info.json").exists()]
    if versions:
        return os.fspath(folder / max(versions, key=lambda version: [int(number) for number in version.split(".")]))
    if _is_digits(parts):
        return _prepare_digits(data_dir)
    raise FileNotFoundError(
        f"dataset {name!r} is not prepared: there is no {folder}/{parts['version'] or '<version>'}/dataset_info.json. "
        "Point TFDS_DATA_DIR (or data_dir) at the directory that holds it, or prepare it there (this downloads) with\n"
        f"    {_command(name, data_dir)}"
    )


def _disk(name: str, data_dir: str | os.PathLike | None) -> str:
    """The data directory, to write to: array_record reads gs:// and does not write it."""
    directory = data_directory(data_dir)
    if "://" in directory:
        raise ValueError(
            f"{name} cannot be prepared in {directory}, which is a URL: prepare it in a folder on a disk (data_dir or "
            "TFDS_DATA_DIR) and copy what is in there"
        )
    return directory


def _command(name: str, data_dir: str | os.PathLike | None) -> str:
    return f"""python -c 'import jdiff.data; jdiff.data.prepare("{name}", data_dir="{data_directory(data_dir)}")'"""


def _split_size(builder: Any, name: str, split: str) -> int:
    known = {key: value.num_examples for key, value in builder.info.splits.items()}
    try:
        size = builder.info.splits[split].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(f"{name} has no split {split!r}; it has {known} and slices such as 'train[:90%]'") from error
    if size == 0:
        raise ValueError(f"split {split!r} of {name} is empty; it has {known}")
    return size


def _prepare_digits(data_dir: str | os.PathLike | None) -> str:
    """Write the digits into a folder of our own beside the goal and move it there at once.

    Processes that come first at the same time all write the same images and one of them wins; none sees half a dataset.
    """
    goal = pathlib.Path(_disk("digits", data_dir)) / "digits" / _DIGITS_VERSION
    if (goal / "dataset_info.json").exists():
        return os.fspath(goal)
    for name in ("sklearn.datasets", "tensorflow_datasets"):
        require(name)
    from jdiff.data.digits import Digits

    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".prepare-", dir=goal.parent)
    except OSError as error:
        raise PermissionError(
            f"the digits are to be written to {goal}, which cannot be done ({error}); "
            "choose another directory by data_dir or TFDS_DATA_DIR"
        ) from error
    try:
        with _quiet():
            builder = Digits(data_dir=work, file_format="array_record")
            builder.download_and_prepare()
        try:
            os.rename(builder.data_dir, goal)
        except OSError:  # another process was faster, which is as good
            if not (goal / "dataset_info.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return os.fspath(goal)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS announces itself on stdout and draws progress bars on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
