"""Rows of Song et al. 2021 (arXiv 2011.13456) with the process variance preserving."""
