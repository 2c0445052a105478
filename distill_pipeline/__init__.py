"""Distil a large language model into a small one, from a prompt pool to an evaluated student, with lineage."""

__version__ = "0.1.0"
