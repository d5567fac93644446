"""Networks that are lent to commands: nobody else's, nothing but loopback, and unused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import Requirements

REPOSITORY = Path(__file__).resolve().parents[2]

_SCRIPT = """
import json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from casfs.networks import Networks
from casfs.sandbox import enter_namespace

if not json.loads(sys.argv[1]):
    enter_namespace(privileged=False)
networks = Networks()

def ask(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()

here = "import os; print(os.readlink('/proc/self/ns/net'))"
tells = '''
import os, socket
server = socket.socket()  # without SO_REUSEADDR: a closed connection in here would keep it from binding
server.bind(("127.0.0.1", 4711)), server.listen()
client = socket.create_connection(("127.0.0.1", 4711))
other, _ = server.accept()
client.close(), other.recv(1), other.close()
v6 = socket.create_server(("::1", 4712), family=socket.AF_INET6)
print(os.readlink('/proc/self/ns/net'))
'''
hides = '''
import os, socket
kept = socket.socket(socket.AF_UNIX)
kept.bind("\\\\0name")
bound = socket.create_server(("127.0.0.1", 4711))
print(os.readlink('/proc/self/ns/net'))
'''
devices = "print([line.split(':')[0].strip() for line in open('/proc/net/dev').read().splitlines()[2:]])"

def lend(script):
    with networks.enter() as apart:
        return [apart, ask(script)]

home = ask(here)
seen = [lend(script) for script in (here, hides, hides, here, tells, tells, tells, here)]
devices = lend(devices)
with ThreadPoolExecutor(1) as other:
    other.submit(int).result()
    with networks.enter() as apart:
        outer = ask(here)
        inner = other.submit(lambda: [ask(here), *lend(here)]).result()
try:
    with networks.enter():
        raise KeyError
except KeyError:
    pass
back = ask(here)
networks.close()
networks.close()
print(json.dumps([home, seen, devices, outer, inner, back]))
"""


def run(*, privileged: bool) -> Any:
    command = [sys.executable, "-c", _SCRIPT, json.dumps(privileged)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_network_is_lent_again_unless_something_was_sent_in_it(requires: Requirements) -> None:
    requires.admin()
    home, seen, devices, outer, inner, back = run(privileged=True)
    assert all(apart and place != home for apart, place in seen)
    # The three that told had each a network in which nothing was sent before.
    first, hid, hid_again, after, told, *_ = (place for _, place in seen)
    assert first == hid == hid_again == after == told
    assert devices == [True, "['lo']"]
    # Only this thread is elsewhere, and each in a network of its own.
    assert inner[0] == home and inner[1] and inner[2] not in (home, outer) and outer != home
    assert back == home


def test_where_there_is_no_way_back_nobody_goes(requires: Requirements) -> None:
    requires.admin()
    home, seen, *_ = run(privileged=False)
    assert [apart for apart, _ in seen] == [False] * len(seen)
    assert {place for _, place in seen} == {home}
