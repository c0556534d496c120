"""Who may import whom, and what nobody may import or call: read from the source of every module.

The layers are those of the design, with three refinements. `nodes/base.py`, `links.py` and `authority.py` are the node
that the directory (`dht/`) stands on, while the roles in `nodes/` stand on the directory. `chain` has no layer above
`identity`: a binding is signed by an account, so that identity needs the signing of `chain/`. Modules of tensorlink
that stand for themselves (one idea in one file) have no layer of their own; they must not be part of a cycle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("smartnodes_core", "tensorlink")

#: From the top down: a module imports from its own layer and from those below.
CORE_LAYERS = (
    ("smartnodes_core.nodes",),
    ("smartnodes_core.dht",),
    (
        "smartnodes_core.nodes.base",
        "smartnodes_core.nodes.bulk_links",
        "smartnodes_core.nodes.links",
        "smartnodes_core.nodes.authority",
    ),
    ("smartnodes_core.rounds", "smartnodes_core.audit", "smartnodes_core.jobs", "smartnodes_core.sandbox"),
    ("smartnodes_core.rpc",),
    ("smartnodes_core.transport",),
    ("smartnodes_core.wire", "smartnodes_core.identity", "smartnodes_core.chain", "smartnodes_core.remote_errors"),
    ("smartnodes_core.records", "smartnodes_core.keyfile"),
    ("smartnodes_core.errors",),
)
TENSORLINK_LAYERS = (
    ("tensorlink.cli",),
    ("tensorlink.demo",),
    (
        "tensorlink.model",
        "tensorlink.network",
        "tensorlink.optimizer",
        "tensorlink.placement",
        "tensorlink.plain",
        "tensorlink.validator",
        "tensorlink.worker",
    ),
    ("tensorlink.audit", "tensorlink.recovery"),
    ("tensorlink.pipeline", "tensorlink.sharding"),
    ("tensorlink.steplog",),
    ("tensorlink.program",),
    ("tensorlink.records", "tensorlink.errors"),
)
#: Imports against the layers, each with its reason.
ALLOWED = {
    # what an auditor replays is the executor's own backward, which has no other home yet
    ("tensorlink.steplog.replay", "tensorlink.pipeline.backward"),
}
#: What a rig's node process, a validator's and the command line load: never torch.
NODE_SIDE = (
    "tensorlink",
    "tensorlink.worker",
    "tensorlink.validator",
    "tensorlink.records",
    "tensorlink.errors",
    "tensorlink.local",
    "tensorlink.home",
    "tensorlink.cli.home",
    "tensorlink.cli.worker",
    "tensorlink.cli.validator",
    "tensorlink.cli.verify",
    "tensorlink.cli.options",
    "tensorlink.cli.running",
)
UNPICKLING = {"pickle", "marshal", "dill", "cloudpickle", "shelve", "_pickle"}
EXECUTING = {"eval", "exec", "__import__", "compile", "import_module", "importlib.import_module", "torch.load"}
#: `tensorlink/__init__.py` loads its public names on first use, from a table of constants.
LAZY_TABLE = "tensorlink"


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def _for_types_only(tree: ast.Module) -> set[int]:
    """Nodes under `if TYPE_CHECKING:`, by id."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every module that `module` imports, at its top or inside a function, but for type checkers' eyes."""
    found: set[str] = set()
    tree = tree_of(module)
    exempt = _for_types_only(tree)
    for node in ast.walk(tree):
        if id(node) in exempt:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, line {node.lineno}"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            found |= inside
            if len(inside) < len(node.names):
                found.add(node.module)
    return frozenset(found)


def _layer_of(module: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    """The number of the layer that `module` lies in, by its longest prefix."""
    best: tuple[int, int] | None = None
    for number, names in enumerate(layers):
        for name in names:
            if (module == name or module.startswith(name + ".")) and (best is None or len(name) > best[0]):
                best = (len(name), number)
    return None if best is None else best[1]


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("layers", [CORE_LAYERS, TENSORLINK_LAYERS], ids=["smartnodes_core", "tensorlink"])
def test_imports_go_down_the_layers_only(layers):
    wrong = []
    for module in modules():
        own = _layer_of(module, layers)
        for imported in imports_of(module):
            below = _layer_of(imported, layers)
            if own is not None and below is not None and below < own and (module, imported) not in ALLOWED:
                wrong.append(f"{module} (layer {own}) imports {imported} (layer {below})")
    assert wrong == []


def test_exceptions_to_the_layers_are_in_use():
    assert all(imported in imports_of(module) for module, imported in ALLOWED if module in modules())


def test_the_core_knows_nothing_of_torch_or_of_tensorlink():
    wrong = [
        f"{module} imports {imported}"
        for module in modules()
        if module.startswith("smartnodes_core")
        for imported in imports_of(module)
        if imported.split(".")[0] in ("torch", "tensorlink", "numpy", "safetensors")
    ]
    assert wrong == []


def test_the_core_has_no_cycle_of_imports():
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        assert module not in path, f"a cycle: {' → '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for imported in sorted(imports_of(module) & modules().keys()):
            visit(imported)
        path.pop()
        done.add(module)

    for module in sorted(modules()):
        if module.startswith("smartnodes_core"):
            visit(module)


def test_nothing_that_unpickles_is_imported():
    wrong = [
        f"{module} imports {imported}"
        for module in modules()
        for imported in imports_of(module)
        if imported.split(".")[0] in UNPICKLING
    ]
    assert wrong == []


def test_nothing_is_called_that_executes_or_imports_what_a_name_says():
    wrong = []
    for module in modules():
        for call in _calls(tree_of(module)):
            name = ast.unparse(call.func)
            constant = bool(call.args) and isinstance(call.args[0], ast.Constant)
            harmless = name.endswith("import_module") and (constant or module == LAZY_TABLE)
            if name in EXECUTING and not harmless:
                wrong.append(f"{modules()[module].relative_to(ROOT)}:{call.lineno}: {name}")
    assert wrong == []


def test_the_lazy_table_of_the_package_holds_constants_only():
    tables = [
        node.value
        for node in tree_of(LAZY_TABLE).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    ]
    assert len(tables) == 1
    homes = ast.literal_eval(tables[0])
    assert set(homes.values()) <= modules().keys()


def test_only_the_command_line_prints():
    wrong = [
        f"{modules()[module].relative_to(ROOT)}:{call.lineno}"
        for module in modules()
        if not module.startswith("tensorlink.cli")
        for call in _calls(tree_of(module))
        if ast.unparse(call.func) == "print"
    ]
    assert wrong == []


@pytest.mark.parametrize("module", NODE_SIDE)
def test_the_node_side_names_no_torch(module):
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen or current not in modules():
            continue
        seen.add(current)
        imported = imports_of(current) if current != LAZY_TABLE else frozenset()
        assert not any(name.split(".")[0] == "torch" for name in imported), f"{module} loads torch through {current}"
        waiting += imported


def _loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nsys.stdout.write(' '.join(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_rig_and_a_validator_start_without_torch():
    assert _loaded_by("import tensorlink.cli.worker, tensorlink.cli.validator", ("torch", "web3", "eth")) == []


def test_a_node_listens_before_web3_is_loaded():
    statement = "import smartnodes_core.nodes.base, smartnodes_core.nodes.station, smartnodes_core.nodes.validator"
    assert _loaded_by(statement, ("torch", "web3", "eth", "eth_abi")) == []
