"""Consortia simulated on one machine: the in-process runner that is the reference, and the benchmark."""

import chainward_shared  # noqa: F401  before PyTorch: it says how threads wait
