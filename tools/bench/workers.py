"""Processes of their own that measure, and are asked over a pipe: a JSON object a line each way.

What opens sandboxes must be alone in its process (`enter_namespace`), and an
ordinary user's part needs a process that has given up its privilege; so each
side of such a scenario is a worker, which lives as long as the scenario and
waits while another side is measured. It has what a real worker has after a
while: everything imported, a store open, layers warm.

A worker's module calls `serve` when it is run; `asked` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from casfs.errors import CasfsError
from store.errors import StoreError
from tools.bench.ordinary_user import give_up_privilege, leave_namespace, make_reachable
from tools.bench.scratch import ending_on_signals, stop

_REPOSITORY = Path(__file__).resolve().parents[2]
_HOME = Path("/mnt")
"""The ordinary user's, in a namespace of its own."""
_END_SECONDS = 60.0


class Refused(Exception):
    """A worker can't do what it was asked; says why."""


class Worker:
    """The asking side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer. Raises Refused; RuntimeError if the worker has failed."""
        self.tell(**request)
        return self.answer()

    def tell(self, **request: Any) -> None:
        """Ask, and wait for the `answer` later."""
        if self._process.stdin is None:
            raise RuntimeError("the worker has no pipe")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says next, asked before."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError("a worker of the benchmark failed; see above")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer


@contextmanager
def asked(module: str, *arguments: object, reachable: Path | None = None) -> Iterator[Worker]:
    """The module as a worker, until the context ends.

    With `reachable` it is an ordinary user, who can reach that directory and
    owns it. Raises Refused where the worker can't start.
    """
    # In a session of its own: a Ctrl-C is for us, who tell it to end.
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(reachable or ""), module, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_REPOSITORY,
        start_new_session=True,
    )
    with process:
        try:
            worker = Worker(process)
            worker.answer()
            yield worker
        except BaseException:
            process.terminate()
            raise
        finally:
            if process.stdin:
                process.stdin.close()
            stop(process, _END_SECONDS)


def serve(begin: Callable[[ExitStack], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The worker's side: `begin` gives the function that answers; both may refuse by an error that has a message.

    What `begin` puts on the stack is undone at the end.
    """
    with ending_on_signals(), ExitStack() as stack:
        try:
            answer = begin(stack)
            _say({})
        except (CasfsError, StoreError, Refused) as error:
            _say({"refused": str(error)})
            return
        for line in sys.stdin:
            try:
                _say(answer(json.loads(line)))
            except (CasfsError, StoreError, Refused) as error:
                _say({"refused": str(error)})


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _start(reachable: str, module: str, *arguments: str) -> None:
    """Become who the worker shall be, and then the worker."""
    if reachable:
        leave_namespace(_HOME)
        make_reachable([Path(sys.prefix), Path(sys.base_prefix), _REPOSITORY, Path(reachable)], _HOME)
        give_up_privilege()
        os.environ |= {"HOME": str(_HOME), "CASFS_RUNTIME_DIR": str(_HOME / "run"), "PYTHONDONTWRITEBYTECODE": "1"}
        os.chdir(_REPOSITORY)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    _start(*sys.argv[1:])
