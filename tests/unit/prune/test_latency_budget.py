"""What a table foretells is measured, and corrected once."""

import pytest

from diffpress.errors import ConfigError
from diffpress.prune.latency import told, within

TABLE = {"": 10.0, "a": 4.0, "b": 3.0, "c": 2.0}


def pick(limit):
    """The fewest letters of 'abc' that save enough by a table: ``choose(table)``, and the tables it was given."""
    seen = []

    def choose(table):
        seen.append(table)
        for letters in ("", "a", "ab", "abc"):
            left = (table[""] - sum(table[letter] for letter in letters)) / table[""]
            if left <= limit:
                return letters, left
        raise ConfigError(f"latency {limit:g} cannot be met; the closest that can is {left:g}")

    return choose, seen


def engine(worth):
    """Measured: of the table's saving the share ``worth`` is real."""
    return lambda letters: 1 - worth * sum(TABLE[letter] for letter in letters) / 10


@pytest.mark.parametrize(
    ("limit", "worth", "letters", "left", "tables"),
    [(0.7, 1.0, "a", 0.6, 1), (0.7, 0.75, "a", 0.7, 1), (0.7, 0.6, "ab", 0.58, 2), (0.55, 0.5, "abc", 0.55, 2)],
)
def test_the_budget_is_of_what_is_measured(limit, worth, letters, left, tables):
    choose, seen = pick(limit)
    found, measured = within(limit, TABLE, choose, engine(worth))
    assert (found, measured, len(seen)) == (letters, pytest.approx(left), tables)
    assert all(table[""] == 10.0 for table in seen)
    assert seen[-1]["a"] == pytest.approx(4.0 * (worth if tables > 1 else 1))


@pytest.mark.parametrize(("worth", "closest"), [(0.5, "0.55"), (0.0, "1"), (-0.2, "1")])
def test_what_nothing_can_meet_is_refused_by_what_was_measured(worth, closest):
    choose, _ = pick(0.5)
    with pytest.raises(ConfigError, match=rf"the closest that can is {closest}$"):
        within(0.5, TABLE, choose, engine(worth))


def test_a_second_miss_is_told():
    choose, seen = pick(0.7)
    assert within(0.7, TABLE, choose, {"a": 0.8, "ab": 0.75}.__getitem__) == ("ab", 0.75)
    assert len(seen) == 2
    assert told(0.62, 0.7) == "62% of the time measured"
    assert told(0.78, 0.7) == "78% of the time measured, which misses 70%"
