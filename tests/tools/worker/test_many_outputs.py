"""Actions with more outputs than any build has: declared one by one, and as a directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import wait_for
from tests.tools.worker.conftest import Remote, executing, remote_of
from tools.reapi.generated import remote_execution_pb2 as reapi

_MAKE = """
import os
for number in range(%d):
    top = f"o/{number %% 100}"
    os.makedirs(top, exist_ok=True)
    with open(f"{top}/{number}", "w") as file:
        file.write(f"number {number}\\n")
"""
_MEMORY_MOST = 1 << 30


def peak_of(process: int) -> int:
    """Bytes of memory that a process had at most."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def check_outputs(remote: Remote, number: int) -> None:
    script = _MAKE % number
    paths = [f"o/{one % 100}/{one}" for one in range(number)]
    declared = remote.execute(remote.put(["python3", "-c", script], output_paths=paths, salt=os.urandom(8)), 600)
    assert declared.result.exit_code == 0 and not declared.message, declared.message[:1000]
    assert [file.path for file in declared.result.output_files] == paths
    assert remote.blob(declared.result.output_files[-1].digest) == b"number %d\n" % (number - 1)
    # The same files again: each blob is there.
    action = remote.put(["python3", "-c", script], output_paths=["o", "o/7/107", *paths[:1]], salt=os.urandom(8))
    whole = remote.execute(action, 600)
    [directory] = whole.result.output_directories
    tree = reapi.Tree.FromString(remote.blob(directory.tree_digest))
    assert sum(len(child.files) for child in tree.children) == number
    assert {file.path for file in whole.result.output_files} == {"o/7/107", "o/0/0"}
    assert remote.execute(action, 600).cached_result


def test_thousands_of_outputs(remote: Remote, requires: Requirements) -> None:
    requires.programs("python3")
    check_outputs(remote, 3_000)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hundred_thousand_outputs(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap", "python3")
    with executing(casfs, "--jobs", "1") as server, remote_of(server) as remote:
        check_outputs(remote, 100_000)
        assert peak_of(server.process.pid) < _MEMORY_MOST
        # Two hundred thousand files are removed in the background, which its end would wait for.
        wait_for(lambda: not list((casfs.store / "scratch").glob("*/[0-9]*")), 300)
