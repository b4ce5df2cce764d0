"""Numbers, sizes and lists as people write them."""

import pytest

from groundwork.wording import MOST, Complaints, counted, size_of, some


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (40 * 3 * 96**2, "1.11 MB"),
        (999_499_999, "999 MB"),
        (999_600_000, "1 GB"),
        (24_186_470_400, "24.2 GB"),
        (31e12, "31 TB"),
    ],
)
def test_a_size_is_in_the_unit_that_fits(count, text):
    assert size_of(count) == text


def test_one_is_no_plural():
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]
    assert [counted(n, "is", "are") for n in (1, 2)] == ["1 is", "2 are"]


def test_of_long_lists_the_first_are_shown():
    assert some([1, 2, 3]) == "1, 2, 3"
    assert some("abcdef", 2) == "a, b and 4 more"


@pytest.mark.parametrize("count", [0, 1, MOST, MOST + 1, 1000])
def test_of_many_complaints_the_first_are_lines(count, capsys):
    with Complaints() as complaints:
        for i in range(count):
            complaints.add(f"line {i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:MOST] == [f"line {i}" for i in range(min(count, MOST))]
    assert lines[MOST:] == ([f"… and {count - MOST} more"] if count > MOST else [])
