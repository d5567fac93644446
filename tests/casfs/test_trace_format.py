"""Trace files as values: what is written is read again, damage is found, half a line at the end is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs.errors import BadTrace
from casfs.trace_format import (
    Event,
    Header,
    Kind,
    decode_trace,
    encode_end,
    encode_event,
    encode_header,
    encode_process,
)
from casfs.trace_summary import Use, group_untouched, summarise
from store.digest import DigestFunction

ROOT = DigestFunction.BLAKE3.of(b"root")
HEADER = Header(ROOT, "native", [b"out"])
NAMES = st.binary(min_size=1, max_size=20).filter(
    lambda name: not set(name) & set(b"\0/") and name not in (b".", b"..")
)
PATHS = st.lists(NAMES, max_size=4).map(b"/".join)
EVENTS = st.lists(st.builds(Event, st.sampled_from(Kind), st.integers(0, 1 << 22), st.text(max_size=15), PATHS))


def lines_of(header: Header, events: list[Event]) -> list[bytes]:
    lines = [encode_header(header)]
    for event in events:
        lines.append(encode_process(event.process, event.command))
        lines.append(encode_event(event.kind, event.process, event.path))
    return [*lines, encode_end()]


@given(EVENTS, st.lists(PATHS.filter(bool), max_size=3))
def test_what_is_written_is_read_again(events: list[Event], outputs: list[bytes]) -> None:
    """Names of any bytes, commands of any text; each line is ASCII and stands alone."""
    header = Header(ROOT, "passthrough", outputs)
    lines = lines_of(header, events)
    assert all(line.isascii() and line.count(b"\n") == 1 for line in lines)
    trace = decode_trace(lines)
    assert (trace.header, trace.events, trace.ended, trace.cut) == (header, events, True, False)


@given(EVENTS, st.data())
def test_a_trace_cut_anywhere_is_the_beginning_of_the_whole(events: list[Event], data: st.DataObject) -> None:
    """A writer that is killed, a disk that is full: what is there is read, and that it was cut is known."""
    whole = b"".join(lines_of(HEADER, events))
    end = data.draw(st.integers(len(encode_header(HEADER)), len(whole)))
    trace = decode_trace(whole[:end].splitlines(keepends=True))
    assert trace.events == events[: len(trace.events)]
    assert trace.ended == (end == len(whole))
    assert trace.cut == (not whole[:end].endswith(b"\n"))


@pytest.mark.parametrize(
    "line",
    [
        b"not JSON\n",
        b"[]\n",
        b"{}\n",
        b"7\n",
        b"null\n",
        b"[7]\n",
        b'["look"]\n',
        b'["look", 1, "../up"]\n',
        b'["open", 1, "/absolute"]\n',
        b'["open", 1, "a//b"]\n',
        b'["open", 1, 7]\n',
        b'["open", "one", "a"]\n',
        b'["open", [], "a"]\n',
        b'["open", 1, "\\ud800"]\n',
        b"[" * 100_000 + b"\n",
        b"\0" * 100 + b"\n",
        b"\xff\xfe\n",
        b"\n",
    ],
)
def test_damage_in_the_middle_is_named(line: bytes) -> None:
    with pytest.raises(BadTrace, match=r"line 2 of the trace is damaged"):
        decode_trace([encode_header(HEADER), line, encode_end()])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "no trace"),
        (b"\n", "no trace"),
        (b"#include <a.h>\n", "no trace"),
        (encode_header(HEADER)[:-10], "first line"),
        (b'{"casfs-trace": 1}\n', "first line"),
        (b'{"casfs-trace": 1, "root": "sha256:00/1", "engine": "x", "outputs": []}\n', "first line"),
        (b'{"casfs-trace": 1, "root": 7, "engine": "x", "outputs": []}\n', "first line"),
        (b'{"casfs-trace": 2, "new": "things"}\n', "version 2"),
    ],
)
def test_what_does_not_begin_as_a_trace_is_refused(line: bytes, says: str) -> None:
    with pytest.raises(BadTrace, match=says):
        decode_trace([line, encode_end()])


def test_lines_of_unknown_kinds_are_passed_over() -> None:
    """What a later casfs writes beside the rest doesn't make a trace unreadable."""
    event = Event(Kind.OPEN, 1, "", b"a")
    lines = [encode_header(HEADER), b'["later", {}]\n', encode_event(*event[:2], event.path)]
    assert decode_trace(lines).events == [event]


def test_the_most_that_was_done_to_an_input_counts() -> None:
    events = [
        Event(Kind.LIST, 1, "ls", b"d"),
        Event(Kind.LOOK, 1, "ls", b"d/looked"),
        Event(Kind.LOOK, 2, "sh", b"link"),
        Event(Kind.LINK, 2, "sh", b"link"),
        Event(Kind.EXEC, 2, "sh", b"tool"),
        Event(Kind.LOOK, 2, "tool", b"tool"),
        Event(Kind.OPEN, 2, "tool", b"d/opened"),
        Event(Kind.MISS, 2, "tool", b"gone"),
        Event(Kind.MISS, 3, "other", b"gone"),
        Event(Kind.MISS, 3, "other", b"out"),
        Event(Kind.MISS, 3, "other", b"out/deep"),
        Event(Kind.MISS, 3, "other", b"outer"),
    ]
    declared = [b"d/listed", b"d/looked", b"d/opened", b"link", b"tool", b"u/1", b"u/v/2", b"w"]
    trace = decode_trace(lines_of(HEADER, events))
    summary = summarise(trace, declared)
    assert summary.of(Use.OPENED) == [b"link", b"tool", b"d/opened"], "in order of the first use"
    assert summary.of(Use.LOOKED) == [b"d/looked"]
    assert summary.of(Use.LISTED) == [b"d/listed"]
    assert summary.of(Use.UNTOUCHED) == [b"u/1", b"u/v/2", b"w"]
    assert [(event.path, event.process) for event in summary.missed] == [(b"gone", 2), (b"outer", 3)]
    assert [(p.process, p.commands, p.opened, p.looked, p.missed) for p in summary.processes] == [
        (1, ["ls"], 0, 1, 0),
        (2, ["sh", "tool"], 3, 0, 1),
        (3, ["other"], 0, 0, 4),
    ]
    assert group_untouched(summary.inputs) == {b"u/": 2, b"w": 1}


@given(st.dictionaries(PATHS.filter(bool), st.sampled_from(Use)))
def test_groups_hold_each_untouched_input_once_and_no_other(inputs: dict[bytes, Use]) -> None:
    groups = group_untouched(inputs)
    untouched = [path for path, use in inputs.items() if use is Use.UNTOUCHED]
    assert groups.total() == len(untouched)
    for path, use in inputs.items():
        holders = [g for g in groups if path == g or (g.endswith(b"/") and path.startswith(g))]
        if use is Use.UNTOUCHED:
            assert holders
        else:
            assert not [g for g in holders if g.endswith(b"/")]
