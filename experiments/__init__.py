"""Scripts: a configuration and a run folder in, checkpoints, numbers and pictures out."""
