"""Digests: their text, their key, and the hashing of memory and files."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from store.digest import Digest, DigestFunction, parse_hash
from store.errors import BadDigest
from store.hashing import CHUNK, hash_descriptor

FUNCTIONS = st.sampled_from(DigestFunction)
DIGESTS = st.builds(Digest, FUNCTIONS, st.binary(min_size=32, max_size=32), st.integers(0, (1 << 63) - 1))


@given(DIGESTS)
def test_text_and_key_say_the_same_digest(digest: Digest) -> None:
    assert Digest.parse(str(digest)) == digest
    assert Digest.from_key(digest.key, digest.size) == digest


@pytest.mark.parametrize("size", [0, 1, 1024, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 7])
def test_files_and_memory_have_the_digest_the_libraries_say(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    expected = {DigestFunction.SHA256: hashlib.sha256(data).digest(), DigestFunction.BLAKE3: blake3(data).digest()}
    (tmp_path / "file").write_bytes(data)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        os.lseek(descriptor, size // 2, os.SEEK_SET)
        for function, hash_ in expected.items():
            assert function.of(data) == hash_descriptor(descriptor, function) == Digest(function, hash_, size)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("function", DigestFunction)
def test_only_no_bytes_make_the_empty_blob(function: DigestFunction) -> None:
    empty = function.of(b"")
    assert empty.is_empty_blob
    assert not function.of(b"x").is_empty_blob
    assert not empty._replace(hash=bytes(32)).is_empty_blob
    assert not empty._replace(size=1).is_empty_blob


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a digest"),
        ("00" * 32, "is not a digest"),
        ("md5:" + "0" * 32 + "/1", "unknown digest function"),
        ("blake3:" + "00" * 32, "has no size"),
        ("blake3:" + "00" * 32 + "/", "has no size"),
        ("blake3:" + "00" * 32 + "/-1", "has no size"),
        ("blake3:" + "00" * 32 + "/٣", "has no size"),
        (f"blake3:{'00' * 32}/{1 << 63}", "over 63 bits"),
        ("blake3:" + "00" * 31 + "/1", "64 hexadecimal digits"),
        ("blake3:" + "AB" * 32 + "/1", "in lower case"),
        ("blake3:" + "0x" * 32 + "/1", "64 hexadecimal digits"),
    ],
)
def test_malformed_digests_are_refused_with_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(BadDigest, match=why):
        Digest.parse(text)


def test_a_hash_is_sixty_four_lower_case_digits() -> None:
    assert parse_hash("0f" * 32) == b"\x0f" * 32


@pytest.mark.parametrize("function", DigestFunction)
def test_a_child_can_hash_a_large_file_after_its_parent_did(tmp_path: Path, function: DigestFunction) -> None:
    (tmp_path / "file").write_bytes(bytes(10 << 20))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        hash_descriptor(descriptor, function)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # what it would wait for never comes
            hash_descriptor(descriptor, function)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        os.close(descriptor)
