"""The cold tier: compressed copies of blobs that were not used for long.

A file ``STORE/cold/<function>/ab/<hash>.zst`` is one zstd frame with the
content's size in its header and a checksum at its end, so that `zstd -d` reads
it without casfs. Its mode says whether the blob was a program's, its mtime
when the blob was last used. `store.demotion` fills the tier, `store.hydration`
empties it.

A blob may be hot and cold at once, after a crash or when it was added again:
the hot one counts, the cold one is removed by the next collection. A cold file
is removed for being superfluous only under the publication lock, having seen
the hot blob with its row: two processes can't each remove what the other
counts on.

Threads may share a `ColdTier`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from store import kernel
from store.blobs import Blobs, unpack_row
from store.digest import Digest, DigestFunction
from store.errors import CorruptBlob
from store.hashing import CHUNK, hasher_for
from store.index import Index, Table
from store.layout import Layout, hash_of_name
from store.sources import Supply

SUFFIX = ".zst"
_HEADER = 18
"""No zstd frame's header is longer."""
_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class ColdFile(NamedTuple):
    """A file of the tier: whose blob it is (`size` there is 0: only the header knows), what it takes, when used."""

    digest: Digest
    size: int
    used: int


def cold_path(digest: Digest) -> str:
    """Where a blob's cold file lies, relative to ``STORE/cold``."""
    return f"{digest.function.label}/{digest.hex[:2]}/{digest.hex}{SUFFIX}"


class ColdTier:
    """The compressed blobs of one store; also a source."""

    label = "the cold tier"

    def __init__(self, layout: Layout, index: Index, blobs: Blobs) -> None:
        self._layout = layout
        self._index = index
        self._blobs = blobs

    def path(self, digest: Digest) -> Path:
        """Where its cold file lies, or would."""
        return self._layout.cold / cold_path(digest)

    def open(self, digest: Digest) -> Supply | None:
        """The blob, decompressed as it is read. Raises OSError, or CorruptBlob for what is no frame."""
        return open_cold(self._layout.cold, digest)

    def has(self, digest: Digest) -> bool:
        """Whether a cold file says it is that blob; nothing is said of its bytes."""
        try:
            supply = self.open(digest)
        except (OSError, CorruptBlob):
            return False
        if supply is not None:
            supply.stream.close()
        return supply is not None

    def accepted(self, digests: Sequence[Digest]) -> None:
        """They are in ``blobs/`` again: their cold files can go."""
        self.remove_superfluous(digests)

    def rejected(self, digest: Digest) -> None:
        """Its cold file is probably damaged."""
        self.quarantine_unless_right(digest)

    def remove_superfluous(self, digests: Sequence[Digest]) -> int:
        """Remove the cold files of blobs that are hot; says how many."""
        removed = 0
        with self._blobs.removing():
            for digest in digests:
                if self._is_hot(digest):
                    with suppress(FileNotFoundError):
                        self.path(digest).unlink()
                        removed += 1
        return removed

    def _is_hot(self, digest: Digest) -> bool:
        """Whether the index vouches for the blob and its file is there; the digest's size isn't looked at."""
        with self._index.view() as view:
            value = view.get(Table.BLOBS, digest.key)
        return value is not None and self._blobs.size_on_disk(digest.function, digest.hash) == unpack_row(value).size

    def publish(self, partials: Sequence[tuple[Digest, str]]) -> None:
        """Give complete, durable files their names, durably. The publication lock is held by the caller."""
        touched: set[Path] = set()
        for digest, partial in partials:
            target = self.path(digest)
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                touched.update(target.parents[1:4])  # down from the store: the names of new directories must last
            os.rename(partial, target)
            touched.add(target.parent)
        for directory in touched:
            kernel.fsync_path(directory)

    def quarantine_unless_right(self, digest: Digest) -> bool:
        """Hash the content of a cold file; take it out of the tier if it is wrong (nothing is deleted) and say so.

        Under the publication lock: a right one can't take its place meanwhile.
        """
        name = f"{digest.function.label}-{digest.hex}{SUFFIX}-{time.time_ns()}"
        with self._blobs.removing(), suppress(FileNotFoundError):
            if not self.is_right(digest):
                os.rename(self.path(digest), self._layout.quarantine / name)
                return True
        return False

    def is_right(self, digest: Digest) -> bool:
        """Whether a cold file's content has the digest's hash; its size isn't looked at. Raises OSError."""
        try:
            size = find_content_size(self.path(digest), digest)
            supply = self.open(digest._replace(size=size))
            if supply is None:
                return False
            hasher, read = hasher_for(digest.function, size), 0
            with closing(supply.stream) as stream:
                while chunk := stream.read(CHUNK):
                    hasher.update(chunk)
                    read += len(chunk)
        except CorruptBlob:
            return False
        return read == size and hasher.digest() == digest.hash

    def files(self) -> Iterator[ColdFile]:
        """Every cold file; what has no blob's name is passed over."""
        for function in DigestFunction:
            base = self._layout.cold / function.label
            for shard in _names(base):
                for name in _names(base / shard):
                    hash_ = hash_of_name(shard, name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None
                    if hash_ is None:
                        continue
                    with suppress(OSError):
                        status = os.stat(base / shard / name, follow_symlinks=False)
                        yield ColdFile(Digest(function, hash_, 0), status.st_size, int(status.st_mtime))

    def count(self) -> tuple[int, int]:
        """How many cold files there are, and the bytes they take."""
        sizes = [file.size for file in self.files()]
        return len(sizes), sum(sizes)


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def open_cold(directory: Path, digest: Digest) -> Supply | None:
    """The blob of a ``cold/`` directory, or None where it has none of that hash and size.

    Raises OSError, or CorruptBlob where the file is no zstd frame with a size.
    """
    try:
        descriptor = os.open(directory / cold_path(digest), _READING)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptBlob(f"the cold copy of {digest} is not a file")
        if _size_of_content(descriptor, digest) != digest.size:
            os.close(descriptor)
            return None
        return Supply(_Decompressed(descriptor, digest), bool(status.st_mode & 0o100))
    except CorruptBlob:
        os.close(descriptor)
        raise


def find_content_size(path: Path, digest: Digest) -> int:
    """The size that a cold file says its content has. Raises OSError or CorruptBlob."""
    descriptor = os.open(path, _READING)
    try:
        return _size_of_content(descriptor, digest)
    finally:
        os.close(descriptor)


def _size_of_content(descriptor: int, digest: Digest) -> int:
    import zstandard

    try:
        frame = zstandard.get_frame_parameters(os.pread(descriptor, _HEADER, 0))
    except zstandard.ZstdError as error:
        raise CorruptBlob(f"the cold copy of {digest} is no zstd frame: {error}") from error
    if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise CorruptBlob(f"the cold copy of {digest} doesn't say its size")
    return frame.content_size


class _Decompressed:
    """A zstd file as the stream of its content. Takes the descriptor over."""

    def __init__(self, descriptor: int, digest: Digest) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._digest = digest
        self._file = open(descriptor, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._reader = zstandard.ZstdDecompressor().stream_reader(self._file)

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes. Raises CorruptBlob for what zstd can't read; a cut file just ends early."""
        try:
            return self._reader.read(size)
        except self._error as error:
            raise CorruptBlob(f"the cold copy of {self._digest} is damaged: {error}") from error

    def close(self) -> None:
        self._file.close()
