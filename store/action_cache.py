"""The action cache on disk: what an action's result was, as the bytes of an ActionResult message.

    STORE/blobs/ac/ab/<hash>           results of actions named by a SHA-256
    STORE/blobs/blake3/ac/ab/<hash>    by a BLAKE3

as Bazel's disk cache has it, so that Bazel, casfs and a server share results.
Nothing here knows what is in the bytes. A file's time says when the result was
last used. Results have no rows in the index: they are found by name, they are
never verified by their own hash, and losing one costs a miss.

**Instances.** The instance without a name has the files Bazel would make. A
result of any other lies under a hash of its name and the action's hash
(`action_key`): in the same directories, so that Bazel's collection and ours
count it, but never to be taken for another instance's.

Writing: ``tmp/`` → fsync → rename, so that a name never has half a result. The
name itself isn't made durable: what a crash of the machine can lose is a hit.

Threads may share an `ActionCache`.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple

from store.digest import Digest, DigestFunction
from store.layout import Layout, hash_of_name
from store.sessions import Session, translated
from store.writer import discard, write_all

_PREFIX = {DigestFunction.SHA256: "ac", DigestFunction.BLAKE3: "blake3/ac"}
_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FIRST_READ = 64 << 10
MODE = 0o644
"""As Bazel makes them; a result may be replaced, unlike a blob."""


class ResultFile(NamedTuple):
    """A result as collections see it: its key, its bytes, and when it was last used (seconds since the epoch)."""

    key: bytes
    size: int
    used: int


def action_key(action: Digest, instance: str = "") -> bytes:
    """Under what an instance has the result of an action: the function's number, then 32 bytes."""
    if not instance:
        return action.key
    hasher = action.function.new()
    # No instance's name has a NUL in it, so no two pairs run together.
    hasher.update(instance.encode() + b"\0" + action.hash)
    return bytes((action.function,)) + hasher.digest()


def _path(key: bytes) -> str:
    hexadecimal = key[1:].hex()
    return f"{_PREFIX[DigestFunction(key[0])]}/{hexadecimal[:2]}/{hexadecimal}"


class ActionCache:
    """The results of one store."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._blobs = os.open(layout.blobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        # Under `_lock`:
        self._session: Session | None = None
        self._serial = 0
        self.written_bytes = 0
        """How many bytes more there are than when it was opened, as far as this process knows."""

    def open(self, key: bytes) -> int | None:
        """A descriptor of a result, or None where there is none; the caller closes it."""
        try:
            return os.open(_path(key), _READING, dir_fd=self._blobs)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return None
            raise

    def read(self, key: bytes) -> bytes | None:
        """The bytes of a result, or None where there is none."""
        descriptor = self.open(key)
        if descriptor is None:
            return None
        try:
            parts = [os.read(descriptor, _FIRST_READ)]
            while len(parts[-1]) == _FIRST_READ:
                parts.append(os.read(descriptor, _FIRST_READ))
        finally:
            os.close(descriptor)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, key: bytes, value: bytes) -> None:
        """Store a result, in place of one that was there. Raises NoSpace or StoreUnusable."""
        writer = self.begin(key)
        try:
            writer.write(value)
            writer.finish()
        except BaseException:
            writer.discard()
            raise

    def begin(self, key: bytes) -> ResultWriter:
        """Begin a result whose bytes come piece by piece. Raises NoSpace or StoreUnusable."""
        return ResultWriter(self, self._layout, self._new_path(), _path(key))

    # For ResultWriter.

    def note_written(self, size: int) -> None:
        """There are so many bytes more."""
        with self._lock:
            self.written_bytes += size

    def publish(self, partial: str, path: str) -> None:
        """Give a durable file its name."""
        try:
            os.rename(partial, path, dst_dir_fd=self._blobs)
        except FileNotFoundError:
            (self._layout.blobs / path).parent.mkdir(parents=True, exist_ok=True)
            os.rename(partial, path, dst_dir_fd=self._blobs)

    def _new_path(self) -> str:
        with self._lock:
            if self._session is None:
                # It names nothing but what it brings, so collections needn't mind it.
                self._session = Session(self._layout, spares=False)
            self._serial += 1
            return f"{self._session.directory}/{self._serial}"

    def touch(self, key: bytes, when: float) -> bool:
        """Note that a result was in use then (seconds since the epoch); False where there is none.

        Not later than the blobs it names were touched: so a collection takes the result first.
        """
        try:
            os.utime(_path(key), (when, when), dir_fd=self._blobs)
        except FileNotFoundError:
            return False
        return True

    def used(self, key: bytes) -> int:
        """When the result was last used, in seconds since the epoch. Raises FileNotFoundError."""
        return int(os.stat(_path(key), dir_fd=self._blobs).st_mtime)

    def remove(self, key: bytes) -> bool:
        """Remove a result; False where there was none."""
        try:
            os.unlink(_path(key), dir_fd=self._blobs)
        except FileNotFoundError:
            return False
        return True

    def files(self) -> Iterator[ResultFile]:
        """Every result; what has no hash for its name is passed over."""
        for function, prefix in _PREFIX.items():
            base = self._layout.blobs / prefix
            for shard in _names(base):
                for name in _names(base / shard):
                    hash_ = hash_of_name(shard, name)
                    if hash_ is None:
                        continue
                    with suppress(OSError):
                        status = os.stat(base / shard / name, follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            yield ResultFile(bytes((function,)) + hash_, status.st_size, int(status.st_mtime))

    def close(self) -> None:
        """Let go of the directories; harmless when repeated."""
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._blobs >= 0:
            os.close(self._blobs)
            self._blobs = -1


class ResultWriter:
    """Takes a result's bytes until `finish` or `discard`. One thread at a time."""

    def __init__(self, actions: ActionCache, layout: Layout, partial: str, path: str) -> None:
        self.size = 0
        """Bytes taken so far."""
        self._actions = actions
        self._layout = layout
        self._partial = partial
        self._path = path
        with self._translated():
            self._file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes. Raises NoSpace or StoreUnusable; then discard it."""
        with self._translated():
            write_all(self._file, data)
        self.size += len(data)

    def finish(self) -> None:
        """That was all: from now on it is the result."""
        with self._translated():
            os.fdatasync(self._file)
            self._close()
            self._actions.publish(self._partial, self._path)
        self._actions.note_written(self.size)

    def discard(self) -> None:
        """Forget what was taken; harmless when repeated, and after `finish`."""
        self._close()
        discard(self._partial)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _translated(self) -> AbstractContextManager[None]:
        return translated(self._layout, "writing an action result")


def _names(directory: os.PathLike[str]) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
