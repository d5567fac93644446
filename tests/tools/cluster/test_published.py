"""Our definitions of the remote workers' interface have the field numbers that BuildGrid ships."""

from __future__ import annotations

import inspect
import json
import subprocess
from typing import Any

import pytest

from tests.conftest import Requirements
from tests.tools.cluster.buildgrid import get_environment
from tools.reapi.generated import bots_pb2, worker_pb2

# The first installs BuildGrid, if nobody has yet.
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

PACKAGE = "google.devtools.remoteworkers.v1test2"


def numbers_of(file: Any) -> dict[str, list[Any]]:
    """Number, type and label of each field, and the number of each enum's value, by full name."""
    found: dict[str, list[Any]] = {}

    def add_enum(enum: Any) -> None:
        found.update({f"{enum.full_name}.{value.name}": [value.number] for value in enum.values})

    def add_message(message: Any) -> None:
        for field in message.fields:
            found[field.full_name] = [field.number, field.type, field.is_repeated]
        for inner in message.nested_types:
            add_message(inner)
        for enum in message.enum_types:
            add_enum(enum)

    for message in file.message_types_by_name.values():
        add_message(message)
    for enum in file.enum_types_by_name.values():
        add_enum(enum)
    for service in file.services_by_name.values():
        for method in service.methods:
            found[method.full_name] = [method.input_type.full_name, method.output_type.full_name]
    return found


@pytest.mark.parametrize("ours", [bots_pb2, worker_pb2], ids=["bots", "worker"])
def test_what_both_define_is_the_same(ours: Any, requires: Requirements) -> None:
    name = ours.__name__.rpartition(".")[2]
    script = (
        "from __future__ import annotations\nimport importlib, json\nfrom typing import Any\n"
        + inspect.getsource(numbers_of)
        + f"module = importlib.import_module('buildgrid._protos.{PACKAGE}.{name}')\n"
        + "print(json.dumps(numbers_of(module.DESCRIPTOR)))\n"
    )
    python = get_environment(requires) / "bin" / "python"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    published = json.loads(done.stdout)
    mine = numbers_of(ours.DESCRIPTOR)
    # It lacks what came later; we lack what nobody calls.
    assert mine.keys() - published.keys() <= {f"{PACKAGE}.BotStatus.INITIALIZING"}
    assert {key: published[key] for key in mine.keys() & published.keys()} == {
        key: mine[key] for key in mine.keys() & published.keys()
    }
    assert len(mine.keys() & published.keys()) >= 9
