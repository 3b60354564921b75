"""`chainward-supernode`: Flower's SuperNode, with its own arguments, as a process that ends when it has lost its connection.

In Flower 1.41 a TLS handshake that times out, as where a VPN is down for a while, ends the SuperNode's connection loop, but not
its process: a thread that serves the machine itself keeps it alive. It looks well, takes no work any more, and systemd sees
nothing to restart. Here the process ends with the loop, and whoever supervises it starts it again.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run `flower-supernode`; end the process when that ends, however it does. Exit code: Flower's, or 1 after an error."""
    from flwr.supernode.cli import flower_supernode

    code = 1
    try:
        flower_supernode()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        words = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"chainward-supernode: the connection to the SuperLink is lost ({words}); start it again\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
