"""Which package may import which: server -> shared <- client. And nothing that loads a pickle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from house import MAY_IMPORT, PACKAGES, REPOSITORY, imported, imports, parsed, sources

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def offenders(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in sources(package)
        for name in imported(path)
        if name in forbidden
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(package):
    assert sources(package), "the package is where this test looks"
    assert offenders(package, set(PACKAGES) - {package} - MAY_IMPORT[package]) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_that_is_installed_imports_the_tests_or_their_tools(package):
    assert offenders(package, {"tests", "conftest", "pytest", "hypothesis"}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_name_their_package_in_full(package):
    assert offenders(package, {".", "?"}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_pickle(package):
    assert offenders(package, PICKLES) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_loads_a_pickle(package):
    """Neither ``torch.load`` nor ``allow_pickle=True``, by whatever alias of the function's module; one file of other people's
    weights is read by ``torch.load(..., weights_only=True)``, which makes tensors and nothing else."""
    allowed = {"shared/chainward_shared/pretrained/files.py": 1}
    found = []
    for path in sources(package):
        name = str(path.relative_to(REPOSITORY))
        loads, safe = pickle_loads(parsed(path))
        found += [f"{name}:{line}" for line in loads]
        found += [f"{name}:{line}" for line in safe[allowed.get(name, 0) :]]
    assert found == []


def pickle_loads(tree: ast.AST) -> tuple[list[str], list[str]]:
    """Return each place that may load a pickle, and each call of ``torch.load`` that makes tensors only."""
    loads, safe = [], []
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.jit.load", "torch.hub.load"}:
            keywords = (
                {word.arg: ast.unparse(word.value) for word in calls[id(node)].keywords} if id(node) in calls else {}
            )
            only = ast.unparse(node) == "torch.load" and keywords.get("weights_only") == "True"
            (safe if only else loads).append(f"{line} uses {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module in {"torch", "torch.serialization"}:
            loads += [f"{line} imports {alias.name}" for alias in node.names if alias.name == "load"]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            loads.append(f"{line} allows pickles")
    return loads, safe


@pytest.mark.parametrize(
    ("code", "loads", "safe"),
    [
        ("torch.load(p)", 1, 0),
        ("torch.load(p, weights_only=False)", 1, 0),
        ("torch.load(p, weights_only=flag)", 1, 0),
        ("f = torch.load", 1, 0),
        ("torch.jit.load(p, weights_only=True)", 1, 0),
        ("from torch import load", 1, 0),
        ("np.load(p, allow_pickle=True)", 1, 0),
        ("torch.load(p, weights_only=True)", 0, 1),
        ("np.load(p, allow_pickle=False)", 0, 0),
    ],
)
def test_every_form_of_loading_a_pickle_is_seen(code, loads, safe):
    found = pickle_loads(ast.parse(code))
    assert (len(found[0]), len(found[1])) == (loads, safe)


def rooms(package: str) -> dict[str, set[str]]:
    """Return which rooms of a package each room imports: a folder is one room, and so is a module beside the folders."""
    root, found = PACKAGES[package], dict[str, set[str]]()
    for path in sources(package):
        place = path.relative_to(root)
        room = place.parts[0].removesuffix(".py")
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            own = {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
            found.setdefault(room, set()).update(
                other for other in own - {room} if (root / other).is_dir() or (root / f"{other}.py").is_file()
            )
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return a circle of a graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_rooms_of_a_package_import_each_other_in_a_circle(package):
    assert len(rooms(package)) >= 7
    assert circle(rooms(package)) == []


def test_a_circle_is_found():
    assert set(circle({"data": {"privileged"}, "privileged": {"training"}, "training": {"data"}})) == {
        "data",
        "privileged",
        "training",
    }


@pytest.mark.slow
def test_reading_data_loads_no_training_no_ledger_and_no_flower():
    code = "import sys, chainward_client.data.sources; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    own = {name.split(".")[1] for name in loaded if name.startswith("chainward_client.")}
    assert own == {"data"}, "and nothing else of the client"
    heavy = (
        "flwr",
        "chainward_shared.privacy",
        "chainward_shared.models",
        "chainward_shared.protocol",
        "opacus",
        "cryptography",
    )
    assert [name for name in loaded if name.startswith(heavy)] == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import chainward_server.app as a, os", ["chainward_server", "os"]),
        ("from chainward_client.data import x", ["chainward_client"]),
        ("def f():\n    from pickle import loads", ["pickle"]),
        ("from . import x", ["."]),
        ("importlib.import_module('chainward_client.app')", ["chainward_client"]),
        ("import_module(name)", ["?"]),
        ("import_module(f'{__name__}.{module}')", []),
    ],
)
def test_every_form_of_import_is_seen(code, expected):
    assert list(imports(ast.parse(code))) == expected


@pytest.mark.slow
@pytest.mark.parametrize("module", ["chainward_client.app", "chainward_client.cli", "chainward_simulations.cli"])
def test_what_needs_no_model_does_not_wait_for_the_libraries_that_build_one(module):
    # a site's every message is answered by a new process; timm brings torchvision and PyTorch's compiler, ten seconds of CPU
    slow = [
        "timm",
        "torchvision",
        "torch._dynamo",
        "sklearn",
        "scipy",
        "pandas",
        "opacus",
        "dp_accounting",
        "matplotlib",
    ]
    code = f"import sys, {module}; print(*(name for name in {slow} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
