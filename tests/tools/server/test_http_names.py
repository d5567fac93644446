"""What HTTP requests say: paths, ranges, encodings; previews and markup. No I/O."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.digest import Digest, DigestFunction
from store.errors import StoreError
from tools.server.errors import OutOfRange, ServeError
from tools.server.http_names import (
    CacheName,
    Kind,
    accepts_zstd,
    is_host,
    matches,
    page_path,
    parse_cache_path,
    parse_page_path,
    parse_range,
)
from tools.server.http_status import find_http_status
from tools.server.markup import join, tag
from tools.server.preview import dump, preview

HASH = "ab" * 32


@pytest.mark.parametrize(
    ("path", "instance", "kind"),
    [
        (f"/cas/{HASH}", "", Kind.CAS),
        (f"/ac/{HASH}", "", Kind.AC),
        (f"/main/cas/{HASH}", "main", Kind.CAS),
        (f"/a/b/ac/{HASH}", "a/b", Kind.AC),
        (f"/cas/cas/{HASH}", "cas", Kind.CAS),
        (f"/a%20b/cas/{HASH}", "a b", Kind.CAS),
    ],
)
def test_a_path_names_an_instance_and_a_hash(path: str, instance: str, kind: Kind) -> None:
    assert parse_cache_path(path) == CacheName(instance, kind, bytes.fromhex(HASH))


@pytest.mark.parametrize("path", ["", "/", "/cas", "/metrics", "/favicon.ico", f"/tree/sha256/{HASH}/12", f"/{HASH}"])
def test_what_is_no_name_in_the_cache(path: str) -> None:
    assert parse_cache_path(path) is None


@pytest.mark.parametrize("end", ["", "ab", HASH.upper(), HASH + "0", HASH[:-1] + "g", "%41" * 64])
def test_what_is_no_hash_is_refused(end: str) -> None:
    with pytest.raises(StoreError):
        parse_cache_path(f"/cas/{end}")


@given(st.text(max_size=300))
def test_any_path_is_a_name_or_none_or_refused(path: str) -> None:
    for parse in (parse_cache_path, parse_page_path):
        try:
            found = parse(path)
        except StoreError:
            continue
        assert found is None or path.rpartition("/")[0]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=40))
def test_an_instance_survives_its_quoting(instance: str) -> None:
    name = parse_cache_path(f"/{quote(instance, safe='')}/ac/{HASH}")
    assert name == CacheName(instance, Kind.AC, bytes.fromhex(HASH))


@given(st.sampled_from(DigestFunction), st.binary(min_size=32, max_size=32), st.integers(0, (1 << 63) - 1))
def test_a_page_has_a_path(function: DigestFunction, hash_: bytes, size: int) -> None:
    digest = Digest(function, hash_, size)
    assert parse_page_path(page_path("tree", digest)) == ("tree", digest)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("bytes=0-9", (0, 10)),
        ("bytes=90-", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes=50-1000", (50, 100)),
        # Not for us to read: all of it is sent.
        ("bytes=9-0", None),
        ("bytes=0-1,4-5", None),
        ("lines=1-2", None),
        ("bytes=-", None),
        ("bytes=\uff11-\uff12", None),
        ("bytes=" + "9" * 5000 + "-", None),
    ],
)
def test_ranges(text: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_range(text, 100) == expected


@pytest.mark.parametrize("text", ["bytes=100-", "bytes=5000-6000", "bytes=-0"])
def test_a_range_past_the_end_is_refused(text: str) -> None:
    with pytest.raises(OutOfRange) as caught:
        parse_range(text, 100)
    assert caught.value.size == 100
    assert find_http_status(caught.value) == 416


@given(st.text(max_size=60) | st.from_regex(r"bytes=\d*-\d*"), st.integers(0, 1 << 40))
def test_a_range_lies_within_what_there_is(text: str, size: int) -> None:
    try:
        found = parse_range(text, size)
    except ServeError:
        return
    assert found is None or 0 <= found[0] < found[1] <= size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, False),
        ("", False),
        ("gzip", False),
        ("gzip, zstd", True),
        ("ZSTD", True),
        ("zstd;q=0.5", True),
        ("zstd;q=0", False),
        ("zstd; q=0.000", False),
        ("xzstd", False),
    ],
)
def test_whether_zstd_is_accepted(text: str | None, expected: bool) -> None:
    assert accepts_zstd(text) is expected


@given(st.text(max_size=100))
def test_any_header_is_an_answer(text: str) -> None:
    assert accepts_zstd(text) in (True, False)
    assert matches(text, '"x"') in (True, False)


def test_conditions() -> None:
    assert matches('"a", W/"b"', '"b"')
    assert matches("*", '"b"')
    assert not matches('"a"', '"b"')
    assert not matches(None, '"b"')


@given(st.text(), st.text())
def test_what_is_no_markup_is_escaped(text: str, value: str) -> None:
    made = tag("p", text, title=value)
    assert made.count("<") == made.count(">") == 2
    assert made.count('"') == 2


def test_markup_is_not_escaped_twice() -> None:
    assert join(tag("b", "a & b"), None, ["<", 1]) == "<b>a &amp; b</b>&lt;1"


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_have_a_preview(data: bytes, whole: bool) -> None:
    kind, text = preview(data, whole=whole)
    assert (kind == "text") is (text.encode() == data or (kind == "text" and data.startswith(text.encode())))
    assert kind == "text" or text == dump(data)


def test_a_character_that_is_cut_is_no_reason_for_a_dump() -> None:
    assert preview("naïve €".encode()[:-1], whole=False) == ("text", "naïve ")
    assert preview("naïve €".encode()[:-1], whole=True)[0] == "bytes"
    assert preview(b"\0text", whole=True)[0] == "bytes"
    assert dump(b"0123456789abcdef\xff") == (
        "00000000  30 31 32 33 34 35 36 37 38 39 61 62 63 64 65 66  0123456789abcdef\n" + f"00000010  {'ff':<47}  ."
    )


NAMES = ("cache.example", "cache")


@pytest.mark.parametrize(
    "host",
    [
        None,
        "127.0.0.1:8080",
        "127.0.0.1",
        "192.0.2.1:1",
        "[::1]:8080",
        "[::1]",
        "localhost",
        "LocalHost:80",
        "localhost.:8080",
        "cache.example",
        "CACHE.example:443",
        "cache.example.",
        "cache:",
    ],
)
def test_addresses_localhost_and_its_own_names_mean_a_server(host: str | None) -> None:
    assert is_host(host, NAMES)


@pytest.mark.parametrize(
    "host",
    [
        "",
        ":8080",
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[",
        "[::1",
        "127.0.0.1@evil.example",
        "evil.cache.example",
        "cache.example.evil",
        "localhost:8080:1",
        "[evil.example]",
        "::1",
        "127.1",
        "1",
        "localhost, evil.example",
        "cache.example..",
        "\uff11.1.1.1",
    ],
)
def test_other_names_do_not(host: str) -> None:
    assert not is_host(host, NAMES)


@given(st.text(max_size=50))
def test_any_host_is_one_or_not(host: str) -> None:
    assert is_host(host, ()) in (True, False)
