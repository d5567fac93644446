"""Connections that stop having much under way aren't paid back for it at the cost of those that never had."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tools.server.turns import Turns


class _Worker:
    """Has work for ever, `cost` seconds of it a turn."""

    def __init__(self, world: _World, cost: float, light: bool) -> None:
        self.used = -1.0
        self.queued = False
        self.is_light = light
        self.turns = 0
        self._world = world
        self._cost = cost

    def work(self, seconds: float) -> bool:
        self.turns += 1
        self._world.now += self._cost
        return True


class _World:
    def __init__(self) -> None:
        self.now = 0.0
        self.soon: deque[Callable[[], None]] = deque()
        self.turns = Turns(lambda: self.now, self.soon.append)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.soon.popleft()()


def test_who_had_much_to_do_and_now_has_little_takes_turns_with_those_that_always_had_little() -> None:
    world = _World()
    heavy = [_Worker(world, 0.001, light=False) for _ in range(100)]
    light = [_Worker(world, 0.001, light=True) for _ in range(5)]
    for worker in (*heavy, *light):
        world.turns.add(worker)
    world.run(10.0)
    # All of the heavy ones together had a quarter of the time, so each of them has used far less.
    changer = heavy[0]
    changer.is_light = True
    world.run(1.0)
    before = [worker.turns for worker in light]
    taken = changer.turns
    world.run(1.0)
    gained = [worker.turns - turns for worker, turns in zip(light, before, strict=True)]
    assert min(gained) >= 0.8 * (changer.turns - taken)
