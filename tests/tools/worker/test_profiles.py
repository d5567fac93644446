"""Profiles of what actions open: learning as values; their files; and a worker that fetches ahead by them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.digest import DigestFunction
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import running
from tests.tools.worker.conftest import Files, executing, remote_of
from tests.tools.worker.test_hydration import Pair, pair
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.worker.profiles import PATHS_MOST, PROFILES_MOST, TRUSTED, Kind, Profiles, decode, encode, kind_of, learn
from tools.worker.task import Offer, Task, read_task

PATH = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=8)
NAMES = PATH.filter(lambda name: name not in (".", ".."))
PROFILE = st.dictionaries(NAMES, st.integers(0, TRUSTED))


def task_of(*arguments: str, outputs: tuple[str, ...] = (), **platform: str) -> Task:
    command = reapi.Command(arguments=arguments, output_paths=outputs)
    action = reapi.Action()
    action.input_root_digest.hash = "0" * 64
    for name, value in platform.items():
        action.platform.properties.add(name=name, value=value)
    offer = Offer(properties={"image": frozenset({"a", "b"})})
    return read_task(action, command, DigestFunction.SHA256, offer)


def test_actions_that_differ_in_what_they_make_are_of_one_kind() -> None:
    one = kind_of(task_of("cc", "-MF", "o/a.d", "-c", "src/a.c", "-o", "o/a.o", outputs=("o/a.o", "o/a.d")))
    other = kind_of(task_of("cc", "-MF", "o/b.d", "-c", "src/b.c", "-o", "o/b.o", outputs=("o/b.o", "o/b.d")))
    assert one.key == other.key
    assert other.special(one.general(b"src/a.c")) == b"src/b.c"
    assert one.general(b"include/algorithm.h") == "include/algorithm.h", "a name is taken out as a word only"
    assert other.special(one.general(b"include/\xff.h")) == b"include/\xff.h"


@pytest.mark.parametrize(
    "other",
    [
        task_of("cc", "-O2", "-c", "a.c", outputs=("a.o",)),
        task_of("cc", "-c", "other.c", outputs=("a.o",)),
        task_of("clang", "-c", "a.c", outputs=("a.o",)),
        task_of("cc", "-c", "a.c", outputs=("a.o",), image="b"),
        task_of("cc", "-c", "a.c", outputs=("a.o",)),
    ],
)
def test_other_commands_and_platforms_are_other_kinds(other: Task) -> None:
    assert kind_of(other).key != kind_of(task_of("cc", "-c", "a.c", outputs=("a.o",), image="a")).key


@given(PROFILE)
def test_a_profile_is_read_as_it_was_written(profile: dict[str, int]) -> None:
    assert decode(encode(profile)) == profile


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{}", b"[]", b"null", b"\0" * 50, b"[" * 100_000),
        b'{"version": 1, "paths": [1]}',
        b'{"version": 1, "paths": {"a": "x"}}',
        b'{"version": 1, "paths": {"../a": 1}}',
        b'{"version": 1, "paths": {"/a": 1}}',
    ],
)
def test_damage_is_found(text: bytes) -> None:
    with pytest.raises(ValueError):
        decode(text)


@given(PROFILE, st.sets(NAMES), st.data())
def test_what_is_opened_stays_and_what_is_not_leaves_at_its_turn(
    profile: dict[str, int], opened: set[str], data: st.DataObject
) -> None:
    due = sorted(path for path, times in profile.items() if times >= TRUSTED)
    fresh = sorted(path for path, times in profile.items() if times < TRUSTED)
    left = data.draw(st.sets(st.sampled_from(due))) if due else set()
    ahead = data.draw(st.sets(st.sampled_from(fresh))) if fresh else set()
    learnt = learn(profile, opened, ahead, left)
    assert set(learnt) == (set(profile) - left) | opened
    for path, times in learnt.items():
        if path in opened:
            assert times == 0 if path in profile else 0 <= times < TRUSTED
        else:
            assert times == profile[path] + (path in ahead)


def test_an_input_that_nobody_opens_any_more_is_fetched_ahead_so_many_times_at_most() -> None:
    profile = dict(learn({}, ["gone"], [], []))
    fetched = 0
    for _ in range(100):
        ahead = {path for path, times in profile.items() if times < TRUSTED}
        fetched += len(ahead)
        profile = dict(learn(profile, [], ahead, profile.keys() - ahead))
    assert profile == {} and 0 < fetched <= TRUSTED


def test_of_what_is_needed_one_in_so_many_comes_late() -> None:
    names = [f"h{number}.h" for number in range(1000)]
    profile = dict(learn({}, names, [], []))
    late = []
    for _ in range(TRUSTED + 1):
        ahead = {path for path, times in profile.items() if times < TRUSTED}
        left = profile.keys() - ahead
        late.append(len(left))
        profile = dict(learn(profile, left, ahead, left))
    assert len(profile) == 1000 and sum(late) == pytest.approx(1000, abs=150)
    assert max(late) < 200, "their turns don't come together"


def test_a_profile_is_bounded_and_keeps_what_was_seen_last() -> None:
    old = {f"old{number}": TRUSTED - 1 for number in range(PATHS_MOST)}
    learnt = learn({**old, "again": 3}, ["again"], [], [])
    assert len(learnt) == PATHS_MOST and learnt["again"] == 0


def test_the_files_are_replaced_bounded_and_damage_is_ignored(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path / "profiles")
    kind = Kind("ab" * 32, "")
    assert profiles.find(kind) == {}
    profiles.keep(kind, {"a": 1})
    assert Profiles(tmp_path / "profiles").find(kind) == {"a": 1}
    [file] = (tmp_path / "profiles").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert profiles.find(kind) == {}
    profiles.keep(kind, {"b": 2})
    assert profiles.find(kind) == {"b": 2}
    os.utime(file, (1, 1))
    for number in range(PROFILES_MOST):
        path = tmp_path / "profiles" / f"{number:064x}.json"
        path.write_bytes(encode({}))
    profiles.keep(Kind("cd" * 32, ""), {"c": 0})
    assert len(list((tmp_path / "profiles").iterdir())) == PROFILES_MOST
    assert not file.exists(), "the oldest went"


# A worker whose inputs are with an upstream.


def files(version: str) -> Files:
    """Thirty headers whose contents are new in each version, and two sources."""
    headers = {f"include/h{number}.h": f"{version} {number}\n".encode() for number in range(30)}
    return {**headers, "src/one.c": f"one {version}\n".encode(), "src/two.c": f"two {version}\n".encode()}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, requires: Requirements) -> Iterator[Pair]:
    requires.programs("bwrap")
    requires.fuse()
    with pair(Casfs(tmp_path_factory.mktemp("profiled")), "--prefetch", "profile", "--jobs", "1") as both:
        yield both


class Compiler:
    """Compiles, as a kind of its own: reads a list of headers, those, and a source."""

    def __init__(self, both: Pair, kind: str) -> None:
        self._both = both
        self._kind = kind
        self._before = set(self._profiles())

    def _profiles(self) -> list[Path]:
        return list((self._both.log.parent / "store" / "profiles").glob("*"))

    def __call__(self, name: str, version: str, headers: str = "h1 h2 h3", then: str = "") -> tuple[object, object]:
        """Blobs that were fetched ahead, and those that were when they were opened."""
        # The list is a blob that no other test has.
        script = f"for h in $(cat list); do cat include/$h.h; done; cat src/{name}.c; touch {name}.o; . ./then"
        tree = {
            **files(f"{self._kind} {version}"),
            "list": f"{headers}{' ' * len(self._kind)}".encode(),
            "then": then.encode(),
        }
        self._both.near.execute(
            self._both.far.put(["sh", "-euc", script, self._kind], tree, output_paths=[f"{name}.o"])
        )
        line = self._both.lines()[-1]
        assert bool(line["exit_code"]) == bool(then)
        return line.get("prefetched_blobs", 0), line["fetched_blobs"]

    @property
    def profile(self) -> Path | None:
        """Its file."""
        found = [path for path in self._profiles() if path not in self._before]
        return found[0] if found else None


def test_the_next_action_of_a_kind_finds_its_inputs_there(profiled: Pair) -> None:
    """Counts are exact: three headers, a source, the list."""
    compile_ = Compiler(profiled, "next")
    assert compile_("one", "v1") == (0, 5)
    assert compile_("one", "v2") == (4, 0), "new contents of the same paths; the list is here"
    assert compile_("two", "v3") == (4, 0), "the other source stands where this one stood"
    assert compile_("two", "v4", headers="h1 h2 h3 h4") == (5, 1), "what is new comes when it is opened"
    assert compile_("one", "v5", headers="h4") == (6, 0), "what this one doesn't need is known all the same"


def test_an_action_that_fails_teaches_nothing(profiled: Pair) -> None:
    compile_ = Compiler(profiled, "fails")
    assert compile_("one", "v1", then="exit 3") == (0, 6)
    assert compile_.profile is None
    assert compile_("one", "v2") == (0, 4)


def test_a_damaged_profile_is_replaced_and_turns_come(profiled: Pair) -> None:
    compile_ = Compiler(profiled, "damaged")
    compile_("one", "v1")
    file = compile_.profile
    assert file is not None
    file.write_bytes(b'{"version": 1, "pa')
    assert compile_("one", "v2") == (0, 4)
    paths = json.loads(file.read_bytes())["paths"]
    assert set(paths) == {f"include/h{number}.h" for number in (1, 2, 3)} | {"src/\0.c"}
    # It is the turn of two; one of them is opened, one isn't.
    file.write_bytes(encode({**dict.fromkeys(paths, 0), "include/h1.h": TRUSTED, "include/h7.h": TRUSTED}))
    assert compile_("one", "v3") == (3, 1)
    learnt = {"include/h1.h": 0, "include/h2.h": 1, "include/h3.h": 1, "src/\0.c": 1}
    assert json.loads(file.read_bytes())["paths"] == learnt


@pytest.mark.long
def test_profiles_survive_a_restart(casfs: Casfs, requires: Requirements) -> None:
    requires.programs("bwrap")
    requires.fuse()
    with pair(casfs, "--prefetch", "profile") as both:
        assert Compiler(both, "restart")("one", "v1") == (0, 5)
    options = ("--config", str(casfs.directory / "here" / "config.toml"), "--prefetch", "profile")
    with running(Casfs(casfs.directory / "above")) as upstream, remote_of(upstream) as far:
        above = ("--upstream", f"grpc://{upstream.address}", "--action-log", both.log)
        with executing(Casfs(casfs.directory / "here"), *options, *above) as server, remote_of(server) as near:
            assert Compiler(Pair(far, near, upstream, both.log), "restart")("two", "v2") == (4, 0)
