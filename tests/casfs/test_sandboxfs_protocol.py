"""The sandboxfs protocol: what Bazel may send, in pieces of any size, and what nobody should."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs.errors import BadStream
from casfs.sandboxfs_protocol import Create, Destroy, Parser, Refused, Request, encode_answer, map_path


def parse(*pieces: bytes) -> list[Request | Refused]:
    parser = Parser()
    found = [request for piece in pieces for request in parser.feed(piece)]
    parser.finish()
    return found


def request(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def create(name: str = "0", **parts: Any) -> bytes:
    return request({"C": {"i": name, **parts}})


EXAMPLE = (
    b'{"C":{"i":"0","m":[{"x":1,"p":"ws","y":2,"u":"scratch","w":true},{"x":3,"p":"a.c","y":4,"u":"b.c"}],'
    b'"q":{"1":"/","2":"/out/12","3":"/ws/src","4":"/home/x"}}}'
)


def test_a_request_of_bazels_is_read() -> None:
    mappings = [map_path(b"ws", b"/out/12/scratch", True), map_path(b"ws/src/a.c", b"/home/x/b.c", False)]
    assert parse(EXAMPLE + b'{"D":"0"}') == [Create("0", mappings), Destroy("0")]


def test_prefixes_are_remembered_and_can_be_changed() -> None:
    first = create(m=[], q={"1": "/a"})
    second = create("1", m=[{"x": 1, "p": "f", "u": "/h", "w": False}])
    third = create("2", m=[{"x": 1, "p": "f", "u": "/h"}], q={"1": "/b"})
    found = parse(first, second, third)
    assert [r.mappings for r in found if isinstance(r, Create)] == [
        [],
        [map_path(b"a/f", b"/h", False)],
        [map_path(b"b/f", b"/h", False)],
    ]


NAMES = st.text(st.sampled_from('ab},{]["\\:/\u00e9\u20ac=\n'), min_size=1, max_size=5)
MAPPINGS = st.lists(
    st.fixed_dictionaries(
        {"p": NAMES, "u": NAMES},
        optional={"x": st.integers(0, 2), "y": st.integers(0, 2), "w": st.one_of(st.booleans(), st.integers(0, 1))},
    ),
    max_size=4,
)


@given(
    st.lists(
        st.tuples(MAPPINGS, st.dictionaries(st.sampled_from("12"), NAMES.map("/".__add__), max_size=2), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_what_came_before_is_read_as_if_it_were_new(
    requests: list[tuple[list[dict[str, Any]], dict[str, str], bool]], together: bool
) -> None:
    """As Bazel writes them, mappings are looked up by their text; with white space between, each is parsed."""
    values = [{"C": {"i": str(number % 2), "m": m, "q": q}} for number, (m, q, _) in enumerate(requests * 2)]
    plain = [json.dumps(value).encode() for value in values]
    quick = [
        json.dumps(value, separators=(",", ":"), ensure_ascii=escaped).encode("utf-8")
        for value, (*_, escaped) in zip(values, requests * 2, strict=True)
    ]
    found = parse(b"".join(quick)) if together else parse(*quick)
    assert list(map(repr, found)) == list(map(repr, parse(*plain)))


@pytest.mark.parametrize(
    ("path", "read"), [("/", b""), ("", b""), ("/a//b/", b"a/b"), ("./a/.", b"a"), ("a/b", b"a/b")]
)
def test_paths_are_made_plain(path: str, read: bytes) -> None:
    assert parse(create(m=[{"p": path, "u": "/h/"}])) == [Create("0", [map_path(read, b"/h", False)])]


# Without those that could be names that were encoded twice.
_LATIN = "".join(map(chr, range(0x80, 0x100)))
names = st.text(st.characters(exclude_characters="/\0" + _LATIN, exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(
    st.lists(st.tuples(st.lists(names, min_size=1, max_size=3), names, st.booleans()), max_size=5),
    st.lists(st.integers(1, 40), max_size=30),
    st.booleans(),
)
def test_pieces_of_any_size_give_the_same(
    mapped: list[tuple[list[str], str, bool]], cuts: list[int], ascii_only: bool
) -> None:
    value = {"C": {"i": "0", "m": [{"p": "/".join(p), "u": f"/{u}", "w": w} for p, u, w in mapped]}}
    stream = (json.dumps(value, ensure_ascii=ascii_only) + ' {"D":"0"}\n').encode()
    pieces = []
    rest = stream
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    wanted = [map_path("/".join(p).encode(), f"/{u}".encode(), w) for p, u, w in mapped]
    assert parse(*pieces, rest) == [Create("0", wanted), Destroy("0")]


def test_a_whole_request_is_met_before_the_next_one_is() -> None:
    parser = Parser()
    assert list(parser.feed(b'{"D":"a"}{"D":"b')) == [Destroy("a")]
    assert list(parser.feed(b'"}')) == [Destroy("b")]


def test_what_looks_like_an_end_inside_of_a_name_is_none() -> None:
    name = '}{"D":"1"}{ \\" }'
    stream = create(m=[{"p": name, "u": "/h"}])
    wanted = [Create("0", [map_path(name.encode(), b"/h", False)])]
    assert parse(stream) == wanted
    for at in range(len(stream)):
        assert parse(stream[:at], stream[at:]) == wanted


def test_names_that_are_not_utf_8_come_as_bytes_or_as_escapes() -> None:
    raw = b'{"C":{"i":"0","m":[{"p":"\xff\xc3","u":"/\xe2\x82"}]}}'
    wanted = [Create("0", [map_path(b"\xff\xc3", b"/\xe2\x82", False)])]
    assert parse(raw) == wanted
    assert parse(*(raw[at : at + 1] for at in range(len(raw)))) == wanted
    assert parse(create(m=[{"p": "\udcff\udcc3", "u": "/\udce2\udc82"}])) == wanted


@pytest.mark.parametrize("name", ["grüße", "日本", "Ã¼"])
def test_bazels_names_are_encoded_twice(name: str) -> None:
    as_bazel_has_it = name.encode().decode("latin-1")
    assert parse(create(m=[{"p": as_bazel_has_it, "u": f"/{as_bazel_has_it}"}])) == [
        Create("0", [map_path(name.encode(), b"/" + name.encode(), False)])
    ]
    assert parse(create(m=[{"p": "grüße", "u": "/日本"}])) == [
        Create("0", [map_path("grüße".encode(), "/日本".encode(), False)])
    ]


@pytest.mark.parametrize(
    ("sent", "said", "name"),
    [
        (request({}), "one key", None),
        (request({"E": "0"}), '"E"', None),
        (request({"D": 7}), "7", None),
        (request({"D": "a/b"}), '"a/b"', "a/b"),
        (request({"D": ".."}), '".."', ".."),
        (request({"C": []}), "an object", None),
        (request({"C": {"i": None}}), "null", None),
        (create(m=3), "a list", "0"),
        (create(m=[3]), "mapping 3", "0"),
        (create(m=[{"u": "/h"}]), "no 'p'", "0"),
        (create(m=[{"p": "a", "u": "/h", "x": 9}]), "prefix 9", "0"),
        (create(m=[{"p": "a", "u": "/h", "x": []}]), "mapping", "0"),
        (create(m=[{"p": "a", "u": "/h", "w": 1}]), "true nor false", "0"),
        (create(m=[{"p": "../a", "u": "/h"}]), "'..'", "0"),
        (create(m=[{"p": "..", "u": "/h"}]), "'..'", "0"),
        (create(m=[{"p": "a\0", "u": "/h"}]), "zero byte", "0"),
        (create(m=[{"p": "\ud800", "u": "/h"}]), "no bytes", "0"),
        (create(q={"x": "/a"}), '"x"', "0"),
        (create(q={"1": "a"}), '"a"', "0"),
        (create(q=[1]), "an object", "0"),
    ],
)
def test_what_is_no_request_is_refused_by_name_and_the_next_is_met(sent: bytes, said: str, name: str | None) -> None:
    refused, then = parse(sent + b'{"D":"0"}')
    assert isinstance(refused, Refused)
    assert said in str(refused)
    assert refused.id == name
    assert then == Destroy("0")


@pytest.mark.parametrize(
    "sent", [b"[1]", b"7", b'"x"', b'{"D":]}', b'{"D":"0",}', b'{"D" "0"}', b"}", b'{"a":' * 100_000 + b"}"]
)
def test_what_is_no_json_object_ends_the_stream(sent: bytes) -> None:
    with pytest.raises(BadStream):
        list(Parser().feed(sent))


@pytest.mark.parametrize("length", range(1, len(EXAMPLE)))
def test_half_a_request_waits_and_at_the_end_is_an_error(length: int) -> None:
    parser = Parser()
    assert list(parser.feed(EXAMPLE[:length])) == []
    with pytest.raises(BadStream, match="middle of a request"):
        parser.finish()


def test_an_answer_has_two_keys() -> None:
    assert encode_answer("0", None) == b'{"id":"0","error":null}\n'
    assert json.loads(encode_answer(None, "ß\n\udcff")) == {"id": None, "error": "ß\n\udcff"}
