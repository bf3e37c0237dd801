import fnmatch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from a2fpn._registry import Registry, did_you_mean, match_names, natural_key


@pytest.fixture
def colors() -> Registry[int]:
    registry: Registry[int] = Registry("color")
    registry.register("red10")(10)
    registry.register("red9")(9)
    registry.register("green")(1)
    return registry


def test_register_gives_back_what_it_registers() -> None:
    registry: Registry[type] = Registry("thing")

    @registry.register("thing")
    class Thing: ...

    assert registry["thing"] is Thing
    assert "thing" in registry
    assert "other" not in registry


def test_names_come_in_natural_order(colors: Registry[int]) -> None:
    assert colors.names() == list(colors) == ["green", "red9", "red10"]


def test_a_taken_name_is_an_error(colors: Registry[int]) -> None:
    with pytest.raises(ValueError, match=r"The color name 'green' is already registered by 1; choose another name\."):
        colors.register("green")(2)
    assert colors["green"] == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [("gren", r"Did you mean 'green'\?"), ("red1", r"Did you mean .*'red10'"), ("xyz", "Known: green, red10, red9")],
)
def test_an_unknown_name_is_an_error_with_a_hint(colors: Registry[int], name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"^Unknown color '{name}'\. {hint}"):
        colors[name]


def test_did_you_mean_names_at_most_three() -> None:
    assert did_you_mean("r5", ["r50", "r51", "r52", "r53"]).count("r5") == 3


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a1", "a2", "a10", "ba"]),
        ("a1", ["a1", "a10"]),
        ("a*", ["a1", "a2", "a10"]),
        ("a?", ["a1", "a2"]),
        ("[!b]*", ["a1", "a2", "a10"]),
        ("c", []),
    ],
)
def test_patterns_match_as_wildcards_or_as_parts(pattern: str, expected: list[str]) -> None:
    assert match_names(["a10", "ba", "a2", "a1"], pattern) == expected


@given(st.lists(st.from_regex(r"[a-z]{0,3}[0-9]{0,3}", fullmatch=True)), st.text("ab1*?", max_size=4))
def test_matching_keeps_exactly_the_names_that_match(names: list[str], pattern: str) -> None:
    wildcard = pattern if set(pattern) & set("*?") else f"*{pattern}*"
    found = match_names(names, pattern)
    assert sorted(found) == sorted(fnmatch.filter(names, wildcard))
    assert found == sorted(found, key=natural_key)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_numbers_in_names_sort_as_numbers(a: int, b: int) -> None:
    assert (natural_key(f"r{a}") < natural_key(f"r{b}")) == (a < b)


@given(st.lists(st.text("019aA²٣ .-", max_size=6)))
@example(["1²3", "²", "a²", "12"])
@example(["9" * 5000, "10", "9" * 4999])
def test_any_names_can_be_sorted(names: list[str]) -> None:
    found = sorted(names, key=natural_key)
    assert sorted(found) == sorted(names)
    assert found == sorted(found, key=natural_key)


def test_more_digits_than_a_number_may_have_sort_as_a_number() -> None:
    assert sorted(["9" * 5000, "r", "10", "9" * 4999, "2"], key=natural_key) == ["2", "10", "9" * 4999, "9" * 5000, "r"]
