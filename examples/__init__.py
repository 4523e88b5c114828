"""Scripts that use jdiff as a stranger would: with the library alone, nothing of experiments/."""
