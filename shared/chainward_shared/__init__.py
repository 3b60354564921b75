"""What the coordinator and the hospitals must agree on."""

from importlib.metadata import version

__version__ = version("chainward")
