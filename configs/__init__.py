"""Configurations: one file an experiment; the docstring holds command, duration and expected number."""
