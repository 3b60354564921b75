"""Benchmarks: the training loop against plain PyTorch, and where the time and memory of a whole Flower run go.

``python simulations/benchmark --help`` runs them.
"""
