"""Consortia simulated on one machine: the in-process runner that is the reference, and the benchmark."""
