"""One page in a browser on this machine, kept up to date: loopback only, behind a secret in its address."""

from chainward_shared.local_page.page import Look, environment
from chainward_shared.local_page.server import Form, LocalPage

__all__ = ["Form", "LocalPage", "Look", "environment"]
