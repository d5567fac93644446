"""What benchmarks count, and README says in tables: exact numbers, the same on every machine and at every run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Requirements, without_forgets
from tools.bench import remapping, seed_case, tracing
from tools.bench.measuring import Outcome, Settings
from tools.bench.seed_case import DIRECTORIES, FILES, READS

FIRST = {"GETATTR": 1, "LOOKUP": FILES + DIRECTORIES, "OPEN": FILES, "RELEASE": FILES}
"""GETATTR: of the root, once a mount."""
NEXT = {"OPEN": FILES, "RELEASE": FILES}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, requires: Requirements) -> Outcome:
    requires.admin()
    requires.fuse()
    return seed_case.run(Settings(tmp_path_factory.mktemp("seed"), quick=True))


def counts(outcome: Outcome, what: str, side: str) -> dict[str, int]:
    found = outcome.find(f"{what} action", side)
    if found is None:
        pytest.skip("; ".join(outcome.notes))
    assert found.upcalls is not None
    return found.upcalls


@pytest.mark.parametrize("side", ["passthrough", "passthrough, by reference"])
def test_with_passthrough_a_file_costs_its_open_and_no_read(outcome: Outcome, side: str) -> None:
    assert counts(outcome, "first", side) == {**FIRST, "READ": 0}
    assert counts(outcome, "next", side) == {**NEXT, "READ": 0}


@pytest.mark.parametrize("side", ["native", "fuse"])
def test_without_passthrough_each_read_is_an_upcall_the_first_time(outcome: Outcome, side: str) -> None:
    assert counts(outcome, "first", side) == {**FIRST, "READ": READS}
    assert counts(outcome, "next", side) == {**NEXT, "READ": 0}


@pytest.mark.parametrize("side", ["kernel", "sandboxfs"])
def test_where_the_kernel_lays_it_out_nobody_is_asked(outcome: Outcome, side: str) -> None:
    assert counts(outcome, "first", side) == counts(outcome, "next", side) == {}


def test_every_aim_is_met(outcome: Outcome) -> None:
    assert len(outcome.aims) == 4
    assert all(aim.met for aim in outcome.aims)


def test_the_files_are_as_many_as_said(tmp_path: Path) -> None:
    names = seed_case.make_files(tmp_path)
    assert len(set(names)) == FILES and len({name.partition("/")[0] for name in names}) == DIRECTORIES
    assert sum((tmp_path / name).stat().st_size > 128 << 10 for name in names) == READS - FILES


@pytest.fixture(scope="module")
def remapped(tmp_path_factory: pytest.TempPathFactory, requires: Requirements) -> Outcome:
    requires.admin()
    requires.fuse()
    return remapping.run(Settings(tmp_path_factory.mktemp("remap"), quick=True))


@pytest.mark.parametrize("side", ["passthrough", "native", "fuse"])
def test_a_remap_has_the_kernel_ask_again_for_what_changed_and_its_directory(remapped: Outcome, side: str) -> None:
    """That each change is shown at once is checked by the scenario."""
    found = remapped.find("looking again", side)
    if found is None:
        pytest.skip("; ".join(remapped.notes))
    assert found.upcalls is not None
    assert without_forgets(found.upcalls) == {"LOOKUP": 100, "GETATTR": 100}
    for what in ("other blobs", "files of the host", "put beside", "taken away"):
        assert remapped.median(f"one step, {what}", side) > 0
    assert remapped.median("a call each", side) > 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["missing", "open, again"])
def test_a_session_without_a_trace_calls_the_functions_that_it_called_before_there_were_any(
    tmp_path: Path, requires: Requirements, name: str
) -> None:
    requires.admin()
    requires.fuse()
    outcome = Outcome()
    bench = tracing.Tracing(outcome, Settings(tmp_path, quick=True))
    operation = next(operation for operation in tracing.OPERATIONS if operation.name == name)
    for side in (tracing.BARE, tracing.OFF, tracing.ON):
        bench.count_functions(operation, side)
    bare, off, on = (outcome.median(f"{name}, functions", side) for side in (tracing.BARE, tracing.OFF, tracing.ON))
    assert bare == off < on


def test_without_a_trace_nothing_of_tracing_is_loaded() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, casfs.mounting, casfs.sandbox, casfs.served; print(*sys.modules)"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"casfs.tracing", "casfs.session_traced", "casfs.trace_format"} & set(loaded)
