"""What real tools make of an undeclared file: in casfs as where there is none, and as README says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tools import namespaces

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def tools_there(requires: Requirements) -> None:
    requires.admin()
    requires.programs("bwrap", *sorted({program for case in namespaces.CASES for program in case.programs}))


@pytest.mark.usefixtures("tools_there")
def test_each_tool_finds_in_casfs_what_is_declared_and_nothing_else(tmp_path: Path) -> None:
    found = namespaces.compare_all(tmp_path)
    assert {name: verdicts[namespaces.CASFS].word for name, verdicts in found.items()} == dict.fromkeys(found, "right")
    others = [verdicts[kind].word for verdicts in found.values() for kind in (namespaces.SYMLINKS, namespaces.DENIED)]
    assert {"leaks", "breaks"} <= set(others)
    table = re.search(r"`\.venv/bin/python -m tools\.namespaces`\.\n\n((?:\|.*\n)+)", README.read_text())
    assert table is not None
    assert table[1].strip() == namespaces.show(found)


@pytest.mark.usefixtures("tools_there")
def test_a_file_that_makes_no_difference_proves_nothing(tmp_path: Path) -> None:
    case = dataclasses.replace(namespaces.CASES[0], command=("echo", "the same"))
    with pytest.raises(RuntimeError, match="makes no difference"):
        namespaces.Comparison(case, tmp_path).judge()
