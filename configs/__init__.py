"""Experiments: one file each, `--config NAME[:variant]` or by path."""
