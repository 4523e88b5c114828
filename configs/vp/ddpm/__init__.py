"""DDPM (Ho et al. 2020, arXiv 2006.11239) as Song et al. 2021 trained it."""
