"""What the coordinator runs."""

import chainward_shared  # noqa: F401  before PyTorch: it says how threads wait
