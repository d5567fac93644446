"""Bazel builds a real C project by a real BuildGrid whose workers are ours, in network namespaces of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Requirements
from tests.tools.cluster.buildgrid import BuildGridServer, postgresql, running_buildgrid
from tests.tools.cluster.test_worker import working
from tests.tools.conftest import REPOSITORY, wait_until
from tests.tools.server.bazel_project import make_project
from tests.tools.worker.conftest import live_processes
from tools.bench.bazel import Bazel
from tools.server.address import Address, reserve

EVERYTHING = "//:unpacked"

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def workspace(tmp_path: Path, requires: Requirements) -> Path:
    requires.programs("bazel", "bwrap")
    return make_project(tmp_path, requires)


@pytest.fixture
def builder(tmp_path: Path, workspace: Path) -> Iterator[Bazel]:
    with Bazel(tmp_path, workspace) as bazel:
        yield bazel


def executor(server: BuildGridServer) -> str:
    return f"--remote_executor={server.url}"


def outputs(workspace: Path) -> dict[str, bytes]:
    """All that was built, by path."""
    top = (workspace / "bazel-bin").resolve()
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def test_a_build_in_the_cluster_has_the_outputs_of_a_local_one(
    tmp_path: Path, workspace: Path, builder: Bazel, buildgrid: BuildGridServer
) -> None:
    local = builder.build(EVERYTHING)
    assert local.code == 0, local.text
    made = outputs(workspace)
    builder.forget()
    log = tmp_path / "actions"
    with working(tmp_path / "one", buildgrid, "--action-log", log):
        remote = builder.build(executor(buildgrid), EVERYTHING, local=False)
    assert remote.code == 0, remote.text
    assert remote.processes.get("remote") == local.processes["local"], remote.text
    assert outputs(workspace) == made
    assert len(log.read_text().splitlines()) == local.processes["local"]


class Network:
    """A network namespace with one way out, to `gateway`; it is gone with the process that keeps it."""

    def __init__(self, number: int) -> None:
        # Addresses for documentation: nobody's network has them.
        self.gateway = f"198.51.100.{number * 4 + 1}"
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        wait_until(lambda: Path(f"/proc/{self._holder.pid}/comm").read_text() == "sleep\n")
        inside = " ".join(self.prefix)
        name = f"casfs-test{number}"
        script = f"""
            ip link add {name} type veth peer name eth0 netns {self._holder.pid}
            ip addr add {self.gateway}/30 dev {name}
            ip link set {name} up
            {inside} ip addr add 198.51.100.{number * 4 + 2}/30 dev eth0
            {inside} ip link set eth0 up
            {inside} ip route add default via {self.gateway}
        """
        try:
            subprocess.run(["sh", "-euc", script], check=True)
        except BaseException:
            self.close()
            raise

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words that run a command in there."""
        return ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--")

    def close(self) -> None:
        """End it."""
        self._holder.kill()
        self._holder.wait()


@contextmanager
def network(number: int) -> Iterator[Network]:
    made = Network(number)
    try:
        yield made
    finally:
        made.close()


def test_a_build_outlives_one_of_two_workers_in_networks_of_their_own(
    tmp_path: Path, workspace: Path, builder: Bazel, requires: Requirements
) -> None:
    requires.admin()
    requires.programs("ip", "unshare", "nsenter")
    (tmp_path / "grid").mkdir()
    with network(0) as left, network(1) as right:
        with running_buildgrid(requires, tmp_path / "grid", host=left.gateway) as server:
            log = tmp_path / "left.log"
            with (
                working(tmp_path / "left", server, "--action-log", log, "--jobs", "1", prefix=left.prefix) as doomed,
                working(tmp_path / "right", server, "--jobs", "1", prefix=right.prefix) as other,
            ):
                store = str(doomed.casfs.store)

                def kill_in_mid_action() -> None:
                    # It has run some, and its command is running now.
                    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, 300)
                    wait_until(lambda: set(live_processes(store)) - {doomed.process.pid}, 300)
                    doomed.process.kill()

                killer = threading.Thread(target=kill_in_mid_action)
                killer.start()
                built = builder.build(executor(server), EVERYTHING, local=False)
                killer.join()
                assert built.code == 0, built.text
                assert built.processes.get("remote"), built.text
                assert doomed.process.wait(30) == -9
                wait_until(lambda: not live_processes(store))
                assert other.stop() == 0
            assert other.casfs.ok("verify").code == 0
    assert (workspace / "bazel-bin" / "encode.c").read_bytes() == (workspace / "c/enc/encode.c").read_bytes()


def test_what_the_readme_shows_works(tmp_path: Path, workspace: Path, builder: Bazel, requires: Requirements) -> None:
    requires.programs("createdb")
    readme = (REPOSITORY / "README.md").read_text()
    [shown] = re.findall(r"^```sh\n(python3 -m venv bg .*?)^```$", readme, re.DOTALL | re.MULTILINE)
    [build] = re.findall(r"`bazel build (--remote_executor=grpc://\S+ //\.\.\.)`", readme)
    place = tmp_path / "place"
    shutil.copytree(REPOSITORY / "config", place / "config")
    taken, address = reserve(Address("127.0.0.1", 0))
    # As shown, but for the port: others may use this machine.
    configuration = place / "config" / "buildgrid.yml"
    configuration.write_text(configuration.read_text().replace("127.0.0.1:50051", str(address)))
    shown, build = (text.replace("127.0.0.1:50051", str(address)) for text in (shown, build))
    with taken, postgresql(requires) as database:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CASFS_STORE": str(place / "store"),
            "HOME": str(place),
            "PGHOST": str(database),
            "PGUSER": "casfs",
        }
        with open(tmp_path / "said", "wb") as said:
            shell = subprocess.Popen(
                ["bash", "-euc", shown], cwd=place, env=environment, stdout=said, stderr=said, start_new_session=True
            )
        try:
            joined = re.compile(rb"began session")
            log = place / "store" / "casfs.log"
            wait_until(lambda: shell.poll() is not None or (log.exists() and joined.search(log.read_bytes())), 300)
            assert shell.poll() is None, (tmp_path / "said").read_text()
            *options, _ = build.split()
            built = builder.build(*options, "//:common", local=False)
            assert built.code == 0, built.text
            assert built.processes.get("remote"), built.text
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
            shell.wait(30)
            wait_until(lambda: not live_processes(str(place)))
