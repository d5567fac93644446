"""A `casfs serve --execute`, and a client that makes actions and has them run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from store.digest import Digest, DigestFunction
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import SHA256, Client, Server
from tools.reapi import methods
from tools.reapi.generated import operations_pb2 as operations
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.requests import read_digest, write_digest

EXECUTE = ("--execute", "--host-root")


class Link(NamedTuple):
    """A symbolic link in a tree."""

    target: str


class Program(NamedTuple):
    """An executable file in a tree."""

    data: bytes


Files = Mapping[str, "bytes | Link | Program | None"]
"""A tree by paths; None is an empty directory."""


def make_tree(files: Files, function: DigestFunction = SHA256) -> tuple[Digest, list[bytes]]:
    """The root's digest, and all blobs: contents and Directory messages."""
    blobs: list[bytes] = []

    def make(prefix: str) -> Digest:
        directory = reapi.Directory()
        names = sorted({path[len(prefix) :].partition("/")[0] for path in files if path.startswith(prefix)} - {""})
        for name in names:
            content = files.get(prefix + name)
            if isinstance(content, Link):
                directory.symlinks.add(name=name, target=content.target)
            elif isinstance(content, bytes | Program):
                data = content.data if isinstance(content, Program) else content
                blobs.append(data)
                executable = isinstance(content, Program)
                directory.files.add(name=name, digest=write_digest(function.of(data)), is_executable=executable)
            else:
                directory.directories.add(name=name, digest=write_digest(make(f"{prefix}{name}/")))
        blobs.append(directory.SerializeToString())
        return function.of(blobs[-1])

    return make(""), blobs


class Remote(Client):
    """A client of a server that executes."""

    def put(self, arguments: Sequence[str], files: Files | Digest | None = None, **options: Any) -> Digest:
        """Upload an action and all it needs.

        `options` are fields of Command, and of Action: timeout (seconds),
        do_not_cache, salt, platform (a mapping).
        """
        function = options.pop("function", SHA256)
        environment = options.pop("environment", {"PATH": "/usr/bin:/bin"})
        timeout = options.pop("timeout", None)
        platform = options.pop("platform", {})
        of_action = {name: options.pop(name) for name in ("do_not_cache", "salt") if name in options}
        root, blobs = (files, []) if isinstance(files, Digest) else make_tree(files or {}, function)
        command = reapi.Command(
            arguments=arguments,
            environment_variables=[
                reapi.Command.EnvironmentVariable(name=name, value=value) for name, value in environment.items()
            ],
            **options,
        ).SerializeToString()
        action = reapi.Action(
            command_digest=write_digest(function.of(command)), input_root_digest=write_digest(root), **of_action
        )
        if timeout is not None:
            action.timeout.FromNanoseconds(int(timeout * 1e9))
        if platform:
            action.platform.properties.extend(
                reapi.Platform.Property(name=name, value=value) for name, value in platform.items()
            )
        data = action.SerializeToString()
        self.add(*dict.fromkeys([*blobs, command, data]), function=function)
        return DigestFunction(function).of(data)

    def begin(self, action: Digest, timeout: float = 60, **options: Any) -> Iterator[operations.Operation]:
        """Execute: the states as they come."""
        request = reapi.ExecuteRequest(
            action_digest=write_digest(action),
            digest_function=reapi.DigestFunction.Value.Name(action.function),
            **options,
        )
        states: Iterator[operations.Operation] = self.call(methods.EXECUTE, request, timeout=timeout)
        return states

    def execute(self, action: Digest, timeout: float = 60, **options: Any) -> reapi.ExecuteResponse:
        """Execute, and wait for the response."""
        return response_of(list(self.begin(action, timeout, **options))[-1])

    def run(self, arguments: Sequence[str], files: Files | None = None, **options: Any) -> reapi.ExecuteResponse:
        """Upload and execute."""
        return self.execute(self.put(arguments, files, **options))

    def sh(self, script: str, files: Files | None = None, **options: Any) -> reapi.ExecuteResponse:
        """The same of a shell's script, which ends at its first failure."""
        return self.run(["sh", "-euc", script], files, **options)

    def blob(self, message: reapi.Digest, function: DigestFunction = SHA256) -> bytes:
        """A blob of a result; empty where none is named."""
        return self.read(read_digest(message, function)) if message.size_bytes else b""

    def outputs(self, response: reapi.ExecuteResponse) -> dict[str, bytes]:
        """The contents of output files, by path."""
        return {file.path: self.blob(file.digest) for file in response.result.output_files}

    def tree(self, message: reapi.OutputDirectory) -> dict[str, bytes | str]:
        """The files and links of an output directory."""
        tree = reapi.Tree.FromString(self.blob(message.tree_digest))
        known = {SHA256.of(child.SerializeToString()).hex: child for child in tree.children}
        found: dict[str, bytes | str] = {}

        def walk(prefix: str, directory: reapi.Directory) -> None:
            found.update({prefix + file.name: self.blob(file.digest) for file in directory.files})
            found.update({prefix + link.name: link.target for link in directory.symlinks})
            for below in directory.directories:
                walk(f"{prefix}{below.name}/", known[below.digest.hash])

        walk("", tree.root)
        return found

    def operation(self, name: str) -> operations.Operation:
        """GetOperation."""
        found: operations.Operation = self.call(methods.GET_OPERATION, operations.GetOperationRequest(name=name))
        return found


def response_of(operation: operations.Operation) -> reapi.ExecuteResponse:
    """What a finished operation has."""
    assert operation.done and operation.WhichOneof("result") == "response"
    response = reapi.ExecuteResponse()
    assert operation.response.Unpack(response)
    return response


def stage_of(operation: operations.Operation) -> str:
    """At what stage an operation is."""
    metadata = reapi.ExecuteOperationMetadata()
    assert operation.metadata.Unpack(metadata)
    return reapi.ExecutionStage.Value.Name(metadata.stage)


def live_processes(word: str) -> list[int]:
    """Processes of this machine with a word in their command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if word.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
            except OSError:
                continue
    return found


@contextmanager
def executing(casfs: Casfs, *options: str | Path) -> Iterator[Server]:
    """A server that executes, and is stopped at the end."""
    server = Server(casfs, *EXECUTE, *options)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def remote_of(server: Server) -> Iterator[Remote]:
    """A client of it."""
    client = Remote(server.address)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory, requires: Requirements) -> Iterator[Server]:
    """One server for the tests of a module."""
    requires.programs("bwrap")
    directory = tmp_path_factory.mktemp("executor")
    with executing(Casfs(directory), "--action-log", directory / "actions", "--jobs", "2") as server:
        yield server


@pytest.fixture
def remote(executor: Server) -> Iterator[Remote]:
    """A client of the shared server."""
    with remote_of(executor) as client:
        yield client
