"""The store's log, where it can't be written."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from casfs.daemon import logging_to

LOG = logging.getLogger("casfs.test")


def test_lines_that_can_not_be_written_are_lost_and_that_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "store"
    directory.mkdir()
    path = directory / "casfs.log"
    with logging_to(path):
        LOG.error("one")
        shutil.rmtree(directory)
        for _ in range(3):
            LOG.error("lost")
        assert capfd.readouterr().err == f"casfs: can't write to {path}: No such file or directory\n"
        directory.mkdir()
        LOG.error("two")
        assert path.read_text().endswith(" ERROR two\n")
        # Rotated away.
        path.rename(directory / "casfs.log.1")
        LOG.error("three")
        assert path.read_text().endswith(" ERROR three\n")
        assert capfd.readouterr().err == ""


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "casfs.log"
    path.symlink_to("/dev/full")
    with logging_to(path):
        for _ in range(3):
            LOG.error("lost")
        path.unlink()
        LOG.error("one")
    assert capfd.readouterr().err == f"casfs: can't write to {path}: No space left on device\n"
    assert path.read_text().count("\n") == 1
