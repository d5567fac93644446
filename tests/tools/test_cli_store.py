"""The verbs about the store: add, manifest, ls, cat, verify, gc, stats."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from blake3 import blake3

from tests.tools.conftest import Casfs
from tools.exits import Exit

A = b"#define A 1\n"


def test_add_prints_the_digest_of_each_thing_named(casfs: Casfs, tree: Path) -> None:
    out = casfs.ok("add", tree / "same.h", tree / "link", tree).out.splitlines()
    digest = f"blake3:{blake3(A).hexdigest()}/12"
    assert out[:2] == [f"{digest}  {tree}/same.h", f"{digest}  {tree}/link"]
    assert re.fullmatch(rf"blake3:[0-9a-f]{{64}}/\d+  {re.escape(str(tree))}", out[2])


def test_add_reads_standard_input(casfs: Casfs) -> None:
    found = casfs.ok("add", "--stdin", "--function", "sha256", "--json", stdin="bytes").json
    digest = f"sha256:{hashlib.sha256(b'bytes').hexdigest()}/5"
    assert found == [{"path": "-", "kind": "stream", "digest": digest, "size": 5}]


def test_add_by_hard_link_makes_the_file_the_blob(casfs: Casfs, tree: Path) -> None:
    [added] = casfs.ok("add", tree / "run.sh", "--hardlink", "--json").json
    hexadecimal = added["digest"].partition(":")[2].partition("/")[0]
    blob = casfs.store / "blobs/blake3/cas" / hexadecimal[:2] / hexadecimal
    assert blob.samefile(tree / "run.sh")
    assert blob.stat().st_mode & 0o777 == 0o555


def test_a_directory_added_is_a_root_that_can_be_named(casfs: Casfs, tree: Path) -> None:
    root = casfs.ok("add", tree).out.split()[0]
    casfs.ok("manifest", "create", "named", "--root", root)
    casfs.ok("manifest", "create", "scanned", tree)
    assert casfs.ok("manifest", "diff", "named", "scanned").out == ""
    assert casfs.ok("manifest", "diff", root, "scanned", "--json").json == []


def test_create_says_what_was_made(casfs: Casfs, tree: Path) -> None:
    made = casfs.ok("manifest", "create", "m", tree, "--json").json
    assert set(made) == {"name", "root", "files", "bytes", "nodes", "references", "missing", "created", "source"}
    assert (made["name"], made["files"], made["missing"]) == ("m", 6, 0)
    assert made["source"] == f"directory {tree}"
    assert casfs.ok("manifest", "show", "m", "--json").json == made
    assert casfs.ok("manifest", "list", "--json").json == [made]
    assert casfs.ok("manifest", "list", "--names").out == "m\n"
    assert made["root"] in casfs.ok("manifest", "show", "m").out


def test_a_name_that_is_taken_is_kept_unless_replaced(casfs: Casfs, tree: Path) -> None:
    first = casfs.ok("manifest", "create", "m", tree, "--json").json["root"]
    (tree / "new").write_text("new")
    refused = casfs("manifest", "create", "m", tree)
    assert refused.code == Exit.USAGE
    assert "--replace" in refused.err
    assert casfs.ok("manifest", "show", "m", "--json").json["root"] == first
    assert casfs.ok("manifest", "create", "m", tree, "--replace", "--json").json["root"] != first


def test_exclude_leaves_out_names_and_paths(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree, "--exclude", "*.sh", "--exclude", "include/deep")
    names = casfs.ok("ls", "-R", "-0", "m").out.split("\0")
    assert "include/a.h" in names
    assert "run.sh" not in names
    assert not [name for name in names if name.startswith("include/deep")]


def test_grafts_show_several_directories_in_one_tree(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", "--graft", f"usr/x={tree}/include", "--graft", f"opt={tree}/include/deep")
    assert casfs.ok("ls", "-R", "m").out.split() == [
        *("opt/", "opt/b.h", "usr/", "usr/x/", "usr/x/a.h", "usr/x/deep/", "usr/x/deep/b.h")
    ]


def test_mtime_keep_records_the_files_times(casfs: Casfs, tree: Path) -> None:
    os.utime(tree / "same.h", ns=(5, 1_234_567_890_123_456_789))
    casfs.ok("manifest", "create", "kept", tree, "--mtime", "keep")
    casfs.ok("manifest", "create", "fixed", tree)
    times = {
        name: {entry["path"]: entry["mtime_ns"] for entry in casfs.ok("ls", name, "--json").json}
        for name in ("kept", "fixed")
    }
    assert times["kept"]["same.h"] == 1_234_567_890_123_456_789
    assert times["fixed"]["same.h"] == 946_684_800_000_000_000


@pytest.mark.parametrize("program", ["sha256sum", "b3sum"])
def test_a_checklist_becomes_a_manifest(casfs: Casfs, tree: Path, program: str) -> None:
    try:
        listed = subprocess.run(
            [program, "include/a.h", "./run.sh"], cwd=tree, capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip(f"needs the program {program}")
    function = {"sha256sum": "sha256", "b3sum": "blake3"}[program]
    options = ("--checklist", "-", "--function", function)
    missing = casfs("manifest", "create", "m", *options, stdin=listed)
    assert missing.code == Exit.NOT_FOUND
    assert "--base" in missing.err
    casfs.ok("manifest", "create", "m", *options, "--base", tree, stdin=listed)
    casfs.ok("manifest", "create", "again", *options, stdin=listed)
    assert casfs.ok("ls", "-R", "m").out.split() == ["include/", "include/a.h", "run.sh"]
    assert casfs.ok("cat", "again/include/a.h").out == "#define A 1\n"


def test_export_and_import_are_inverse(casfs: Casfs, tree: Path) -> None:
    made = casfs.ok("manifest", "create", "m", tree, "--mtime", "keep", "--json").json
    text = casfs.ok("manifest", "export", "m").out
    assert text.startswith("casfs manifest 1 blake3\n")
    assert "d\tempty\n" in text
    assert "\t50%25 of%0Aß.txt\n" in text
    casfs.ok("manifest", "export", "m", "m.txt")
    assert (casfs.directory / "m.txt").read_text() == text
    casfs.ok("manifest", "import", "from-file", "m.txt")
    again = casfs.ok("manifest", "import", "from-stdin", "-", "--json", stdin=text).json
    assert again["root"] == made["root"]
    casfs.ok("manifest", "diff", "from-file", "m")


def test_importing_warns_of_blobs_that_are_not_there(casfs: Casfs) -> None:
    text = f"casfs manifest 1 blake3\nf\t{'ab' * 32}/7\t-\tgone\n"
    done = casfs.ok("manifest", "import", "m", "-", stdin=text)
    assert "1 blob of m not in the store" in done.err
    assert casfs.ok("manifest", "show", "m", "--json").json["missing"] == 1
    read = casfs("cat", "m/gone")
    assert read.code == Exit.NOT_FOUND
    assert "ab" * 32 in read.err


def test_diff_names_each_difference_and_exits_like_diff(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "old", tree)
    (tree / "same.h").write_text("changed")
    (tree / "run.sh").unlink()
    (tree / "empty" / "full").write_text("")
    casfs.ok("manifest", "create", "new", tree)
    done = casfs("manifest", "diff", "old", "new")
    assert done.code == Exit.NO
    assert [line.split()[:2] for line in done.out.splitlines()] == [
        ["A", "empty/full"],
        ["D", "run.sh"],
        ["M", "same.h"],
    ]
    found = casfs("manifest", "diff", "old", "new", "--json")
    assert found.code == Exit.NO
    assert [(item["change"], item["path"]) for item in found.json] == [
        ("added", "empty/full"),
        ("removed", "run.sh"),
        ("changed", "same.h"),
    ]


def test_remove_removes_all_or_none(casfs: Casfs, tree: Path) -> None:
    for name in ("a", "b"):
        casfs.ok("manifest", "create", name, tree)
    assert casfs("manifest", "remove", "a", "nosuch").code == Exit.NOT_FOUND
    assert casfs.ok("manifest", "list", "--names").out.split() == ["a", "b"]
    casfs.ok("manifest", "remove", "a", "b")
    assert casfs.ok("manifest", "list").out == ""


def test_ls_lists_a_directory_a_file_and_all_below(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree)
    assert "50%25 of%0Aß.txt" in casfs.ok("ls", "m").out.splitlines()
    assert "50% of\nß.txt" in casfs.ok("ls", "-0", "m").out.split("\0")
    assert casfs.ok("ls", "m/include").out == "a.h\ndeep/\n"
    assert casfs.ok("ls", "-R", "m/include").out == "a.h\ndeep/\ndeep/b.h\n"
    assert casfs.ok("ls", "m/include/a.h").out == "include/a.h\n"
    assert casfs.ok("ls", "-l", "m/link").out.endswith("link -> include/a.h\n")
    entries = {entry["path"]: entry for entry in casfs.ok("ls", "m", "--json").json}
    assert entries["run.sh"]["executable"] is True
    assert entries["link"] == {
        "path": "link",
        "kind": "symlink",
        "target": "include/a.h",
        "mtime_ns": 946_684_800_000_000_000,
    }
    assert entries["include"]["kind"] == "directory"
    root = casfs.ok("manifest", "show", "m", "--json").json["root"]
    assert casfs.ok("ls", f"{root}/include").out == "a.h\ndeep/\n"
    assert casfs.ok("ls", entries["include"]["digest"]).out == "a.h\ndeep/\n"


def test_cat_writes_files_and_follows_links_within_the_tree(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree)
    assert casfs.ok("cat", "m/include/deep/b.h", "m/link").out == "#define B 2\n#define A 1\n"
    assert casfs("cat", "m/outside").code == Exit.USAGE
    assert casfs("cat", "m/include").code == Exit.USAGE
    assert casfs("cat", "m/same.h", "m/nosuch").out == ""


def test_cat_never_writes_stale_bytes_of_a_file_by_reference(casfs: Casfs, tree: Path) -> None:
    made = casfs.ok("manifest", "create", "m", tree, "--reference", "--json").json
    assert made["references"] == 6
    assert casfs.ok("cat", "m/same.h").out == "#define A 1\n"
    (tree / "same.h").write_text("#define A 2\n")
    stale = casfs("cat", "m/same.h")
    assert (stale.code, stale.out) == (Exit.NO, "")
    assert "same.h" in stale.err


def test_verify_finds_damage_and_repairs_the_index(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree)
    clean = casfs.ok("verify", "--json").json
    assert clean["clean"] is True
    assert set(clean) == {"clean", "blobs", "bytes", "cold", "adopted", "quarantined", "lost", "incomplete", "broken"}
    hexadecimal = blake3(b"#define B 2\n").hexdigest()
    blob = casfs.store / "blobs/blake3/cas" / hexadecimal[:2] / hexadecimal
    blob.chmod(0o644)
    blob.write_bytes(b"#define B 3\n")
    found = casfs("verify")
    assert found.code == Exit.NO
    assert f"wrong: blake3:{hexadecimal}/12" in found.out
    assert "manifest m lacks 1 blob" in found.out
    casfs.ok("add", tree / "include/deep/b.h")
    assert casfs.ok("verify", "--rebuild", "--json").json["clean"] is True
    assert casfs.ok("cat", "m/include/deep/b.h").out == "#define B 2\n"


def test_gc_removes_what_nothing_needs_down_to_the_low_mark(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree)
    (casfs.directory / "big").write_bytes(bytes(100_000))
    casfs.ok("add", "big")
    time.sleep(1.1)  # use is remembered in whole seconds; what was used in this one stays
    options = ("gc", "--high", "50kB", "--low", "10k", "--grace", "0", "--json")
    wanted = casfs.ok(*options, "--dry-run").json
    assert (wanted["removed_blobs"], wanted["removed_bytes"], wanted["dry_run"]) == (1, 100_000, True)
    done = casfs.ok(*options).json
    assert done == {**wanted, "dry_run": False}
    assert set(done) == {
        *(
            "blobs_before",
            "bytes_before",
            "removed_blobs",
            "removed_bytes",
            "pinned_bytes",
            "bytes_after",
            "cold",
            "dry_run",
        )
    }
    assert casfs.ok("cat", "m/same.h").out == "#define A 1\n"


def test_gc_says_when_it_can_not_reach_the_mark(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree)
    done = casfs("gc", "--high", "0", "--grace", "0")
    assert done.code == Exit.NO
    assert "manifests and mounts hold" in done.err


def test_gc_has_to_be_told_a_size(casfs: Casfs) -> None:
    done = casfs("gc")
    assert done.code == Exit.USAGE
    assert "--high" in done.err


def test_stats_of_a_store(casfs: Casfs, tree: Path) -> None:
    casfs.ok("manifest", "create", "m", tree)
    casfs.ok("add", tree / "same.h", "--function", "sha256")
    found = casfs.ok("stats", "--json").json
    assert found["store"] == str(casfs.store)
    assert found["functions"]["sha256"] == {"blobs": 1, "bytes": 12}
    assert found["blobs"] == found["functions"]["blake3"]["blobs"] + 1
    assert found["manifests"] == 1
    assert (found["leases"], found["adding_sessions"], found["quarantined"]) == ([], 0, 0)
    assert "manifests  1" in casfs.ok("stats").out


def test_doctor_reports_each_capability(casfs: Casfs) -> None:
    done = casfs("doctor", "--json")
    assert done.code in (Exit.OK, Exit.NO)
    for finding in json.loads(done.out):
        assert set(finding) == {"name", "ok", "how", "detail", "remedy"}
    assert "reflink" in casfs("doctor").out
    assert not casfs.store.exists(), "examining makes no store"
