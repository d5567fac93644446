"""Load on a gRPC server, by ghz: a program in Go, so that no Python client measures itself.

`make bench-tools` puts it into .venv, in the version that config/bench-go-modules.txt
names; else it is the one on the PATH.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import proto
from google.protobuf.message import Message

from tools.bench.workers import Refused
from tools.reapi.generate import PROTO
from tools.reapi.methods import Method

PROGRAM = "ghz"
CONNECTIONS = 4
_TIMEOUT_SECONDS = 600


def get_generator(program: str = PROGRAM) -> Path:
    """A load generator that is made by us. Raises Refused, which says how it can be had."""
    for found in (Path(sys.prefix, "bin", program), shutil.which(program)):
        if found is not None and os.access(found, os.X_OK):
            return Path(found)
    raise Refused(f"{program} is neither in .venv nor on the PATH: 'make bench-tools' makes it, if there is Go")


@dataclass(frozen=True, slots=True)
class Load:
    """What the generator saw: calls, calls a second, and the latencies (ms) that half and 99 in 100 stayed below."""

    calls: int
    rate: float
    p50: float
    p99: float


class Generator:
    """Calls a server."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def run(self, address: str, method: Method, data: Sequence[Message] | str, *, calls: int, in_flight: int) -> Load:
        """Make so many calls, so many at a time.

        `data`: messages, taken in turn, or a JSON template of ghz that makes a
        new one for each call. Raises RuntimeError if a call fails.
        """
        definition = PROTO / method.request.DESCRIPTOR.file.name
        with tempfile.NamedTemporaryFile() as file:
            if isinstance(data, str):
                file.write(data.encode())
                source = ["--data-file", file.name]
            else:
                file.write(_delimited(data))
                source = ["--disable-template-data", "--binary-file", file.name]
            file.flush()
            command = [str(self._program), "--insecure", "--proto", str(definition), "--import-paths", str(PROTO)]
            command += ["--call", f"{method.service}.{method.name}", "--format", "json", *source]
            command += ["--total", str(calls), "--concurrency", str(in_flight), "--timeout", "60s"]
            command += [
                "--connections",
                str(min(in_flight, CONNECTIONS)),
                "--max-recv-message-size",
                "16777216",
                address,
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{PROGRAM}: {(done.stderr or done.stdout).strip()[-500:]}")
        return _read(json.loads(done.stdout), calls)


def _delimited(messages: Sequence[Message]) -> bytes:
    out = io.BytesIO()
    for message in messages:
        proto.serialize_length_prefixed(message, out)
    return out.getvalue()


def _read(report: Any, calls: int) -> Load:
    if report["statusCodeDistribution"] != {"OK": calls}:
        errors = report.get("errorDistribution")
        raise RuntimeError(f"of {calls} calls: {report['statusCodeDistribution']} {errors}")
    latencies = {entry["percentage"]: entry["latency"] / 1e6 for entry in report["latencyDistribution"]}
    return Load(report["count"], report["rps"], latencies[50], latencies[99])
