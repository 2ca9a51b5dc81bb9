from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.config import ExpertMemory, format_bytes, parse_bytes, parse_host_memory, user_cache
from emoe.errors import UsageError

sizes = st.integers(min_value=0, max_value=2**60)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 * 2**30),
        ("512MB", 512_000_000),
        ("512 mb", 512_000_000),
        (" 1.5 GiB ", 3 * 2**29),
        (".5KiB", 512),
        ("4096", 4096),
        ("7B", 7),
        ("0.3B", 0),
        ("1.1kB", 1100),
        (12, 12),
    ],
)
def test_sizes_that_people_write(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8 GiB GiB", "1e9", "８GiB", "8 G i B", "nan", "inf"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"8GiB|unknown unit"):
        parse_bytes(text)


def test_a_bare_letter_is_refused_because_it_is_read_both_ways() -> None:
    with pytest.raises(UsageError, match=r"write 8GiB for powers of 1024 or 8GB"):
        parse_bytes("8g")


@pytest.mark.parametrize("value", [True, 1.5, None, b"8GiB", -1])
def test_wrong_types_are_refused(value: object) -> None:
    with pytest.raises(UsageError):
        parse_bytes(value)  # type: ignore[arg-type]


@given(sizes)
def test_plain_numbers_are_bytes(nbytes: int) -> None:
    assert parse_bytes(nbytes) == parse_bytes(str(nbytes)) == parse_bytes(f"{nbytes}B") == nbytes


@given(sizes)
def test_formatted_sizes_read_back_within_half_a_last_digit(nbytes: int) -> None:
    text = format_bytes(nbytes)
    assert abs(parse_bytes(text) - nbytes) <= 0.005 * nbytes + 1  # and a fraction of a byte, which is rounded down
    assert nbytes >= 2**59 or not text.startswith("1024")


@given(sizes, sizes)
def test_formatting_keeps_order(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert parse_bytes(format_bytes(low)) <= parse_bytes(format_bytes(high))


def test_formatting() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 2**20 - 1, 1331439862, -3 * 2**20)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.00 MiB",
        "1.24 GiB",
        "-3.00 MiB",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", ExpertMemory("bytes", 8 * 2**30)),
        (1000, ExpertMemory("bytes", 1000)),
        ("40%", ExpertMemory("share", 0.4)),
        ("12.5 %", ExpertMemory("share", 0.125)),
        ("100%", ExpertMemory("share", 1.0)),
        ("12/layer", ExpertMemory("per_layer", 12)),
        ("12 / LAYER", ExpertMemory("per_layer", 12)),
    ],
)
def test_expert_memory_forms(text: str | int, expected: ExpertMemory) -> None:
    assert ExpertMemory.parse(text) == expected
    assert ExpertMemory.parse(expected) is expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lots", "'8GiB', '40%' or '12/layer'"),
        ("40 percent", "'8GiB', '40%' or '12/layer'|unknown unit"),
        ("12/row", "'8GiB', '40%' or '12/layer'"),
        ("-40%", "'8GiB', '40%' or '12/layer'"),
        ("120%", "more than all experts"),
        ("0%", "must be positive"),
        ("0/layer", "must be positive"),
        (0, "must be positive"),
        (0.4, "'40%'"),
        (True, "'40%'"),
        (None, "'40%'"),
    ],
)
def test_expert_memory_refusals_say_what_to_write(value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExpertMemory.parse(value)  # type: ignore[arg-type]


@given(
    st.one_of(
        st.builds(ExpertMemory, st.just("bytes"), st.integers(1, 2**60)),
        st.builds(ExpertMemory, st.just("per_layer"), st.integers(1, 4096)),
        st.integers(1, 10_000).map(lambda n: ExpertMemory.parse(f"{n / 100}%")),
    )
)
def test_expert_memory_text_reads_back(memory: ExpertMemory) -> None:
    assert ExpertMemory.parse(str(memory)) == memory


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        (ExpertMemory("bytes", 8 * 2**30), "8GiB"),
        (ExpertMemory("bytes", 1536 * 2**20), "1536MiB"),
        (ExpertMemory("bytes", 2**50), "1PiB"),
        (ExpertMemory("bytes", 3 * 2**10), "3KiB"),
        (ExpertMemory("bytes", 1023), "1023B"),
        (ExpertMemory("share", 0.125), "12.5%"),
        (ExpertMemory("per_layer", 12), "12/layer"),
    ],
)
def test_expert_memory_is_written_as_people_write_it(memory: ExpertMemory, text: str) -> None:
    assert str(memory) == text


@given(st.sampled_from([*"kmgtp"]), st.booleans(), st.integers(0, 5000))
def test_a_unit_is_a_power_of_1000_or_of_1024(letter: str, binary: bool, count: int) -> None:
    power = "kmgtp".index(letter) + 1
    assert parse_bytes(f"{count}{letter}{'i' * binary}B") == count * (1024 if binary else 1000) ** power


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("auto", "auto"),
        (0, "0"),
        ("0", "0"),
        ("16GiB", ExpertMemory("bytes", 2**34)),
        ("50%", ExpertMemory("share", 0.5)),
        (4096, ExpertMemory("bytes", 4096)),
    ],
)
def test_host_memory_forms(value: str | int | None, expected: ExpertMemory | str | None) -> None:
    assert parse_host_memory(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lots", "cannot read 'lots' as host memory; write e.g. '16GiB'"),
        ("-1GiB", "as host memory"),
        (0.5, "as host memory"),
        ("12/layer", "it is one pool over all layers"),
    ],
)
def test_host_memory_refusals_say_what_to_write(value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_host_memory(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/own", "/shared", "/own"),
        ("~/own", "/shared", "/home/me/own"),
        ("", "/shared", "/shared/emoe"),
        (None, "/shared", "/shared/emoe"),
        (None, "relative", "/home/me/.cache/emoe"),  # the XDG specification has such a value ignored
        (None, None, "/home/me/.cache/emoe"),
    ],
)
def test_where_the_cache_lies(
    monkeypatch: pytest.MonkeyPatch, own: str | None, shared: str | None, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("EMOE_CACHE", own), ("XDG_CACHE_HOME", shared)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert user_cache() == Path(expected)
