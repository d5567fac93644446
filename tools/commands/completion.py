"""``casfs completion``: a script for the shell, made from the parsers themselves.

In ~/.bashrc: ``eval "$(casfs completion bash)"``. For zsh, once:
``casfs completion zsh > "${fpath[1]}/_casfs"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tools.commands import load_all
from tools.config import Settings

_SHELLS = ("bash", "zsh", "tcsh")

EXAMPLES = """
eval "$(casfs completion bash)"                        # in ~/.bashrc
casfs completion zsh > ~/.zsh/completions/_casfs       # a directory of $fpath
casfs completion tcsh > ~/.casfs.tcsh                  # then: source ~/.casfs.tcsh
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs completion`` takes."""
    parser.add_argument("shell", choices=_SHELLS, help='in bash: eval "$(casfs completion bash)"')


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print the script."""
    import shtab

    from tools.main import make_parser

    parser = make_parser()
    load_all(parser)
    manifests = shtab.cmd("casfs manifest list --names 2>/dev/null")
    for action in _actions(parser):
        if getattr(action, "complete", None) == "manifest":
            setattr(action, "complete", manifests)  # noqa: B010
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of every verb."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
