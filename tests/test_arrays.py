"""Ragged arrays and fused distributions against lists of lists."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusellm.arrays.distributions import Kept
from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import Ragged, offsets_of
from fusellm.fusion.carry import Carried

quick = settings(max_examples=60, deadline=None, derandomize=True)

Part = tuple[int, float, list[tuple[int, float]]]
"""(source, rest, [(outcome, mass), …])"""
PARTS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.floats(0, 1, width=32),
        st.lists(st.tuples(st.integers(0, 2**40), st.floats(0, 1, width=32)), max_size=4),
    ),
    max_size=3,
)
POSITIONS = st.lists(PARTS, max_size=6)


def fused_of(positions: list[list[Part]]) -> Fused:
    parts = [part for position in positions for part in position]
    outcomes = [outcome for part in parts for outcome in part[2]]
    return Fused(
        np.array([len(position) for position in positions], dtype=np.uint8),
        np.array([source for source, _, _ in parts], dtype=np.int8),
        np.array([len(own) for _, _, own in parts], dtype=np.int64),
        np.array([number for number, _ in outcomes], dtype=np.int64),
        np.array([mass for _, mass in outcomes], dtype=np.float32),
        np.array([rest for _, rest, _ in parts], dtype=np.float32),
    )


def listed(fused: Fused) -> list[list[Part]]:
    """Back to lists, position by position, part by part."""
    positions, part, outcome = [], 0, 0
    for count in fused.parts.tolist():
        position: list[Part] = []
        for _ in range(count):
            own = []
            for _ in range(int(fused.lengths[part])):
                own.append((int(fused.outcomes[outcome]), float(fused.masses[outcome])))
                outcome += 1
            position.append((int(fused.source[part]), float(fused.rest[part]), own))
            part += 1
        positions.append(position)
    assert (part, outcome) == (len(fused.source), len(fused.outcomes))
    return positions


@quick
@given(POSITIONS, POSITIONS, st.data())
def test_fused_distributions_are_taken_and_joined_as_lists(
    one: list[list[Part]], two: list[list[Part]], data: st.DataObject
) -> None:
    both = Fused.concat([fused_of(one), fused_of(two)])
    assert listed(both) == one + two
    count = len(one + two)
    chosen = data.draw(st.lists(st.integers(0, count - 1), max_size=8)) if count else []
    taken = both.take(np.array(chosen, dtype=np.int64))
    assert listed(taken) == [(one + two)[n] for n in chosen]
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert listed(both.between(start, stop)) == (one + two)[start:stop]
    assert listed(Fused.of(both.columns())) == one + two


ROWS = st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=5), max_size=6)


@quick
@given(ROWS, ROWS, st.data())
def test_ragged_rows_are_taken_and_joined_as_lists(
    one: list[list[int]], two: list[list[int]], data: st.DataObject
) -> None:
    def ragged(rows: list[list[int]]) -> Ragged:
        return Ragged.of([np.array(row, dtype=np.int64) for row in rows])

    def rows_of(some: Ragged) -> list[list[int]]:
        pieces = np.split(some.values, some.offsets[1:-1]) if len(some.offsets) > 1 else []
        return [piece.tolist() for piece in pieces]

    both = Ragged.concat([ragged(one), ragged(two)])
    assert rows_of(both) == one + two
    assert both.lengths.tolist() == [len(row) for row in one + two]
    count = len(one + two)
    chosen = data.draw(st.lists(st.integers(0, count - 1), max_size=8)) if count else []
    assert rows_of(both.take(np.array(chosen, dtype=np.int64))) == [(one + two)[n] for n in chosen]


@quick
@given(PARTS, PARTS, st.data())
def test_carried_parts_are_taken_and_joined_as_lists(
    one: list[Part], two: list[Part], data: st.DataObject
) -> None:
    def carried(parts: list[Part]) -> Carried:
        outcomes = [outcome for part in parts for outcome in part[2]]
        return Carried(
            np.array([len(own) for _, _, own in parts], dtype=np.int64),
            np.array([number for number, _ in outcomes], dtype=np.int64),
            np.array([mass for _, mass in outcomes], dtype=np.float64),
            np.array([rest for _, rest, _ in parts], dtype=np.float64),
        )

    both = Carried.concat([carried(one), carried(two)])
    count = len(one + two)
    order = data.draw(st.permutations(range(count)))
    taken = both.take(np.array(order, dtype=np.int64))
    expected = carried([(one + two)[n] for n in order])
    for name in ("lengths", "outcomes", "masses", "rest"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(expected, name))


def test_of_no_batches_nothing_is_kept() -> None:
    none = Kept.concat([])
    assert none.offsets.tolist() == [0]
    assert len(none.tail) == len(none.ids) == 0
    assert none.take(np.zeros(0, dtype=np.int64)).offsets.tolist() == [0]


def test_many_parts_do_not_overflow_their_small_type() -> None:
    """Counts of parts are bytes, and their sums are not."""
    assert offsets_of(np.full(300, 255, dtype=np.uint8))[-1] == 300 * 255
