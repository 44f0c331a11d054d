"""YAML texts that look like one thing and are another, or that never end."""

import sys
import time

import pytest

from ssr_rec.common.yaml_file import MAX_BYTES, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 1", "key 'a' is given twice"),
        ("x: [{a: 1, 'a': 2}]", "key 'a' is given twice"),
        ("a: 0512", "0512 is no decimal number; quote it"),
        ("a: -07.5", "-07.5 is no decimal number"),
        ("a: 1:30", "1:30 is no decimal number"),
        ("a: 1:30.5", "1:30.5 is no decimal number"),
        ("a: &x [1]\nb: *x", "aliases are not read"),
        ("&x [*x]", "aliases are not read"),
        ("a: {<<: {b: 1}}", "merge keys are not read"),
        ("!!python/object/apply:os.system ['true']", "tags as tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !!binary aGk=", "tags as"),
        ("a: !!bool perhaps", "tags as"),
        ("a: ! 8", "tags as"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ('a: "\\U00110000"', "not in range"),
        ("[" * 100_000, "nested too deep"),
        ("a: " + "9" * 5_000, "the limit (4300" + " digits" * (sys.version_info >= (3, 11))),
        ("a: 0x" + "f" * 10_000, "a: an integer beyond 64 bits"),
        ("a: 1e999", "a: inf is not a finite number"),
        ("{1: 2}", "key '1' is not text; quote it"),
        ("yes: 2", "key 'True' is not text; quote it"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ValueError) as refusal:
        parse_yaml(text)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_numbers_are_decimal():
    text = "[0, -0.5, 10, 1_000, 0x10, 0.25, 1e-3, .5e1, '0512', '1:30', 2.]"
    assert parse_yaml(text) == [0, -0.5, 10, 1000, 16, 0.25, 0.001, 5.0, "0512", "1:30", 2.0]


def test_aliases_do_not_unfold():
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    with pytest.raises(ValueError, match="aliases are not read"):
        parse_yaml("\n".join(lines))


def test_a_long_word_takes_no_time():
    """The pattern of a number once tried every split of the digits: 20 kB took 4 s, 1 MB hours."""
    started = time.process_time()
    assert parse_yaml("a: " + "1" * 200_000 + "x") == {"a": "1" * 200_000 + "x"}
    assert time.process_time() - started < 3


def test_a_file_too_large_is_not_parsed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match=r"run.yaml: larger than 1,048,576 bytes; name a config"):
        read_yaml(path, "a config")
