"""The one training loop, and the recipes built on it."""
