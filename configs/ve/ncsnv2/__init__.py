"""NCSNv2 (Song and Ermon 2020, arXiv 2006.09011) as Song et al. 2021 have it."""
