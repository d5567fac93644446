"""Which subtrees become layers: the table in `casfs.planning`, rule by rule, on trees that nobody mounts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from casfs.metadata import Part
from casfs.planning import ALIKE, HUGE, LEAST, MOST_LAYERS, Over, Plan, Sight, Subtree, plan, plan_layer, plan_over
from store.compare import Difference
from store.digest import Digest, DigestFunction
from store.entries import DirectoryEntry, FileEntry
from store.trees import Directory, Row

Nested = Mapping[bytes, "Nested | int"]
"""Directories by name; a number stands for so many files."""


class Made:
    """A tree in memory; it counts which directories were looked into."""

    def __init__(self, content: Nested) -> None:
        self.rows: dict[int, list[Row]] = {}
        self.asked: list[int] = []
        self.ids: dict[bytes, int] = {}
        number, nodes = self._add(content, b"")
        self.root = Directory(number, _digest(number), nodes, 0, 0, 0, 0)

    def _add(self, content: Nested, path: bytes) -> tuple[int, int]:
        rows = []
        nodes = 1
        for name, below in content.items():
            if isinstance(below, int):
                rows += [Row(0, FileEntry(b"%s%d" % (name, n), _digest(n), False)) for n in range(below)]
                nodes += below
            else:
                inner = path + b"/" + name if path else name
                number, count = self._add(below, inner)
                rows.append(Row(0, DirectoryEntry(name, _digest(number)), number, count))
                nodes += count
        number = len(self.rows) + 1
        self.rows[number] = rows
        self.ids[path] = number
        return number, nodes

    def rows_of(self, number: int) -> Iterable[Row]:
        self.asked.append(number)
        return self.rows[number]

    def plan(self, known: Mapping[bytes, Sight] | None = None) -> Plan:
        sights = known or {}
        return plan(self.root, self.rows_of, lambda subtree: sights.get(subtree.path, Sight.NEW))


def _digest(number: int) -> Digest:
    return DigestFunction.BLAKE3.of(b"%d" % number)


def paths(subtrees: Iterable[Subtree]) -> list[bytes]:
    return [subtree.path for subtree in subtrees]


TREE: Nested = {
    b"big": {b"f": LEAST, b"inner": {b"f": LEAST}},
    b"small": {b"f": 3, b"sub": {b"f": 2}},
    b"top": 1,
}


def test_what_was_never_seen_is_laid_out_and_noted() -> None:
    planned = Made(TREE).plan()
    assert planned.layers == []
    assert [part.path for part in planned.parts] == [b"", b"big", b"big/inner", b"small", b"small/sub"]
    assert paths(planned.noted) == [b"", b"big", b"big/inner"]


@pytest.mark.parametrize("sight", [Sight.LAYER, Sight.SEEN])
def test_what_is_a_layer_or_was_seen_is_taken_and_not_looked_into(sight: Sight) -> None:
    made = Made(TREE)
    planned = made.plan({b"big": sight})
    assert paths(planned.layers) == [b"big"]
    assert [part.path for part in planned.parts] == [b"", b"small", b"small/sub"]
    assert b"big" not in [row.entry.name for row in planned.parts[0].rows]
    assert made.ids[b"big"] not in made.asked and made.ids[b"big/inner"] not in made.asked


def test_parts_of_what_has_changed_are_layers_by_themselves() -> None:
    planned = Made(TREE).plan({b"big": Sight.CHANGED, b"big/inner": Sight.SEEN})
    assert paths(planned.layers) == [b"big/inner"]
    assert paths(planned.noted) == [b"", b"big"]


def test_what_is_small_is_never_a_layer() -> None:
    assert Made(TREE).plan({b"small": Sight.SEEN, b"small/sub": Sight.LAYER}).layers == []


def test_what_is_huge_is_a_layer_at_first_sight_unless_another_was_there() -> None:
    tree: Nested = {b"huge": {b"f": HUGE}, b"rest": 5}
    assert paths(Made(tree).plan().layers) == [b"huge"]
    assert Made(tree).plan({b"huge": Sight.CHANGED}).layers == []


def test_the_root_is_a_layer_at_its_second_sight_whatever_its_size() -> None:
    tree: Nested = {b"f": HUGE}
    assert Made(tree).plan().layers == []
    planned = Made(tree).plan({b"": Sight.SEEN})
    assert paths(planned.layers) == [b""]
    assert [(part.path, part.rows) for part in planned.parts] == [(b"", [])]


def test_of_too_many_layers_the_largest_are_taken() -> None:
    tree: Nested = {b"d%03d" % n: {b"f": LEAST + n} for n in range(MOST_LAYERS + 10)}
    made = Made(tree)
    planned = made.plan(dict.fromkeys(tree, Sight.SEEN))
    assert paths(planned.layers) == [b"d%03d" % n for n in range(10, MOST_LAYERS + 10)]
    assert len(planned.parts) == 11


def test_a_layer_has_the_directories_that_lead_to_it_and_all_below() -> None:
    made = Made({b"a": {b"b": {b"big": {b"f": LEAST, b"inner": {b"f": LEAST}}, b"other": {b"f": 1}}}})
    number = made.ids[b"a/b/big"]
    planned = plan_layer(Subtree(b"a/b/big", _digest(number), number, 2 * LEAST + 2), made.rows_of)
    assert [part.path for part in planned.parts] == [b"", b"a", b"a/b", b"a/b/big", b"a/b/big/inner"]
    assert [[row.entry.name for row in part.rows] for part in planned.parts[:3]] == [[b"a"], [b"b"], [b"big"]]
    assert paths(planned.noted) == [b"a/b/big", b"a/b/big/inner"]


def over(nodes: int, *differences: Difference) -> Over | None:
    return plan_over(Subtree(b"a/b", _digest(0), 1, nodes), differences)


def laid(parts: Iterable[Part]) -> dict[bytes, list[bytes]]:
    return {part.path: [row.entry.name for row in part.rows] for part in parts}


FILE = FileEntry(b"f", _digest(1), False)
DIRECTORY = DirectoryEntry(b"d", _digest(2))


def test_a_difference_has_what_changed_with_the_directories_above_it() -> None:
    changed, new, gone = (b"x/f", FILE, FILE), (b"x/y/f", None, FILE), (b"z/f", FILE, None)
    planned = over(1000, *(Difference(*difference) for difference in (changed, new, gone)))
    assert planned is not None
    assert laid(planned.parts) == {
        b"": [b"a"],
        b"a": [b"b"],
        b"a/b": [b"x"],
        b"a/b/x": [b"f", b"y"],
        b"a/b/x/y": [b"f"],
    }
    assert [part.path for part in planned.parts] == sorted(part.path for part in planned.parts)
    assert planned.gone == [b"a/b/z/f"]


def test_what_was_in_a_directory_that_is_gone_or_is_none_any_more_is_not_named() -> None:
    planned = over(
        1000,
        Difference(b"d", DIRECTORY, None),
        Difference(b"d/f", FILE, None),
        Difference(b"d/g", DIRECTORY, None),
        Difference(b"d/g/f", FILE, None),
        Difference(b"f", DIRECTORY, FILE),
        Difference(b"f/f", FILE, None),
        Difference(b"g", FILE, DIRECTORY),
        Difference(b"g/f", None, FILE),
        Difference(b"h", FILE, None),
    )
    assert planned is not None
    assert laid(planned.parts)[b"a/b"] == [b"f", b"g"]
    assert laid(planned.parts)[b"a/b/g"] == [b"f"]
    assert planned.gone == [b"a/b/d", b"a/b/h"]


def test_what_differs_in_much_is_not_laid_over() -> None:
    many = [Difference(b"%d" % number, FILE, None) for number in range(10)]
    assert over(10 * ALIKE, *many) is not None
    assert over(10 * ALIKE - 1, *many) is None


def test_what_is_nearly_the_same_as_a_layer_is_taken() -> None:
    planned = Made(TREE).plan({b"big": Sight.ALIKE})
    assert paths(planned.layers) == [b"big"]
    assert paths(planned.noted) == [b""]
