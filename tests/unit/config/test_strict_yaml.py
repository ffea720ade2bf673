"""YAML 1.1 reads some values as nobody means them."""

from __future__ import annotations

import pytest

from icce_ray.config.strict_yaml import load_yaml

BOMB = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 30)]
)
MAPPINGS = "\n".join(
    ["a0: &a0 {x: 1, y: 1}"] + [f"a{level}: &a{level} {{x: *a{level - 1}, y: *a{level - 1}}}" for level in range(1, 30)]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: off", 'line 1: off is ambiguous; write false, or null to leave a setting out, or "off" in quotes'),
        ("\na: Yes", "line 2: Yes is ambiguous; write true"),
        ("a: 010", "line 1: 010 would be read as an octal number"),
        ("a: 1:30", "line 1: 1:30 would be read as a number in base 60"),
        ("a: {b: 1}\nc: 2\na: {d: 3}", "line 3: 'a' is given twice, first in line 1"),
        ("a: " + "9" * 5000, "line 1: a number of 5,000 digits"),
        (BOMB, "more than 100,000 values once its aliases are expanded"),
        (MAPPINGS, "more than 100,000 values once its aliases are expanded"),
        ("a: &x [*x]", "line 1: an alias that contains itself"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("a: [1,", "not valid YAML: while parsing a flow node"),
        ("? [1]\n: 2", "not valid YAML: .*unhashable key"),
        ("a: \x00", "not valid YAML: .*special characters are not allowed"),
        ("a: !!bool maybe", "not valid YAML: a tag"),
        ("a: !!timestamp soon", "not valid YAML: a tag"),
        ('a: "\\ud800"', "line 1: .*half of a character"),
        ("a: " + "x" * 70_000, "70,003 characters; at most 65,536 are read"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML: could not determine a constructor"),
    ],
)
def test_what_would_be_misread_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_yaml(text)


def test_everything_else_is_read_as_yaml() -> None:
    text = """
    words: {a: true, b: FALSE, c: null, d: ~, e: "off", f: 'yes', g: offset}
    numbers: [0, -7, 1_000, 0x1F, 0.5, .5, 1.5e-3, .inf]
    text: [2024-01-01, 12:30:00.5x, "010", s3://bucket/a:b]
    alias: [&one {x: 1}, *one]
    """
    assert load_yaml(text) == {
        "words": {"a": True, "b": False, "c": None, "d": None, "e": "off", "f": "yes", "g": "offset"},
        "numbers": [0, -7, 1000, 31, 0.5, 0.5, 0.0015, float("inf")],
        "text": ["2024-01-01", "12:30:00.5x", "010", "s3://bucket/a:b"],
        "alias": [{"x": 1}, {"x": 1}],
    }
    assert load_yaml("") is None
