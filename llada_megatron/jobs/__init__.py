"""Runs as Slurm jobs. Standard library only: the batch script calls it with any Python of a node."""
