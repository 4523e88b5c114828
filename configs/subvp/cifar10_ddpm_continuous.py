"""DDPM on CIFAR-10, sub-VP, continuous times: a row of Song et al. 2021 (arXiv 2011.13456).

    python -m experiments.reproduce --row subvp/cifar10_ddpm_continuous --path CHECKPOINT
    python -m experiments.train --config configs/subvp/cifar10_ddpm_continuous.py --workdir RUN

Published (Tables 2 and 3): 3.05 bits/dim; FID 3.56 (ODE).
Network: 35,218,947 parameters.
Training: 1,300,001 steps of 128 images; derived: 166.4 million images, 3,328 epochs.
"""

from ml_collections import ConfigDict

from configs import song2021


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is the same on a small network and the digits, for seconds."""
    c = song2021.ddpm(song2021.subvp())
    return song2021.smoke(c) if mode == "smoke" else c
