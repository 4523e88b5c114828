"""NCSNv2 on CelebA 64x64, VE, discrete scales: a row of Song et al. 2021 (arXiv 2011.13456).

    python -m experiments.reproduce --row ve/ncsnv2/celeba --path CHECKPOINT
    python -m experiments.train --config configs/ve/ncsnv2/celeba.py --workdir RUN

Published: no number in Tables 2 and 3 for this row.
Network: 33,970,563 parameters.
Training: 1,300,001 steps of 128 images; derived: 166.4 million images.
"""

from ml_collections import ConfigDict

from configs import song2021


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is the same on a small network and the digits, for seconds."""
    c = song2021.ncsnv2(song2021.ve(90.0), scales=500)
    c.data.name = "celeba_64"
    c.data.size = 64
    c.sampling.snr = 0.128
    return song2021.smoke(c) if mode == "smoke" else c
