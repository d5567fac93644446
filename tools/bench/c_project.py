"""A real C project for Bazel to build: the resolver library c-ares and its programs, out of the sdist of pycares.

Over sixty translation units and three programs; the sources are as they come
from PyPI, the BUILD file is ours.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from tools.bench.workers import Refused

EVERYTHING = "//:everything"
"""The target that has all the project makes."""

_BUILD = """
cc_library(
    name = "cares",
    srcs = glob(
        ["deps/c-ares/src/lib/*.c", "deps/c-ares/src/lib/*.h", "deps/build-config/config_linux/*.h"],
        exclude = ["deps/c-ares/src/lib/windows_port.c"],
    ),
    hdrs = glob(["deps/c-ares/include/*.h", "deps/build-config/include/*.h"]),
    copts = [
        "-Ideps/c-ares/src/lib",
        "-Ideps/build-config/config_linux",
        "-DHAVE_CONFIG_H",
        "-D_GNU_SOURCE",
        "-w",
    ],
    defines = ["CARES_STATICLIB"],
    includes = ["deps/c-ares/include", "deps/build-config/include"],
    linkstatic = 1,
)
[cc_binary(
    name = program,
    srcs = [
        "deps/c-ares/src/tools/%s.c" % program,
        "deps/c-ares/src/tools/ares_getopt.c",
        "deps/c-ares/src/tools/ares_getopt.h",
    ] + glob(["deps/c-ares/src/lib/*.h", "deps/build-config/config_linux/*.h"]),
    copts = [
        "-Ideps/c-ares/src/lib",
        "-Ideps/c-ares/src/tools",
        "-Ideps/build-config/config_linux",
        "-DHAVE_CONFIG_H",
        "-D_GNU_SOURCE",
        "-w",
    ],
    deps = [":cares"],
) for program in ["acountry", "adig", "ahost"]]
filegroup(name = "everything", srcs = [":acountry", ":adig", ":ahost", ":cares"])
"""


class Sdist(NamedTuple):
    """A source archive on PyPI: what pip is asked for, the file's name, the hash of its bytes."""

    requirement: str
    file: str
    sha256: str

    @property
    def top(self) -> str:
        """The directory that it unpacks to."""
        return self.file.removesuffix(".tar.gz")


CARES = Sdist(
    "pycares==4.4.0", "pycares-4.4.0.tar.gz", "f47579d508f2f56eddd16ce72045782ad3b1b3b678098699e2b6a1b30733e1c2"
)


def get_sdist(sdist: Sdist) -> Path:
    """The archive, fetched by pip if need be and kept among this user's temporary files. Raises Refused."""
    kept = Path(tempfile.gettempdir()) / f"casfs-test-downloads-{os.getuid()}"
    kept.mkdir(mode=0o700, exist_ok=True)
    place = kept / sdist.file
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=kept) as fresh:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-binary", ":all:", "--dest", fresh, sdist.requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Refused(f"the sdist of {sdist.requirement}: pip says {done.stderr.strip()[-200:]}")
            (Path(fresh) / sdist.file).rename(place)
    if hashlib.sha256(place.read_bytes()).hexdigest() != sdist.sha256:
        raise Refused(f"{place} is not what it was: remove it")
    return place


def make_workspace(directory: Path) -> Path:
    """A Bazel workspace with the project, in `directory`. Raises Refused where it can't be had."""
    with tarfile.open(get_sdist(CARES)) as archive:
        archive.extractall(directory, filter="data")
    workspace = directory / "workspace"
    workspace.mkdir()
    shutil.move(directory / CARES.top / "deps", workspace / "deps")
    shutil.rmtree(directory / CARES.top)
    (workspace / "WORKSPACE").touch()
    (workspace / "BUILD").write_text(_BUILD)
    return workspace
