"""What a hospital installs and runs."""

import chainward_shared  # noqa: F401  before PyTorch: it says how threads wait
