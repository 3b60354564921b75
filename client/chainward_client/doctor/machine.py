"""The hospital's machine: versions, state folder, disk, memory, GPU, clock, and how Flower was started."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from chainward_client.doctor.report import Check, ok, problem, skipped, warning
from chainward_client.site_ledger import ledger_path
from chainward_shared import __version__
from chainward_shared.protocol import PROTOCOL_VERSION
from chainward_shared.words import first_line

GIB = 2**30

NETWORK_DISKS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs")
"""File systems on which the ledger's lock and its writing through to the disk can't be relied on; so are all ``fuse.*``."""

PASSING_DISKS = ("tmpfs", "ramfs", "overlay", "aufs")

PYTORCH_BYTES = 1.5 * GIB
"""What Python with PyTorch and Flower takes before there are any data, about."""


@dataclass(frozen=True)
class Need:
    """What a run needs at a site, about.

    Attributes
    ----------
    disk : bytes that a run leaves in the state folder
    memory : bytes for data, models, gradients and optimiser; without what activations take
    of : which run, for a person
    """

    disk: float
    memory: float
    of: str


def check_versions() -> Check:
    """Say what is installed: both sides must have the same versions of Chainward."""
    installed = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch", "timm"))
    return ok(
        "versions",
        f"chainward {__version__} (protocol {PROTOCOL_VERSION}), {installed}, Python {platform.python_version()}; the "
        "coordinator's must be the same chainward",
    )


# --- state folder and disk ---


def check_state(state: Path) -> list[Check]:
    """Check that the state folder can be written, is on a local disk, and is the hospital's alone; it is not made."""
    there = _nearest(state)
    return [_writable(state, there), _lasting(state, *file_system(there))]


def _lasting(state: Path, point: str, kind: str) -> Check:
    if kind in NETWORK_DISKS or kind.startswith("fuse."):
        return problem(
            "state disk",
            f"{point} is a network disk ({kind}): locks and written data can't be relied on, and with them the ledger",
            "set `state` in site.yaml to a folder on a local disk",
        )
    if kind in PASSING_DISKS:
        lost = "with the container" if kind in ("overlay", "aufs") else "at the next start of the machine"
        return warning(
            "state disk",
            f"{state} lies on {kind}: it is gone {lost}, the ledger and its key included",
            "put the state folder on a local disk or a volume that stays",
        )
    return ok("state disk", f"{kind or 'unknown file system'} at {point}, local")


def _writable(state: Path, there: Path) -> Check:
    if not there.is_dir():
        return problem("state folder", f"{there}: a file, not a folder", "set `state` in site.yaml to a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".chainward-check-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        fix = f"let the user that runs the SuperNode ({_user()}?) own and write it"
        return problem("state folder", f"{there}: can't be written ({error.strerror})", fix)
    if there != state:
        return ok("state folder", f"{state}: can be made (not there yet; {there} is)")
    mode = stat.S_IMODE(state.stat().st_mode)
    if mode & 0o007:
        return warning(
            "state folder", f"{state}: other users may look into it (mode {mode:04o})", f"chmod o-rwx {state}"
        )
    return ok("state folder", f"{state}: can be written")


def _user() -> str:
    try:
        return str(psutil.Process().username())
    except (psutil.Error, KeyError):
        return str(os.getuid())


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest of its parents that is there."""
    path = path.absolute()
    return next((one for one in (path, *path.parents) if one.exists()), Path("/"))


def mounted() -> dict[str, str]:
    """Return the file system by mount point of this machine."""
    return {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}


def file_system(path: Path) -> tuple[str, str]:
    """Return mount point and file system of a path that is there; ("/", "") where unknown."""
    real, mounts = path.resolve(), mounted()
    holding = [point for point in mounts if real.is_relative_to(point)]
    point = max(holding, key=lambda point: len(Path(point).parts), default="/")
    return point, mounts.get(point, "")


def check_disk(state: Path, need: Need) -> Check:
    """Compare what is free where the state folder lies with what runs need; five are kept room for."""
    free = shutil.disk_usage(_nearest(state)).free
    found = f"{size(free)} free for {state}; {need.of} needs about {size(need.disk)}"
    if free < need.disk:
        return problem("disk", found, "free space, or set `state` in site.yaml to a larger disk")
    if free < max(5 * need.disk, GIB):
        return warning("disk", found, "too little for several runs: free space, or remove the folders of old runs")
    return ok("disk", found)


def size(count: float) -> str:
    """Return a number of bytes for a person, ``"3.4 GiB"``."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


# --- memory, GPU ---


def check_memory(need: Need) -> Check:
    """Compare memory with what a run needs; a container's limit counts."""
    memory = psutil.virtual_memory()
    total = min(memory.total, _container_limit() or memory.total)
    available = min(memory.available, total)
    wanted = PYTORCH_BYTES + need.memory
    found = (
        f"{size(available)} available of {size(total)}; {need.of} takes about {size(wanted)}, and more for activations"
    )
    if total < wanted:
        return problem(
            "memory", found, "more memory (or a higher limit of the container), or smaller images (image.size)"
        )
    if available < 1.5 * wanted:
        return warning("memory", found, "stop what else runs here, or give the machine more")
    return ok("memory", found)


def _container_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def check_gpu() -> Check:
    """Look whether PyTorch can compute on a GPU; a site without one is fine, and slower."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        try:
            ones = torch.ones(64, 64, device="cuda")
            right = bool((ones @ ones == 64).all())
            free = torch.cuda.mem_get_info(0)[0]
        except RuntimeError as error:
            return problem(
                "GPU",
                f"{name}: PyTorch sees it and can't compute on it ({first_line(error)})",
                "driver and PyTorch differ",
            )
        if not right:
            return problem("GPU", f"{name}: computes wrongly", "replace it, or hide it with CUDA_VISIBLE_DEVICES=''")
        return ok("GPU", f"{name}, {size(free)} free")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return warning(
            "GPU",
            f"a driver for one is installed, and PyTorch {torch.__version__} can't use it; trains on {cores} CPU cores",
            "is it a CPU build of PyTorch, is the driver too old, is the device passed into the container?",
        )
    return ok("GPU", f"none; trains on {cores} CPU cores")


# --- clock ---


def check_own_clock(state: Path) -> Check:
    """Compare the clock with the newest files of the state folder: a clock that was set back shows."""
    now = time.time()
    newest, name = 0.0, ""
    for path in (ledger_path(state), *(state.iterdir() if state.is_dir() else ())):
        try:
            modified = path.stat().st_mtime
        except OSError:
            continue
        if modified > newest:
            newest, name = modified, path.name
    if not name:
        return skipped("own clock", "no file of an earlier day to compare with", "--superlink compares with the server")
    if newest > now + 60:
        return warning(
            "own clock",
            f"{newest - now:.0f} s behind the time at which {name} was written: it was set back, or was wrong then",
            "switch on time synchronisation (timedatectl set-ntp true)",
        )
    return ok("own clock", "after all files of the state folder; --superlink compares with the server")


# --- how Flower was started ---


@dataclass(frozen=True)
class SuperNode:
    """A SuperNode that runs on this machine.

    Attributes
    ----------
    pid : its process
    arguments : its command line
    environment : None where this user may not see it
    """

    pid: int
    arguments: Sequence[str]
    environment: Mapping[str, str] | None

    @property
    def name(self) -> str:
        """For a person."""
        return f"the SuperNode that runs here (process {self.pid})"


def running_supernodes() -> list[SuperNode]:
    """Return the SuperNodes that run on this machine, as far as this user may see them."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        arguments = process.info["cmdline"] or []
        if not any(Path(word).name in {"flower-supernode", "chainward-supernode"} for word in arguments[:3]):
            continue
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            environment = None
        found.append(SuperNode(process.info["pid"], tuple(arguments), environment))
    return found


def check_flower(running: Sequence[SuperNode]) -> list[Check]:
    """Check how Flower is started here: by the SuperNodes that run, else by this shell's environment."""
    return [
        _switched_off(running, "Flower telemetry", "FLWR_TELEMETRY_ENABLED", "0"),
        _switched_off(running, "Flower update check", "FLWR_DISABLE_UPDATE_CHECK", "1"),
        _installs_nothing(running),
        _trusted_entities(running),
    ]


def _installs_nothing(running: Sequence[SuperNode]) -> Check:
    name, option = "runtime installation", "--allow-runtime-dependency-installation"
    if not running:
        return skipped(
            name, "no SuperNode runs here to look at; it is off by default", f"start the SuperNode without {option}"
        )
    for node in running:
        if option in node.arguments:
            return problem(
                name,
                f"{node.name} has {option}: an app could install and run anything here",
                "start it without; what runs is what the hospital installed",
            )
    return ok(name, f"off: {running[0].name} has no {option}")


def _switched_off(running: Sequence[SuperNode], name: str, variable: str, wanted: str) -> Check:
    fix = f"{variable}={wanted} in the environment of the SuperNode (in its service or container file)"
    seen = [(node.name, node.environment) for node in running if node.environment is not None]
    seen = seen or [("this shell, not that of a SuperNode", os.environ)]
    for where, environment in seen:
        if environment.get(variable) != wanted:
            return warning(name, f"on, by the environment of {where}", fix)
    return ok(name, f"off ({variable}={wanted}), by the environment of {seen[0][0]}")


def _trusted_entities(running: Sequence[SuperNode]) -> Check:
    name, option = "trusted entities", "--trusted-entities"
    if not _supernode_knows(option):
        return skipped(name, f"this version of Flower ({version('flwr')}) has no {option}")
    why = "with it, a SuperNode runs only apps that are signed with keys which the hospital chose"
    if not running:
        return skipped(name, f"no SuperNode runs here to look at; {why}", f"consider {option} FILE")
    for node in running:
        path = _value_of(node.arguments, option)
        if path is None:
            return warning(
                name, f"{node.name} takes every app that the SuperLink sends; {why}", f"consider {option} FILE"
            )
        try:
            keys = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
            trusted = {name: load_ssh_public_key(str(text).encode()) for name, text in dict(keys).items()}
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            return warning(name, f"{path}: can't be read as public keys by name", "look at it as the SuperNode's user")
        others = [name for name, key in trusted.items() if not isinstance(key, Ed25519PublicKey)]
        if others or not trusted:
            return problem(
                name, f"{path}: {others[0] if others else 'nobody'} is no Ed25519 key", "Flower takes no other"
            )
    return ok(name, f"{len(trusted)} key{'s' if len(trusted) != 1 else ''} in {path}")


def _supernode_knows(option: str) -> bool:
    spec = find_spec("flwr.supernode.cli.flower_supernode")
    if spec is None or spec.origin is None:
        return False
    return option in Path(spec.origin).read_text(encoding="utf-8")


def _value_of(arguments: Sequence[str], option: str) -> str | None:
    for position, word in enumerate(arguments):
        if word == option and position + 1 < len(arguments):
            return arguments[position + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
