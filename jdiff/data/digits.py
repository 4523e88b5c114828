"""The handwritten digits that scikit-learn ships, as a TFDS dataset: 1,797 images, 8x8, 17 grey levels, no download."""

import numpy as np
import tensorflow_datasets as tfds

__all__ = ["Digits"]

SIZES = {"train": 1350, "validation": 150, "test": 297}


class Digits(tfds.core.GeneratorBasedBuilder):
    """Optical recognition of handwritten digits (Alpaydin and Kaynak 1998, doi:10.24432/C50P49), from scikit-learn.

    ``image`` (8, 8, 1) uint8 with levels 0 to 16, ``label`` 0 to 9. The order is ``RandomState(0).permutation(1797)``:
    the first 1,350 are `train`, the next 150 `validation`, the last 297 `test`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The 8x8 handwritten digits of scikit-learn, 17 grey levels.",
            features=tfds.features.FeaturesDict(
                {
                    # Not an Image: writing PNG takes TensorFlow, reading it Pillow, and 64 bytes need neither.
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            metadata=tfds.core.MetadataDict(levels=17),
            disable_shuffling=True,  # the files keep the order of the permutation
            homepage="https://doi.org/10.24432/C50P49",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        from sklearn.datasets import load_digits  # two seconds of imports, needed once

        digits = load_digits()
        # RandomState's stream is frozen for all NumPy versions, so the splits are the same everywhere and for ever.
        order = np.random.RandomState(0).permutation(len(digits.target))
        parts = np.split(order, np.cumsum(list(SIZES.values()))[:-1])
        return {
            split: self._generate_examples(digits.images[part].astype(np.uint8)[..., None], digits.target[part])
            for split, part in zip(SIZES, parts)
        }

    def _generate_examples(self, images, labels):
        for number, (image, label) in enumerate(zip(images, labels)):
            yield number, {"image": image, "label": int(label)}
