"""An action's Command as a worker takes it: checked, with the paths of its outputs and what it asks of a platform.

Values and their checks, no I/O. What is wrong in itself is an InvalidArgument,
what this worker doesn't offer a FailedPrecondition.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from store.digest import Digest, DigestFunction
from store.entries import path_order, printable, split_path
from store.errors import BadName
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.errors import FailedPrecondition, InvalidArgument
from tools.server.requests import read_digest

_YES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_MACHINES = {
    "x86_64": ("x86-64", "x86_64", "amd64", "x86-64-avx", "x86-64-avx2"),
    "aarch64": ("aarch64", "arm64", "armv8"),
}


@dataclass(frozen=True, slots=True)
class Offer:
    """What actions can have here. Durations in seconds.

    `host_root`: they see the host's directories, unless they say
    ``host-root=false``. `network`: those that say ``network=true`` get it.
    `properties`: further ones that actions may name, with their values.
    """

    host_root: bool = False
    network: bool = False
    properties: Mapping[str, frozenset[str]] = field(default_factory=dict)
    longest: float = 3600.0


@dataclass(frozen=True, slots=True)
class Output:
    """A declared output: `path` as the command has it, `place` in the input root; `kind` is what it has to be.

    `kind` is empty where anything is taken.
    """

    path: str
    place: bytes
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """What to run; `outputs` each once, `timeout` in seconds."""

    root: Digest
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str
    outputs: tuple[Output, ...]
    timeout: float
    cacheable: bool
    host_root: bool
    network: bool
    platform: tuple[tuple[str, str], ...]
    """Names and values of the platform properties that it asks for."""
    tree: bool
    """Output directories are to be named by Tree messages."""
    directory_messages: bool
    """Output directories are to be named by Directory messages."""

    @property
    def places(self) -> list[bytes]:
        """The outermost outputs: what is in another one comes with it."""
        outer: list[bytes] = []
        for place in sorted({output.place for output in self.outputs}, key=path_order):
            if not (outer and place.startswith(outer[-1] + b"/")):
                outer.append(place)
        return outer


def read_task(action: reapi.Action, command: reapi.Command, function: DigestFunction, offer: Offer) -> Task:
    """The task of an action. Raises InvalidArgument, FailedPrecondition, BadDigest."""
    if not command.arguments or not command.arguments[0]:
        raise InvalidArgument("the command has no arguments: the first is the program to run")
    if any("\0" in argument for argument in command.arguments):
        raise InvalidArgument("an argument of the command has a NUL in it")
    directory = _read_directory(command.working_directory)
    host_root, network = _read_platform(action, command, offer)
    form = command.output_directory_format
    return Task(
        root=read_digest(action.input_root_digest, function),
        arguments=tuple(command.arguments),
        environment=_read_environment(command),
        directory=directory,
        outputs=tuple(_read_outputs(command, directory)),
        timeout=_read_timeout(action, offer.longest),
        cacheable=not action.do_not_cache,
        host_root=host_root,
        network=network,
        platform=tuple((wish.name, wish.value) for wish in _platform(action, command).properties),
        tree=form != reapi.Command.DIRECTORY_ONLY,
        directory_messages=form != reapi.Command.TREE_ONLY,
    )


def _read_directory(text: str) -> str:
    if not text:
        return ""
    try:
        split_path(os.fsencode(text), "working directory")
    except BadName as error:
        raise InvalidArgument(str(error)) from error
    return text


def _read_environment(command: reapi.Command) -> Mapping[str, str]:
    environment = {}
    for variable in command.environment_variables:
        if not variable.name or "=" in variable.name or "\0" in variable.name + variable.value:
            raise InvalidArgument(f"{variable.name[:80]!r} can't be a variable of the environment")
        environment[variable.name] = variable.value
    return environment


def _read_timeout(action: reapi.Action, longest: float) -> float:
    if not action.HasField("timeout"):
        return longest
    seconds = action.timeout.seconds + action.timeout.nanos / 1e9
    if seconds < 0:
        raise InvalidArgument(f"the timeout of {seconds:g} s is negative")
    if seconds > longest:
        raise InvalidArgument(f"the timeout of {seconds:g} s is more than the {longest:g} s that this worker allows")
    return seconds or longest


def _read_outputs(command: reapi.Command, directory: str) -> Iterable[Output]:
    if command.output_paths:
        declared = [(path, "") for path in command.output_paths]
    else:
        declared = [(path, "file") for path in command.output_files]
        declared += [(path, "directory") for path in command.output_directories]
    kinds: dict[str, str] = {}
    for path, kind in declared:
        if kinds.setdefault(path, kind) != kind:
            raise InvalidArgument(f"output {path!r} is declared both as a file and as a directory")
    outputs = [Output(path, _place(path, directory), kind) for path, kind in kinds.items()]
    for one, other in pairwise(sorted(outputs, key=lambda output: path_order(output.place))):
        if one.kind == "file" and other.place.startswith(one.place + b"/"):
            raise InvalidArgument(f"output {other.path!r} is inside of {one.path!r}, which is declared as a file")
    return outputs


def _place(path: str, directory: str) -> bytes:
    try:
        split_path(os.fsencode(path), "output")
    except BadName as error:
        raise InvalidArgument(str(error)) from error
    return os.fsencode(f"{directory}/{path}" if directory else path)


def _platform(action: reapi.Action, command: reapi.Command) -> reapi.Platform:
    return action.platform if action.HasField("platform") else command.platform


def _read_platform(action: reapi.Action, command: reapi.Command, offer: Offer) -> tuple[bool, bool]:
    """Whether it sees the host's root, and the network."""
    wanted = _platform(action, command)
    host_root, network = offer.host_root, False
    for wish in wanted.properties:
        name, value = wish.name, wish.value
        if name == "host-root":
            host_root = _read_flag(name, value)
            _require(not host_root or offer.host_root, name, value, "start it with --host-root")
        elif name == "network":
            network = _read_flag(name, value)
            _require(not network or offer.network, name, value, "start it with --network")
        elif name == "OSFamily":
            _require(value.lower() == "linux", name, value, "it is 'linux'")
        elif name == "ISA":
            _require(value.lower() in _machine_names(), name, value, f"it is {platform.machine()!r}")
        else:
            _require(value in offer.properties.get(name, ()), name, value, "--property names what else it offers")
    return host_root, network


def _machine_names() -> tuple[str, ...]:
    machine = platform.machine()
    return _MACHINES.get(machine, (machine,))


def machine_names() -> tuple[str, ...]:
    """This machine's kind as most say it: few names, as schedulers keep each combination of properties."""
    return _machine_names()[:2]


def _read_flag(name: str, value: str) -> bool:
    flag = _YES.get(value.lower())
    if flag is None:
        raise InvalidArgument(f"platform property {name}={value!r}: write true or false")
    return flag


def _require(met: bool, name: str, value: str, remedy: str) -> None:
    if not met:
        raise FailedPrecondition(
            f"no worker here has the platform property {printable(os.fsencode(name))[1:-1]}={value[:80]!r}: {remedy}"
        )
