"""A real C project for Bazel to build: the library and the program of Brotli, out of its sdist.

pip fetches the sdist once, in a pinned version whose hash is checked, and it is
kept among the temporary files of this user.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from tests.conftest import Requirements
from tools.bench.c_project import Sdist, get_sdist
from tools.bench.workers import Refused

_BROTLI = Sdist(
    "Brotli==1.1.0", "Brotli-1.1.0.tar.gz", "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724"
)

_BUILD = """
cc_library(
    name = "common",
    srcs = glob(["c/common/*.c", "c/common/*.h"]),
    hdrs = glob(["c/include/brotli/*.h", "c/common/*.h"]),
    includes = ["c/include"],
    linkstatic = 1,
)
cc_library(
    name = "all",
    srcs = glob(["c/dec/*.c", "c/dec/*.h", "c/enc/*.c", "c/enc/*.h"]),
    deps = [":common"],
    linkopts = ["-lm"],
    linkstatic = 1,
)
cc_binary(name = "brotli", srcs = ["c/tools/brotli.c"], deps = [":all"])
genrule(
    name = "packed",
    srcs = ["c/enc/encode.c"],
    outs = ["encode.c.br"],
    exec_tools = [":brotli"],
    cmd = "$(location :brotli) -c $< > $@",
)
genrule(
    name = "unpacked",
    srcs = [":packed"],
    outs = ["encode.c"],
    exec_tools = [":brotli"],
    cmd = "$(location :brotli) -dc $< > $@",
)
genrule(
    name = "new",
    srcs = ["number"],
    outs = ["random.bin", "random.txt"],
    cmd = "head -c 1000000 /dev/urandom > $(location random.bin); cp $< $(location random.txt)",
)
genrule(name = "newer", srcs = [":new"], outs = ["both"], cmd = "cat $(SRCS) > $@")
"""


def make_project(directory: Path, requires: Requirements) -> Path:
    """A workspace with targets :common (a part, built quickly), :unpacked (everything) and :newer (what is new)."""
    try:
        sdist = get_sdist(_BROTLI)
    except Refused as refused:
        requires.condition(False, str(refused))
        raise
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    workspace = directory / "workspace"
    shutil.move(directory / _BROTLI.top / "c", workspace / "c")
    (workspace / "WORKSPACE").touch()
    (workspace / "BUILD").write_text(_BUILD)
    set_number(workspace, 0)
    return workspace


def set_number(workspace: Path, number: int) -> None:
    """Change what :newer is made of."""
    (workspace / "number").write_text(f"{number}\n")
