"""What is waited for in threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tools.server.waiting import Waiting


def test_a_thread_is_waited_for_however_often_who_waits_is_cancelled() -> None:
    async def main() -> None:
        waiting, go_on, dropped = Waiting(60.0, threads=1), threading.Event(), list[bool]()
        task = asyncio.create_task(waiting.in_thread(go_on.wait, 20, dropped=dropped.append))
        for _ in range(3):
            await asyncio.sleep(0.001)
            task.cancel()
        await asyncio.sleep(0.001)
        assert not task.done(), "what the thread works on would be closed under it"
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert dropped == [True]
        waiting.close()

    asyncio.run(main())
