"""NCSNv2 on LSUN bedrooms 128x128, VE, discrete scales: a row of Song et al. 2021 (arXiv 2011.13456).

    python -m experiments.reproduce --row ve/ncsnv2/bedroom --path CHECKPOINT
    python -m experiments.train --config configs/ve/ncsnv2/bedroom.py --workdir RUN

Published: no number in Tables 2 and 3 for this row.
Network: 83,445,379 parameters.
Training: 2,400,001 steps of 128 images; derived: 307.2 million images.
The reference's file sets a misspelt "continuouse"; its network takes discrete scales alone, as here.
"""

from ml_collections import ConfigDict

from configs import song2021


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is the same on a small network and the digits, for seconds."""
    c = song2021.ncsnv2(song2021.ve(190.0), scales=1086, size=128)
    c.data.name = "bedroom_128"
    c.data.size = 128
    c.training.steps = song2021.LARGE_STEPS
    c.training.ema_decay = 0.9999
    c.sampling.snr = 0.095
    c.sampling.corrector_steps = 3
    return song2021.smoke(c) if mode == "smoke" else c
