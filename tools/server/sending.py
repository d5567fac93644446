"""From a file to a connection by sendfile(2), in the event loop.

`loop.sendfile` asks the selector four times for each call and stops reading
meanwhile: 1,390 calls of sendfile came with 5,550 of epoll_ctl. Here the kernel is
tried first, and only a connection that takes no more for now is registered,
once for all that follows: under a descriptor of its own, as the loop guards
those of its transports.

Nothing here waits for a disk: the caller sees to it that what is sent is in the
page cache. Used in the loop's thread.
"""

from __future__ import annotations

import asyncio
import os

from store.errors import MissingBlob


class Sending:
    """A file on its way to one connection, whose transport has nothing left to write. Close it."""

    def __init__(self, connection: int, descriptor: int) -> None:
        """`connection`: the descriptor of a socket that doesn't block; neither is taken over."""
        self._loop = asyncio.get_running_loop()
        self._connection = os.dup(connection)
        self._descriptor = descriptor
        self._registered = False
        self._offset = self._end = 0
        self._done: asyncio.Future[None] | None = None

    def begin(self, offset: int, end: int) -> asyncio.Future[None] | None:
        """Send a part of the file; what to wait for, or None where the kernel has taken all of it.

        Raises OSError of the connection, MissingBlob where the file ends early.
        """
        self._offset, self._end = offset, end
        self._send()
        if self._offset == end:
            return None
        self._done = self._loop.create_future()
        if not self._registered:
            self._loop.add_writer(self._connection, self._on_writable)
            self._registered = True
        return self._done

    def _send(self) -> None:
        try:
            sent = os.sendfile(self._connection, self._descriptor, self._offset, self._end - self._offset)
        except BlockingIOError:
            return
        if not sent:
            raise MissingBlob("the blob's file ended early: something has cut it short")
        self._offset += sent

    def _on_writable(self) -> None:
        """One call a turn of the loop, however fast the client is: others want to be served."""
        done = self._done
        if done is None or done.done():
            # The caller isn't back yet, or has given up.
            self._unregister()
            return
        try:
            self._send()
        except (OSError, MissingBlob) as error:
            done.set_exception(error)
        else:
            if self._offset == self._end:
                done.set_result(None)

    def _unregister(self) -> None:
        if self._registered:
            self._loop.remove_writer(self._connection)
            self._registered = False

    def close(self) -> None:
        """Let go of the connection; harmless when repeated."""
        self._unregister()
        if self._connection >= 0:
            os.close(self._connection)
            self._connection = -1
