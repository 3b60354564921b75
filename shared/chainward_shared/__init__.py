"""What the coordinator and the hospitals must agree on."""

import os
from importlib.metadata import version

# Threads that spin while they wait for work make trainings many times slower on a machine that has something else to do. OpenMP
# reads this when PyTorch is loaded, so it is here, where every package of Chainward begins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("chainward")
