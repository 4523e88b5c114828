"""Image datasets on the host: TFDS array records read with Grain, no TensorFlow.

``load(name, split)`` opens a `Source` of integer images; ``batches`` draws an endless training order from it, with a
state that can be saved; ``evaluation_batches`` visits every example exactly once. Randomness that touches pixels
(flips, dequantisation) comes later, on the device, from per-example keys: see `jdiff.transforms`.

TensorFlow Datasets and Grain are imported on first use; they come with ``pip install jdiff[experiments]``.
"""

from jdiff.data.iterators import batches, evaluation_batches
from jdiff.data.prepared import data_directory, load, prepare
from jdiff.data.sources import Source, from_arrays

__all__ = ["Source", "batches", "data_directory", "evaluation_batches", "from_arrays", "load", "prepare"]
