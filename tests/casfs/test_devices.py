"""A /dev that is lent to commands: as the one that bubblewrap makes for each, and of none is anything left in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Requirements

REPOSITORY = Path(__file__).resolve().parents[2]

_SCRIPT = """
import json, os, sys
from pathlib import Path
from casfs import bubblewrap
from casfs.devices import Devices
from casfs.mountinfo import list_mounts
from casfs.sandbox import enter_namespace

enter_namespace(privileged=json.loads(sys.argv[2]))
directory = Path(sys.argv[1])
devices = Devices(directory)

def run(place, script):
    said = os.open(directory / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    words = bubblewrap.command_line(False, True, "", place)
    ended = bubblewrap.run(words, ["/bin/sh", "-uc", script], {"PATH": "/usr/bin:/bin"}, stdout=said, stderr=said)
    return ended.code, (directory / "said").read_text()

def mounts():
    return sum(mount.path.startswith(os.fsencode(directory)) for mount in list_mounts())

looks = "find /dev -printf '%P %y %l %m\\n' | sort"
uses = '''
    echo lost > /dev/null && head -c 3 /dev/zero | od -An -tx1 && test -c /dev/tty
    head -c 1 /dev/urandom | wc -c; test ! -e /dev/console; readlink /dev/fd/0
    python3 -c 'import os; print(os.ttyname(os.openpty()[1]))'
    echo kept > /dev/shm/file && cat /dev/shm/file
    for what in "touch /dev/new" "rm -f /dev/null" "mkdir /dev/shm/../d" "touch /dev/pts/x" "mknod /dev/n c 1 3"; do
        $what 2> /dev/shm/error && echo "could $what"
    done
    :
'''
with devices.lend() as place, devices.lend() as other:
    differ = place != other
    shown = [run("", looks), run(place, looks)]
    used = [run("", uses), run(place, uses), run(place, uses), run(other, uses)]
    after = [run(place, looks), run(other, "ls -A /dev/shm")]
with devices.lend() as again:
    same = again in (place, other)
held = mounts()
devices.close()
devices.close()
print(json.dumps([differ, same, shown, used, after, held, mounts(), sorted(os.listdir(directory))]))
"""


def run(directory: Path, *, privileged: bool) -> Any:
    command = [sys.executable, "-c", _SCRIPT, str(directory), json.dumps(privileged)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("privileged", [True, False], ids=["as root", "in a user namespace"])
def test_it_is_as_bubblewraps_own_and_the_next_finds_nothing_in_it(
    tmp_path: Path, requires: Requirements, privileged: bool
) -> None:
    requires.admin()
    requires.programs("bwrap", "python3")
    differ, same, shown, used, after, held, left, names = run(tmp_path, privileged=privileged)
    assert differ and same
    assert shown[0] == shown[1] and shown[0][0] == 0 and "null c" in shown[0][1]
    assert used[0] == [0, " 00 00 00\n1\n/dev/null\n/dev/pts/0\nkept\n"]
    assert used == [used[0]] * 4
    assert after == [shown[0], [0, ""]]
    assert held == 16 and (left, names) == (0, ["said"])
    assert os.stat("/dev/null").st_mode & 0o777 == 0o666
