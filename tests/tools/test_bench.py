"""The benchmark, with tiny sizes: that each scenario measures what it says, by shape and by counts; times are noise."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from casfs.mountinfo import mount_of
from tests.conftest import Requirements, find_mounts, find_processes, without_forgets
from tools.bench import volumes
from tools.bench.buildbox import get_buildbox_fuse
from tools.bench.load import get_generator
from tools.bench.machine import describe, lacks_journal
from tools.bench.measuring import Outcome, Settings, alternate
from tools.bench.picture import as_svg
from tools.bench.report import as_json, as_markdown
from tools.bench.scenarios import MODULES
from tools.bench.workers import Refused

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tools.bench", "--quick"]

pytestmark = [pytest.mark.timeout(960), pytest.mark.long]
"""The run of everything waits for disks (sync), which others may keep busy; it takes some minutes where nobody does."""


@dataclass(frozen=True, slots=True)
class Results:
    """What one run of all scenarios wrote."""

    value: dict[str, Any]
    text: str
    drawing: str
    left: list[str]
    """What it left where it worked."""

    def measures(self, scenario: str) -> dict[tuple[str, str], dict[str, Any]]:
        """The measures of a scenario, by what and side."""
        found = self.value["scenarios"][scenario]["measures"]
        return {(measure["what"], measure["side"]): measure for measure in found}

    def upcalls(self, scenario: str, what: str, side: str) -> dict[str, int]:
        """Without those that come when the kernel likes."""
        return without_forgets(self.measures(scenario)[what, side]["upcalls"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, requires: Requirements) -> Results:
    """One run of everything, a process as people start it."""
    requires.admin()
    requires.fuse()
    requires.programs("g++", "gcc", "pkg-config", "b3sum", "xargs", "busybox", "bwrap", "zstd", "bazel")
    scratch, output = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("output")
    command = [*COMMAND, "--write", "--output", str(output), "--scratch", str(scratch)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return Results(
        json.loads((output / "benchmarks.json").read_text()),
        (output / "BENCHMARKS.md").read_text(),
        (output / "benchmarks.svg").read_text(),
        os.listdir(scratch),
    )


def test_every_scenario_has_results_and_nothing_is_left(results: Results) -> None:
    assert list(results.value["scenarios"]) == list(MODULES)
    for name, scenario in results.value["scenarios"].items():
        needs_go = name == "fleet" and any("make bench-tools" in note for note in scenario["notes"])
        assert (scenario["measures"] or needs_go) and scenario["about"]
        assert not [note for note in scenario["notes"] if "left out" in note]
    assert results.left == []


def test_the_machine_is_described_without_its_name(results: Results) -> None:
    machine = results.value["machine"]
    assert machine["cpu"] and machine["cores"] >= 1
    assert {"kernel", "store_file_system", "python", "lmdb", "pyfuse3", "libfuse", "compiler"} <= machine.keys()
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", json.dumps(machine))


def test_each_measure_has_a_median_its_values_and_a_ratio_to_the_first_side(results: Results) -> None:
    for scenario in results.value["scenarios"].values():
        first: dict[str, float] = {}
        for measure in scenario["measures"]:
            assert measure["lowest"] <= measure["median"] <= measure["highest"]
            assert measure["values"]
            yardstick = first.setdefault(measure["what"], measure["median"])
            assert measure["ratio"] == (measure["median"] / yardstick if yardstick else None)
        for aim in scenario["aims"]:
            assert f"| {aim['what']} " in results.text


def test_the_compiler_reads_nothing_through_the_daemon_with_passthrough(results: Results) -> None:
    what = "preprocess only, wall"
    passed, native, pyfuse3 = (results.upcalls("compile", what, side) for side in ("passthrough", "native", "fuse"))
    assert "READ" not in passed and passed["OPEN"] > 100
    assert native["READ"] > 0 and pyfuse3["READ"] > 0
    assert native["OPEN"] == passed["OPEN"] == pyfuse3["OPEN"]
    assert results.measures("compile")[what, "host"]["ratio"] == 1


def test_10000_files_keep_to_their_budgets_of_upcalls(results: Results) -> None:
    files, directories = 1_000, 100
    for side in ("passthrough", "native", "fuse"):
        assert results.upcalls("files", "stat, first", side)["LOOKUP"] == files + directories
        assert results.upcalls("files", "missing, first", side) == {"LOOKUP": files}
        for what in ("stat, warm", "missing, warm"):
            assert results.upcalls("files", what, side) == {}
        opened = results.upcalls("files", "open+read+close, warm", side)
        assert opened == {"OPEN": files, "RELEASE": files}
    assert "READ" not in results.upcalls("files", "open+read+close, first", "passthrough")
    assert results.upcalls("files", "open+read+close, first", "native")["READ"] == files
    assert results.upcalls("files", "walk, warm", "passthrough") == {}


def test_two_mounts_share_the_page_cache_of_a_file_with_passthrough(results: Results) -> None:
    measures = results.measures("bigfile")
    blob, mounts = (f"page cache of {where}, read through two mounts" for where in ("the blob", "both mounts"))
    assert measures[blob, "passthrough"]["median"] == pytest.approx(1, abs=0.01)
    assert measures[mounts, "passthrough"]["median"] == 0
    assert measures[mounts, "native"]["median"] == pytest.approx(2, abs=0.01)
    for what in ("read, 1 MiB blocks", "mapped"):
        assert "READ" not in measures[what, "passthrough"]["upcalls"]


def test_a_first_stat_costs_the_same_in_a_large_tree_and_in_a_small_one(results: Results) -> None:
    large, small = (results.upcalls("million", "first stat", f"{count} entries") for count in ("20,000", "1,000"))
    assert large == small
    assert large["LOOKUP"] == 3 and large["READ"] == 0
    memory = results.measures("million")["daemon memory after the first stat, anonymous", "20,000 entries"]
    assert 0 < memory["median"] < 100


def test_an_ingest_is_measured_beside_copies_and_hashes(results: Results) -> None:
    sides = {side for what, side in results.measures("ingest") if what == "ingest, files"}
    assert sides == {"casfs", "casfs, again", "cp -r && sync", "cp -r", "b3sum"}


def test_polling_is_measured_on_and_off(results: Results) -> None:
    measures = results.measures("polling")
    for what in ("burst, stat of a new name", "idle, daemon CPU in 1 s", "cores busy, loops", "preprocess, wall"):
        assert {"sleeping", "polling"} <= {side for name, side in measures if name == what}
    # A daemon that went on polling would have used the whole second.
    assert measures["idle, daemon CPU in 1 s", "polling"]["median"] < 50


def test_upcalls_are_measured_beside_the_examples_of_libfuse(results: Results) -> None:
    measures = results.measures("upcall")
    for operation in ("LOOKUP, missing", "GETATTR", "OPEN to RELEASE"):
        sides = {side for what, side in measures if what == f"{operation}, wall"}
        assert sides == {"passthrough_ll", "hello_ll", "passthrough", "native", "fuse"}
    assert measures["GETATTR, wall", "passthrough"]["upcalls"] == {"answers": 1}
    assert measures["OPEN to RELEASE, wall", "passthrough"]["upcalls"] == {"answers": 2}
    assert measures["OPEN to RELEASE, wall", "passthrough_ll"]["upcalls"] == {"answers": 3}, "a FLUSH too"
    assert measures["OPEN, READ, wall", "passthrough"]["upcalls"] == {"answers": 2}


def test_remaps_are_measured_in_one_step_and_one_by_one(results: Results) -> None:
    measures = results.measures("remap")
    for what in ("one step, other blobs", "one step, put beside", "a call each", "a connection each"):
        assert {side for name, side in measures if name == what} == {"passthrough", "native", "fuse"}
    assert results.upcalls("remap", "looking again", "passthrough")["LOOKUP"] == 100


def test_tracing_that_is_off_is_a_session_without_it(results: Results) -> None:
    measures = results.measures("tracing")
    for operation in ("missing", "stat, first", "stat, again", "open, first", "open, again"):
        bare, off, on = (measures[f"{operation}, functions", side]["median"] for side in ("bare", "off", "on"))
        assert bare == off < on
    for side in ("bare", "off"):
        assert results.upcalls("tracing", "stat, again, wall", side) == {}
        assert results.upcalls("tracing", "open, again, wall", side) == {"OPEN": 1, "RELEASE": 1}
    assert results.upcalls("tracing", "stat, again, wall", "on") == {"LOOKUP": 1}
    assert {"bare", "off", "on"} == {side for what, side in measures if what == "preprocess, wall"}


def test_the_seed_case_reads_nothing_through_the_daemon_with_passthrough(results: Results) -> None:
    for side, reads in (("passthrough", 0), ("passthrough, by reference", 0), ("native", 630), ("fuse", 630)):
        assert results.upcalls("seed", "first action", side)["READ"] == reads
    for side in ("kernel", "sandboxfs"):
        assert results.upcalls("seed", "first action", side) == {}


def test_an_action_is_measured_by_every_way_to_lay_out_its_inputs(results: Results) -> None:
    measures = results.measures("actions")
    labels = {what.partition(":")[0] for what, _ in measures}
    assert len(labels) == 3
    for label in labels:
        sides = {side for what, side in measures if what == f"{label}: whole"}
        ours = {"passthrough", "native", "kernel", "kernel, ordinary user"}
        assert sides - {"buildbox-fuse"} == {"hard links", "symbolic links", "copy", *ours}
        for side in ours:
            assert (f"{label}: set-up, nothing known", side) in measures
        for side in ("kernel", "kernel, ordinary user"):
            assert measures[f"{label}: first read", side]["upcalls"] == {}, "the kernel answers by itself"
        files = int(label.split()[0].replace(",", ""))
        assert measures[f"{label}: first read", "passthrough"]["upcalls"]["all"] > 500 and files > 500
        assert (f"{label}: yardstick", "74 bare entries and an overlay") in measures


def test_sandboxes_are_measured_by_part_and_leave_nothing_open(results: Results) -> None:
    measures = results.measures("sandboxes")
    for part in ("open", "run", "capture", "close", "overhead"):
        assert {side for what, side in measures if what == part} == {"kernel", "kernel, ordinary user"}
    assert {side for what, side in measures if what == "sandboxes"} == {"one thread", "two threads", "two processes"}
    for what in ("descriptors", "mounts"):
        assert measures[what, "last quarter"]["median"] == measures[what, "first quarter"]["median"]


def test_the_parts_of_casfs_run_are_its_whole_time(results: Results) -> None:
    measures = results.measures("run")
    parts = {side: measure["median"] for (what, side), measure in measures.items() if what == "by part"}
    assert {"interpreter", "imports", "open sandbox", "run sandbox", "the rest", "end"} <= parts.keys()
    assert all(milliseconds > 0 for milliseconds in parts.values())
    for what in ("warm", "cold"):
        assert {"bwrap", "casfs run"} == {side for name, side in measures if name == what}


def test_a_capture_is_measured_without_its_hashing(results: Results) -> None:
    measures = results.measures("capture")
    for what in ("hashing alone", "capture, less hashing", "disk taken by the capture"):
        assert {"4 MiB", "64 MiB"} == {side for name, side in measures if name == what}


def test_the_cold_tier_is_measured_beside_zstd(results: Results) -> None:
    sides = {side for _, side in results.measures("cold")}
    assert {"zstd -d, a process a file", "zstd -d, one process", "casfs prefetch", "open, one at a time"} <= sides


def test_clones_are_measured_beside_projection_where_they_can_be_made(results: Results) -> None:
    measures = results.measures("clones")
    links = {"reflink", "hardlink"}
    for place, refused in (("btrfs", set()), ("XFS", {"snapshot"}), ("two volumes", links)):
        sides = {side for what, side in measures if what == f"{place}: second action, set-up"}
        assert sides == {"kernel", "passthrough", "snapshot", "copy", *links} - refused
    notes = results.value["scenarios"]["clones"]["notes"]
    assert len([note for note in notes if "is refused" in note]) == len(links)


@pytest.mark.long
def test_bazel_rebuilds_out_of_the_server_and_out_of_what_is_nothing_but_its_transports(
    results: Results, requires: Requirements
) -> None:
    requires.programs("nginx")
    measures = results.measures("bazel")
    sides = ("gRPC", "gRPC, minimal", "bare grpcio", "HTTP", "nginx", "disk cache")
    assert all(measures["rebuild", side]["median"] > 0 for side in sides)
    assert measures["CPU of the server", "disk cache"]["median"] == 0


def test_remote_execution_is_measured_beside_bazels_own_sandbox_and_none(results: Results) -> None:
    measures = results.measures("execution")
    shapes = {what.partition(":")[0] for what, _ in measures}
    assert len(shapes) == 2
    for shape in shapes:
        sides = {side for what, side in measures if what == f"{shape}: wall"}
        assert sides == {"casfs", "linux-sandbox", "no sandbox"}
        assert {side for what, side in measures if what == f"{shape}: an action on the worker"} == {
            "fetch",
            "run",
            "upload",
        }
        assert measures[f"{shape}: upcalls of all actions", "casfs"]["median"] == 0


def test_memory_is_measured_over_a_run_of_many_actions(results: Results) -> None:
    memory = [measure["median"] for _, measure in sorted(results.measures("execution-memory").items())]
    assert len(memory) == 4 and all(20 < mebibytes < 200 for mebibytes in memory)


def test_local_sandboxes_are_measured_beside_symbolic_links_and_none(results: Results) -> None:
    measures = results.measures("sandboxfs")
    walls = [what for what, side in measures if what.endswith(": wall") and side == "casfs"]
    assert len(walls) == 2
    for what in walls:
        assert {side for name, side in measures if name == what} == {"casfs", "linux-sandbox", "no sandbox"}
    assert {side for what, side in measures if what.endswith("mappings, each")} == {
        "first",
        "second",
        "later",
        "1% changed",
    }


def test_a_server_starts_with_an_index_of_any_size(results: Results) -> None:
    measures = results.measures("server")
    assert measures["start of the server", "10,000 blobs"]["median"] > 0


def test_calls_are_measured_beside_a_server_that_does_nothing(results: Results, requires: Requirements) -> None:
    try:
        get_generator()
    except Refused as error:
        requires.lacking(str(error))
    calls = [what for what, side in results.measures("server") if side == "bare grpcio" and what.endswith("in flight")]
    assert len(calls) == 18
    assert all(results.measures("server")[what, "casfs"]["median"] > 0 for what in calls)


def test_downloads_are_measured_beside_nginx(results: Results, requires: Requirements) -> None:
    requires.programs("wrk", "nginx")
    measures = results.measures("http")
    what = [f"GET {size}, {number} in flight" for size in ("64 KiB", "1 MiB", "4 MiB") for number in (1, 32)]
    assert all(measures[name, side]["median"] > 0 for name in what for side in ("casfs", "nginx"))


def test_buildbox_fuse_lays_out_the_same_action(tmp_path: Path, requires: Requirements) -> None:
    """Needs the package index, as the benchmark does."""
    requires.admin()
    requires.fuse()
    requires.programs("g++")
    try:
        program = get_buildbox_fuse(tmp_path, install=True)
    except Refused as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [*COMMAND, "actions", "--scratch", str(tmp_path), "--json", str(tmp_path / "found.json")],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": f"{os.environ['PATH']}:{program.parent}"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["scenarios"]["actions"]
    # That it shows the same bytes as the host is checked by the scenario.
    assert len([m for m in found["measures"] if m["side"] == "buildbox-fuse" and m["what"].endswith("whole")]) == 3
    assert any("buildbox-fuse 1." in note for note in found["notes"])


def test_the_picture_shows_every_engine(results: Results) -> None:
    texts = [element.text for element in ElementTree.fromstring(results.drawing).iter() if element.text]
    for name in ("host, without casfs", "casfs, passthrough", "casfs, pyfuse3"):
        assert name in texts
    assert any("(READ 0)" in text for text in texts)


def test_a_run_that_compiled_nothing_makes_no_picture() -> None:
    assert as_svg(as_json({}, "command", {})) is None


def test_a_disk_without_a_journal_is_replaced_while_something_is_measured(
    tmp_path: Path, requires: Requirements, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires.loop_devices()
    requires.programs("mkfs.ext4")
    monkeypatch.setattr(volumes, "lacks_journal", lambda mount: True)
    with volumes.journaled(tmp_path, 64 << 20) as place:
        mounted = mount_of(place)
        assert (place.parent, mounted.path, mounted.kind) == (tmp_path, os.fsencode(place), "ext4")
        assert not lacks_journal(mounted) and describe(place)["store_file_system"] == "ext4, on a loop device"
        (place / "file").write_text("there")
    assert not find_mounts(os.fsencode(tmp_path)) and not list(tmp_path.glob("*.image"))
    monkeypatch.setattr(volumes, "lacks_journal", lambda mount: False)
    with volumes.journaled(tmp_path) as place:
        assert place == tmp_path


def test_sides_take_turns_forwards_and_backwards() -> None:
    assert list(alternate("ab", 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_medians_ratios_and_missed_aims_are_in_the_table() -> None:
    outcome = Outcome()
    for value in (3.0, 1.0, 2.0):
        outcome.add("work", "host", "ms", value)
        outcome.add("work", "mount", "ms", 2 * value, {"OPEN": 1000})
    outcome.aim("work", 4.0, 3.0, "ms", at_most=True)
    text = as_markdown({"cpu": "a"}, "command", {"scenario": ("About it.", outcome)})
    assert re.search(r"\| work +\| host +\| 2.00 ms \| 1.00 to 3.00 \| 3 ", text)
    assert re.search(r"\| mount \| 4.00 ms \| 2.00 to 6.00 \| 3 +\| 2.00 +\| OPEN 1,000 ", text)
    assert re.search(r"\| work \| ≤ 3.00 ms \| 4.00 ms \| \*\*missed\*\* \|", text)


def test_settings_shrink_a_quick_run_unless_told_otherwise(tmp_path: Path) -> None:
    assert Settings(tmp_path).rounds(5) == 5
    assert Settings(tmp_path, quick=True).rounds(5) == 1
    assert Settings(tmp_path, quick=True, repeat=3).rounds(5) == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["nothing"], "there is no scenario 'nothing': choose from compile, files,"),
        (["compile", "--write"], "--write takes all scenarios"),
        (["--repeat", "0"], "--repeat takes a number from 1 on"),
        (["seed", "--bazel"], "--bazel goes with the scenario fleet"),
        (["fleet", "--clients", "0"], "must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_at_once(options: list[str], complaint: str) -> None:
    done = subprocess.run([*COMMAND, *options], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_scenario_that_fails_is_named_and_writes_nothing(tmp_path: Path) -> None:
    """Without programs nothing can be copied."""
    done = subprocess.run(
        [*COMMAND, "ingest", "--scratch", str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "failed: ingest" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_profile_names_the_functions_of_the_loop(tmp_path: Path, requires: Requirements) -> None:
    requires.fuse()
    done = subprocess.run(
        [*COMMAND, "--profile", "--scratch", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    profiles = done.stdout.strip().split("\n\n")
    assert [profile.partition(":")[0] for profile in profiles] == [
        "LOOKUP, missing",
        "LOOKUP",
        "GETATTR",
        "OPEN, READ",
        "OPEN to RELEASE",
    ]
    for profile in profiles:
        assert "posix.write" in profile and "session._" in profile
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_something_is_mounted_leaves_nothing(tmp_path: Path, requires: Requirements) -> None:
    requires.fuse()
    process = subprocess.Popen(
        [*COMMAND, "files", "--scratch", str(tmp_path)],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not find_mounts(os.fsencode(tmp_path)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        # It may be in the middle of a sync, which waits for whatever else this machine writes.
        _, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    assert not find_mounts(os.fsencode(tmp_path))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_workers_measure_ends_them_all(tmp_path: Path, requires: Requirements) -> None:
    """They are in sessions of their own, and their mounts in namespaces of their own."""
    requires.admin()
    requires.programs("g++")
    process = subprocess.Popen(
        [*COMMAND, "actions", "--scratch", str(tmp_path)],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/actions/shape-0/root-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        assert find_processes(os.fsencode(tmp_path))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    assert not find_processes(os.fsencode(tmp_path))
    assert not list(tmp_path.iterdir())
