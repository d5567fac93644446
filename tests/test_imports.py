"""The import rules of the three layers, checked on the source.

What is held: imports go from ``tools`` to ``casfs`` to ``store`` and never
back, wherever in a module they stand; a few libraries are imported in one
module only; loading a module never needs a module that is still being loaded.
The checker is tried on small trees that break each rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = ("tools", "casfs", "store")
"""From the top down; each may import itself and what comes after it."""

KEPT_TO: Mapping[str, frozenset[str]] = {
    "lmdb": frozenset({"store.index"}),
    "pyfuse3": frozenset({"casfs.session_pyfuse3"}),
    "trio": frozenset({"casfs.session_pyfuse3"}),
    # As a client, and as a server that ours is compared with.
    "grpc": frozenset({"tools.bench.bare_grpc", "tools.upstream.channel"}),
    "grpc_health": frozenset({"tools.server.health"}),
    "grpc_reflection": frozenset({"tools.server.health"}),
    "grpc_tools": frozenset(),
    "aiohttp": frozenset({"tools.server.http_adapter", "tools.server.http_server"}),
    "prometheus_client": frozenset({"tools.server.metrics"}),
}
"""Libraries, and the only modules that may import each."""


@dataclass(frozen=True, slots=True)
class Import:
    """`name` is imported in the module `importer`; `loading` if that happens when the module is loaded."""

    importer: str
    name: str
    place: str
    loading: bool


def find_modules(root: Path) -> dict[str, Path]:
    """The modules of all layers below `root`, by name."""
    modules = {}
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_imports(root: Path) -> list[Import]:
    """Every import of every module below `root`, import_module("…") included."""
    modules = find_modules(root)
    found = []
    for importer, path in modules.items():
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for node, loading in _walk(ast.parse(path.read_bytes(), path), True):
            place = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            found += [Import(importer, name, place, loading) for name in _imported(node, package, modules)]
    return found


def _walk(node: ast.AST, loading: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, and whether each is run when the module is loaded."""
    yield node, loading
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        loading = False
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for statement in node.body:
            yield from _walk(statement, False)
        for statement in node.orelse:
            yield from _walk(statement, loading)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, loading)


def _imported(node: ast.AST, package: str, modules: Mapping[str, Path]) -> list[str]:
    """The modules that this node names; `from p import m` names p.m if that is a module of ours."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            base = module or ""
            if level:
                above = package.split(".")[: len(package.split(".")) - level + 1]
                base = ".".join([*above, base] if base else above)
            return sorted({full if (full := f"{base}.{alias.name}") in modules else base for alias in names})
        case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
    return []


def find_violations(root: Path, kept_to: Mapping[str, frozenset[str]] = KEPT_TO) -> list[str]:
    """What breaks the rules on direction and on libraries, a line each: where, and what."""
    found = []
    for item in read_imports(root):
        layer, top = item.importer.partition(".")[0], item.name.partition(".")[0]
        if top == "tests":
            found.append(f"{item.place}: {item.importer} imports {item.name}: nothing but tests may import tests")
        elif top in LAYERS and LAYERS.index(top) < LAYERS.index(layer):
            found.append(f"{item.place}: {item.importer} imports {item.name}: {layer} may not import {top}")
        elif top in kept_to and item.importer not in kept_to[top]:
            allowed = ", ".join(sorted(kept_to[top])) or "no module"
            found.append(f"{item.place}: {item.importer} imports {item.name}: {allowed} may")
    return found


def find_cycle(root: Path) -> list[str]:
    """The imports that make modules need each other while they are loaded, a line each; none if there is no cycle."""
    modules = find_modules(root)
    places: dict[tuple[str, str], str] = {}
    for item in read_imports(root):
        if item.loading and item.name in modules and item.name != item.importer:
            places.setdefault((item.importer, item.name), item.place)
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for importer, imported in places:
        graph[importer].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # The list runs from what is imported to what imports it, and ends where it began.
        ring: list[str] = error.args[1][::-1]
        return [f"{places[importer, imported]}: {importer} imports {imported}" for importer, imported in pairwise(ring)]
    return []


def _write(root: Path, files: Mapping[str, str]) -> None:
    for layer in LAYERS:
        (root / layer).mkdir()
        (root / layer / "__init__.py").touch()
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)


def test_imports_point_downwards_and_libraries_stay_in_their_module() -> None:
    assert not find_violations(ROOT), "\n".join(find_violations(ROOT))


def test_no_module_needs_itself_while_it_is_loaded() -> None:
    assert not find_cycle(ROOT), "\n".join(find_cycle(ROOT))


PROTOBUF = ("google", "tools.reapi.generated")


def test_the_store_and_the_projection_know_nothing_of_messages() -> None:
    for item in read_imports(ROOT):
        if not item.importer.startswith("tools."):
            assert not item.name.startswith(PROTOBUF), f"{item.place}: {item.importer} imports {item.name}"


TRANSPORT = ("grpc", "tools.http2", "tools.server.grpc_", "tools.server.http", "tools.server.serve")


def test_the_worker_knows_no_transport_and_servers_only_its_seam() -> None:
    for item in read_imports(ROOT):
        if item.importer.startswith("tools.worker."):
            assert not item.name.startswith(TRANSPORT), f"{item.place}: {item.importer} imports {item.name}"
        # Where a process is put together it may be the whole of it; numbers and pages are told of reports.
        if item.importer.startswith("tools.server.") and item.loading and item.name.startswith("tools.worker"):
            seam = ("tools.worker.work", "tools.worker.report")
            assert item.name in seam, f"{item.place}: {item.importer} imports {item.name}"


def test_http2_knows_nothing_of_what_it_carries() -> None:
    for item in read_imports(ROOT):
        if item.importer.startswith("tools.http2"):
            ours = item.name.startswith(("tools.", "casfs", "store"))
            assert not ours or item.name.startswith("tools.http2"), f"{item.place}: {item.importer} imports {item.name}"


def test_the_source_that_is_checked_is_the_source_that_is_used() -> None:
    modules = find_modules(ROOT)
    assert {"store.index", "store.repository", "casfs.session_pyfuse3", "tools"} <= modules.keys()
    for allowed in KEPT_TO.values():
        assert allowed <= modules.keys()


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("store/a.py", "import casfs.b\n", "store/a.py:1: store.a imports casfs.b: store may not import casfs"),
        ("casfs/a.py", "from tools import main\n", "casfs/a.py:1: casfs.a imports tools: casfs may not import tools"),
        ("store/a.py", "def f():\n    import casfs\n", "store/a.py:2: store.a imports casfs: store may not"),
        ("casfs/deep/a.py", "\n\nimport tools.x as x\n", "casfs/deep/a.py:3: casfs.deep.a imports tools.x"),
        ("store/a.py", "import importlib as i\ni.import_module('casfs.b')\n", "store/a.py:2: store.a imports casfs.b"),
        ("casfs/a.py", "class A:\n    from tests.conftest import x\n", "casfs/a.py:2: casfs.a imports tests.conftest"),
        ("store/a.py", "import lmdb\n", "store/a.py:1: store.a imports lmdb: store.index may"),
        ("casfs/a.py", "def f():\n    from trio.lowlevel import x\n", "casfs.session_pyfuse3 may"),
        (
            "tools/a.py",
            "import grpc.aio\n",
            f"tools.a imports grpc.aio: {', '.join(sorted(KEPT_TO['grpc']))} may",
        ),
    ],
)
def test_the_checker_finds_a_broken_rule(tmp_path: Path, file: str, text: str, expected: str) -> None:
    _write(tmp_path, {file: text})
    [line] = find_violations(tmp_path)
    assert expected in line


def test_the_checker_accepts_what_follows_the_rules(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "store/index.py": "import lmdb\nimport os\n",
            "casfs/a.py": "from store import index\nfrom . import b\n",
            "casfs/b.py": "def late():\n    from casfs import a\n",
            "tools/main.py": "from casfs import a\nimport store.index\n",
        },
    )
    assert find_violations(tmp_path) == []
    assert find_cycle(tmp_path) == []


def test_the_checker_finds_modules_that_need_each_other(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "store/a.py": "from store import b\n",
            "store/b.py": "\nfrom .c import thing\n",
            "store/c.py": "if True:\n    import store.a\n",
            "store/d.py": "import store.a\n",
        },
    )
    assert sorted(find_cycle(tmp_path)) == [
        "store/a.py:1: store.a imports store.b",
        "store/b.py:2: store.b imports store.c",
        "store/c.py:2: store.c imports store.a",
    ]


def test_imports_for_types_only_make_no_cycle(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "store/a.py": "import store.b\n",
            "store/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import store.a\n",
        },
    )
    assert find_cycle(tmp_path) == []


@pytest.mark.long
@pytest.mark.parametrize("module", find_modules(ROOT))
def test_every_module_can_be_the_first_to_be_imported(module: str) -> None:
    # `-m` names are programs: loading them is enough here, too.
    if module.endswith("__main__"):
        return
    command = [sys.executable, "-W", "error", "-c", f"import {module}"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
