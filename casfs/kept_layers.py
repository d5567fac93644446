"""Which layers a process keeps, and which it has seen subtrees of: books, no I/O but closing what is dropped.

What is kept is the most recently used within a budget of memory. A layer in
use, by a layout or by another one that is a difference to it, is never dropped.

Threads may share one; of those that want a layer that isn't there one builds
it, and the others wait.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice

from casfs.layer_blobs import Needed
from casfs.planning import ENOUGH, Sight, Subtree

_BASES_MOST = 4
"""So many kept layers at a path are looked at for what is nearly the same; 0.5 µs an entry that differs."""
_SEEN_MOST = 1 << 16


@dataclass(eq=False, slots=True)
class Layer:
    """A layer: `mounted` is the overlay, `metadata` what it is over, an `image` or not; `memory` is in bytes."""

    subtree: Subtree
    metadata: int
    memory: int
    sample: list[Needed]
    image: bool = False
    counted: int = -1
    """The count of removals from the store (`store.blobs.removals`) at which all its blobs were last seen to."""
    mounted: int = -1
    whole: bool = True
    users: int = 0
    """Under the lock of who keeps it, as `subtree` is."""
    noted: float = 0.0
    below: Layer | None = None
    """Of a difference: what it is one to."""
    whiteouts: int = -1
    """And what takes away what is gone; -1 where nothing is."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while it is looked over."""
    superseded: list[int] = field(default_factory=list)
    """What `mounted` was before; another thread may be stacking it just now."""

    def stacked(self) -> list[int]:
        """Descriptors of what is stacked for it, the uppermost first."""
        if self.below is None:
            return [self.mounted]
        return [*([self.whiteouts] if self.whiteouts >= 0 else []), self.mounted, self.below.mounted]

    @property
    def can_be_base(self) -> bool:
        """Whether others may be differences to it."""
        return self.below is None and self.subtree.nodes >= ENOUGH

    def close(self) -> None:
        """Let go of it; what is mounted of it lives on."""
        for descriptor in (self.mounted, self.metadata, self.whiteouts, *self.superseded):
            if descriptor >= 0:
                os.close(descriptor)


class KeptLayers:
    """The layers that are kept, and the subtrees that were seen."""

    def __init__(self, budget: int) -> None:
        """`budget`: bytes of memory."""
        self._budget = budget
        self._lock = threading.Lock()
        # Under the lock:
        self._kept: OrderedDict[tuple[bytes, bytes], Layer] = OrderedDict()
        self._building: dict[tuple[bytes, bytes], threading.Lock] = {}
        self._seen: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self._paths: OrderedDict[bytes, None] = OrderedDict()
        self._built = 0

    def sight(self, subtree: Subtree) -> Sight:
        """What is known of a subtree; never `Sight.ALIKE`."""
        with self._lock:
            if subtree.key in self._kept:
                return Sight.LAYER
            if subtree.key in self._seen:
                return Sight.SEEN
            return Sight.CHANGED if subtree.path in self._paths else Sight.NEW

    def note(self, subtrees: Iterable[Subtree]) -> None:
        """These were seen."""
        with self._lock:
            for subtree in subtrees:
                self._see(subtree)
            for remembered in (self._seen, self._paths):
                while len(remembered) > _SEEN_MOST:
                    remembered.popitem(last=False)

    def _see(self, subtree: Subtree) -> None:
        self._seen[subtree.key] = None
        self._paths[subtree.path] = None

    def has_bases(self) -> bool:
        """Whether there is anything that a subtree could be a difference to."""
        with self._lock:
            return any(layer.can_be_base for layer in self._kept.values())

    def bases(self, subtree: Subtree, parts: ExitStack) -> list[Layer]:
        """Layers at the same path that it may be a difference to, the latest first, in use until `parts` are closed."""
        with self._lock:
            found = (
                layer
                for layer in reversed(self._kept.values())
                if layer.subtree.path == subtree.path
                and layer.can_be_base
                and layer.subtree.digest.function is subtree.digest.function
            )
            bases = list(islice(found, _BASES_MOST))
            for base in bases:
                base.users += 1
                parts.callback(self.leave, base)
        return bases

    def take(self, subtree: Subtree, build: Callable[[], Layer]) -> Layer:
        """The layer of a subtree, built if need be, in use until somebody leaves it."""
        with self._lock:
            layer = self._use(subtree)
            if layer is not None:
                return layer
            turn = self._building.setdefault(subtree.key, threading.Lock())
        with turn:
            with self._lock:
                layer = self._use(subtree)
            if layer is None:
                layer = build()
                self._keep(layer)
        with self._lock:
            self._building.pop(subtree.key, None)
        return layer

    def leave(self, layer: Layer) -> None:
        """It is used once less."""
        with self._lock:
            layer.users -= 1
            dropped = self._drop_superfluous()
        for old in dropped:
            old.close()

    def _use(self, subtree: Subtree) -> Layer | None:
        """The layer, if it is kept, in use once more. Under the lock."""
        layer = self._kept.get(subtree.key)
        if layer is not None:
            self._touch(layer)
            # The same directory may have been interned anew, with another id.
            layer.subtree = subtree
        return layer

    def _keep(self, layer: Layer) -> None:
        with self._lock:
            self._kept[layer.subtree.key] = layer
            self._touch(layer)
            if layer.below is not None:
                layer.below.users += 1
            self._built += 1
            self._see(layer.subtree)
            dropped = self._drop_superfluous()
        for old in dropped:
            old.close()

    def _touch(self, layer: Layer) -> None:
        """Used once more, just now. Under the lock."""
        layer.users += 1
        self._kept.move_to_end(layer.subtree.key)
        if layer.below is not None:
            # After it: what is a difference to another goes first.
            self._kept.move_to_end(layer.below.subtree.key)

    def _drop_superfluous(self) -> list[Layer]:
        """Take what is over the budget out of what is kept. Under the lock."""
        excess = sum(layer.memory for layer in self._kept.values()) - self._budget
        dropped = []
        for key, layer in list(self._kept.items()):
            if excess <= 0:
                break
            if not layer.users:
                dropped.append(self._kept.pop(key))
                excess -= layer.memory
                if layer.below is not None:
                    layer.below.users -= 1
        return dropped

    def statistics(self) -> dict[str, int]:
        """How many are kept, images and differences among them, and were ever built; bytes they take and may."""
        with self._lock:
            return {
                "layers": len(self._kept),
                "images": sum(layer.image for layer in self._kept.values()),
                "differences": sum(layer.below is not None for layer in self._kept.values()),
                "bytes": sum(layer.memory for layer in self._kept.values()),
                "budget": self._budget,
                "built": self._built,
            }

    def close(self) -> None:
        """Keep none."""
        with self._lock:
            kept = list(self._kept.values())
            self._kept.clear()
        for layer in kept:
            layer.close()
