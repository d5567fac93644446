"""Makes ``generated/`` from ``proto/``: ``python -m tools.reapi.generate [DIRECTORY]``, or ``make proto``.

protoc's Python imports follow the directories of the .proto files, which would
claim the packages ``build`` and ``google``. So the modules are put side by
side, and their imports of each other rewritten; those of ``google.protobuf``
stay.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROTO = HERE / "proto"
GENERATED = HERE / "generated"

_BARE_MAPPING = re.compile(r"(?<=, )_Mapping(?=\])")
"""mypy wants to know of what; these are messages written as dictionaries."""
_OWN_IMPORT = re.compile(r"^from (?:build|google)\.(?!protobuf)[\w.]+ import (\w+_pb2) as (\w+)", re.MULTILINE)


def generate(target: Path) -> None:
    """Write a module and its stub for each definition into `target`."""
    files = sorted(PROTO.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as place:
        options = [f"-I{PROTO}", f"--python_out={place}", f"--pyi_out={place}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options, *map(str, files)], check=True)
        for path in [*Path(place).rglob("*.py"), *Path(place).rglob("*.pyi")]:
            text = _OWN_IMPORT.sub(r"from tools.reapi.generated import \1 as \2", path.read_text())
            text = _BARE_MAPPING.sub("_Mapping[str, object]", text)
            (target / path.name).write_text(text)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else GENERATED)
