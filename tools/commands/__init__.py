"""The verbs of `casfs`, a module each, loaded when they are chosen and not before.

A verb's module has two functions:

    add_arguments(parser)        declare what the verb takes
    run(args, settings) -> int   do it; returns an exit code, raises what `tools.exits` knows

and a text EXAMPLES, a command a line with a comment behind it, which its help ends with; and perhaps one, EXITS, that
says when it ends with which code, where the table of `casfs --help` is not enough.

The tables of verbs say what ``--help`` lists, so that listing them costs no import.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    _SubParsersAction = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    _SubParsersAction = argparse._SubParsersAction

VERBS: Mapping[str, str] = {
    "add": "put files, directories or a stream into the store, and print their digests",
    "manifest": "make, list, show, compare, import, export and remove manifests",
    "ls": "list what a manifest has",
    "cat": "write files of a manifest to standard output",
    "mount": "mount a manifest on a directory",
    "prefetch": "bring in every blob of a manifest that the store lacks",
    "run": "run one command on a manifest's files, and keep what it makes",
    "serve": "be a remote cache for Bazel and other clients of the Remote Execution API",
    "worker": "run actions for a BuildGrid or a Buildbarn, in sandboxes",
    "sandboxfs": "make the sandboxes of a local Bazel, with files that stay where they are",
    "remap": "point paths of a mount elsewhere while programs use it",
    "trace": "what was used of a tree, and what was looked for in vain, by a trace",
    "umount": "unmount, and wait for the daemon to end",
    "stats": "what a mount has counted, or what the store holds",
    "checkout": "write a manifest's files into a directory",
    "verify": "hash every blob again, and repair the index",
    "gc": "remove what was not used for longest, down to a size; compress what is cold",
    "doctor": "what this machine can do, and what would help",
    "completion": "print a script that completes casfs commands in a shell",
}


def add_verbs(parser: argparse.ArgumentParser, package: str, verbs: Mapping[str, str]) -> None:
    """Give `parser` the verbs whose modules are in `package`; one of them must be chosen."""
    made = parser.add_subparsers(metavar="VERB", title="verbs", required=True, action=_Verbs, parser_class=_VerbParser)
    action = cast(_Verbs, made)
    for name, summary in verbs.items():
        module = f"{name}_" if keyword.iskeyword(name) else name
        action.add_verb(name, summary, f"{package}.{module}")


class _VerbParser(argparse.ArgumentParser):
    """A verb's parser, which is nothing until it is needed: making all of them is a tenth of the start."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def make(self) -> None:
        """Become the parser that was asked for."""
        super().__init__(**self._options)


class _Verbs(_SubParsersAction):
    """argparse's action for subcommands, importing the chosen one's module first.

    argparse offers no public way to declare a subcommand's arguments late.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._modules: dict[str, str] = {}

    def add_verb(self, name: str, summary: str, module: str) -> None:
        """List a verb; its module is not imported yet."""
        self.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        self._modules[name] = module

    def load(self, name: str) -> argparse.ArgumentParser:
        """The verb's parser, complete."""
        parser = cast(_VerbParser, self.choices[name])
        module = self._modules.pop(name, None)
        if module is not None:
            verb = importlib.import_module(module)
            parser.make()
            add_common(parser)
            verb.add_arguments(parser)
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            parser.epilog = "\n  ".join(["examples:", *verb.EXAMPLES.strip().splitlines()])
            if hasattr(verb, "EXITS"):
                parser.epilog += "\n\n" + "\n  ".join(["exit codes:", *verb.EXITS.strip("\n").splitlines()])
            if hasattr(verb, "run"):
                parser.set_defaults(run=verb.run)
        return parser

    def load_all(self) -> None:
        """Complete the parsers of all verbs, and of theirs."""
        for name in list(self.choices):
            load_all(self.load(name))

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        self.load(values[0])
        super().__call__(parser, namespace, values, option_string)


def load_all(parser: argparse.ArgumentParser) -> None:
    """Load every verb below a parser, as shell completion needs."""
    for action in parser._actions:
        if isinstance(action, _Verbs):
            action.load_all()


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options every verb takes, before the verb and after it."""
    group = parser.add_argument_group("common options")
    # Without defaults: one given before the verb must not be overwritten by the verb's.
    store = group.add_argument(
        "--store",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="the store; else $CASFS_STORE, the configuration's, or the user's cache directory",
    )
    config = group.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="the configuration; else $CASFS_CONFIG, or casfs/config.toml in the user's configuration directory",
    )
    group.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of what fails"
    )
    complete(store, "directory")
    complete(config, "file")


def complete(action: argparse.Action, what: str) -> None:
    """Say what a shell completes an argument with: ``file``, ``directory`` or ``manifest``."""
    setattr(action, "complete", what)  # noqa: B010 - the attribute that shtab looks for
