"""What config/ has for a server, started for real: the configuration by itself, and the unit by a real systemd."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.conftest import REPOSITORY, Casfs, wait_until
from tests.tools.server.conftest import SHA256, HttpClient, Server, connected
from tests.tools.server.systemd_root import Systemd

CONFIGURATION = (REPOSITORY / "config" / "casfs.toml").read_text()
UNIT = "casfs-serve.service"


BEFORE, SECTION, AFTER = re.split(r"(?m)(^\[serve\]\n(?:#.*\n|\n)*)", CONFIGURATION)


def uncommented(*keys: str) -> str:
    """The configuration with these keys of [serve] as they stand in its comments."""
    section = SECTION
    for key in keys:
        section, changed = re.subn(rf"(?m)^#({key} = .*)$", r"\1", section)
        assert changed == 1, key
    return f"{BEFORE}{section}{AFTER}"


# The configuration


def test_the_configuration_is_what_a_server_starts_with(casfs: Casfs) -> None:
    """With every line of [serve] that names no file as it stands there, but for ports that may be taken."""
    keys = re.findall(r"(?m)^#([a-z-]+) = ", SECTION)
    text = uncommented(*(key for key in keys if not key.startswith(("tls-", "write-back"))))
    text = re.sub(r"127\.0\.0\.1:8[09]80", "127.0.0.1:0", text)
    tokens = casfs.directory / "tokens"
    tokens.write_text("write first-token\n")
    file = casfs.directory / "casfs.toml"
    file.write_text(text.replace('"/etc/casfs/tokens"', f'"{tokens}"'))
    casfs.environment["CASFS_CONFIG"] = str(file)
    server = Server(casfs, configured=True)
    try:
        with HttpClient(server, authorization="Bearer first-token") as web:
            path = web.put_blob(b"over HTTP")
            assert web("GET", path).body == b"over HTTP"
        with connected(server, token="first-token") as client:
            assert client.read(SHA256.of(b"over HTTP")) == b"over HTTP"
    finally:
        assert server.stop() == 0


# The unit


@pytest.fixture
def systemd(tmp_path: Path, requires: Requirements) -> Iterator[Systemd]:
    made = Systemd(tmp_path, requires)
    made.add(f"etc/systemd/system/{UNIT}", (REPOSITORY / "config" / UNIT).read_text())
    made.add("etc/casfs/casfs.toml", uncommented("http-listen", "max-size", "tokens"))
    made.add("etc/casfs/tokens", "write first-token\n")
    with made:
        yield made


_ASK = """
import sys, urllib.error, urllib.request
method, url, token, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}"} if token else {}
request = urllib.request.Request(url, body.encode() or None, headers, method=method)
try:
    with urllib.request.urlopen(request) as response:
        print(response.status, response.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""


def ask(systemd: Systemd, path: str, token: str = "", method: str = "GET", body: str = "") -> str:
    url = f"http://127.0.0.1:8080{path}"
    return systemd.ok("python3", "-c", _ASK, method, url, token, body)


def show(systemd: Systemd, name: str) -> str:
    return systemd.ok("systemctl", "show", "--value", "--property", name, UNIT).strip()


def start(systemd: Systemd) -> None:
    """Start the service, as the unit says that people do."""
    systemd.ok("systemctl", "enable", "--now", UNIT)
    # Which keeps in mind how it ends.
    systemd.ok("systemctl", "start", "multi-user.target")


def test_the_unit_is_started_reloaded_and_stopped_by_systemd(systemd: Systemd) -> None:
    # Not verified by the machine's own: it knows no command at that place.
    checked = systemd.run("systemd-analyze", "verify", f"/etc/systemd/system/{UNIT}")
    assert (checked.code, checked.out, checked.err) == (0, "", "")
    systemd.ok("systemd-analyze", "security", "--offline=true", "--threshold=15", f"/etc/systemd/system/{UNIT}")

    start(systemd)
    assert ask(systemd, "/healthz") == "200 ok\n\n", "it had said that it was ready"
    path = f"/ac/{'5e' * 32}"
    assert ask(systemd, path, "first-token", "PUT", "kept").startswith("200")
    assert ask(systemd, path, "first-token") == "200 kept\n"
    found = systemd.ok("find", "/var/lib/casfs/blobs/ac", "-type", "f")
    assert systemd.ok("cat", found.strip()) == "kept"

    process = show(systemd, "MainPID")
    enter = ("nsenter", f"--target={process}", "--mount", "setpriv", "--reuid=65534", "--clear-groups")
    assert systemd.ok(*enter, "cat", "/proc/1/mountinfo"), "what says which leases are mounts"
    systemd.ok("sh", "-c", "echo write second-token >/etc/casfs/tokens")
    systemd.ok("systemctl", "reload", UNIT)
    wait_until(lambda: ask(systemd, path, "second-token") == "200 kept\n")
    assert ask(systemd, path, "first-token").startswith("401")
    assert (show(systemd, "ActiveState"), show(systemd, "MainPID")) == ("active", process)

    systemd.ok("systemctl", "stop", UNIT)
    ended = [show(systemd, name) for name in ("ActiveState", "Result", "ExecMainCode", "ExecMainStatus")]
    assert ended == ["inactive", "success", "1", "0"], "it exited, with 0"
    assert not systemd.run("ls", "/var/lib/casfs/tmp").out


def test_several_processes_are_one_service_that_is_started_again_when_one_is_killed(systemd: Systemd) -> None:
    systemd.ok("sed", "-i", "s/^#processes = 1$/processes = 2/", "/etc/casfs/casfs.toml")
    start(systemd)
    main = show(systemd, "MainPID")
    [first, second] = systemd.ok("cat", f"/proc/{main}/task/{main}/children").split()
    systemd.ok("kill", "-9", first)
    wait_until(lambda: show(systemd, "NRestarts") == "1" and show(systemd, "ActiveState") == "active")
    assert ask(systemd, "/healthz").startswith("200")
    assert not systemd.run("ls", f"/proc/{second}").out
    systemd.ok("systemctl", "stop", UNIT)
    assert show(systemd, "Result") == "success"
