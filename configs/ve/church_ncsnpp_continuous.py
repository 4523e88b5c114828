"""NCSN++ on LSUN churches 256x256, VE, continuous times: a row of Song et al. 2021 (arXiv 2011.13456).

    python -m experiments.reproduce --row ve/church_ncsnpp_continuous --path CHECKPOINT
    python -m experiments.train --config configs/ve/church_ncsnpp_continuous.py --workdir RUN

Published: no number in Tables 2 and 3 for this row.
Network: 65,574,549 parameters.
Training: 2,400,001 steps of 64 images; derived: 153.6 million images.
"""

from ml_collections import ConfigDict

from configs import song2021


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is the same on a small network and the digits, for seconds."""
    c = song2021.large_ncsnpp("church_256", 380.0)
    return song2021.smoke(c) if mode == "smoke" else c
