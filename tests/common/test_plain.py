"""Text from outside: what is no file, too large, not UTF-8, or holds values that nothing behind expects."""

import os
from datetime import date

import pytest

from ssr_rec.common.plain_values import MAX_DEPTH, check_plain, parse_json, read_text


def refuse_file(path, message):
    with pytest.raises(ValueError) as refusal:
        read_text(path, 100, "try another")
    assert message in str(refusal.value) and str(path) in str(refusal.value)
    assert str(refusal.value).endswith("; try another")


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "endless").symlink_to("/dev/zero")
    refuse_file(tmp_path / "pipe", "not a regular file")
    refuse_file(tmp_path / "endless", "not a regular file")
    refuse_file(tmp_path, "not a regular file")
    refuse_file(tmp_path / "loop", "Too many levels of symbolic links")
    refuse_file(tmp_path / "nowhere", "No such file")
    refuse_file(tmp_path / ("x" * 300), "File name too long")
    refuse_file(tmp_path / "a\0b", "embedded null byte")


def test_contents_that_are_no_text(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_text(path, 100, "") == "x" * 100
    path.write_bytes(b"x" * 101)
    refuse_file(path, "larger than 100 bytes")
    path.write_bytes("é".encode("latin-1"))
    refuse_file(path, "not UTF-8")
    path.write_bytes("é".encode())
    assert read_text(path, 100, "") == "é"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "key 'a' is given twice"),
        ('{"a": {"b": NaN}}', "a.b: nan is not a finite number"),
        ("[0, -Infinity]", "1: -inf is not"),
        ("1e999", "top level: inf is not"),
        ("[" * 100_000, "nested more than"),
        ("[" * 40 + "]" * 40, "nested more than"),
        ("9223372036854775808", "beyond 64 bits"),
        ("-" + "9" * 10_000, "beyond 64 bits"),
        (r'{"a": ["\ud83d"]}', "a.0: the character '\\ud83d' is not text"),
        (r'{"a\u0000": 1}', "in a key, the character '\\x00' is not text"),
        ("\ufeff{}", "BOM"),
        ("{'a': 1}", "line 1 column 2"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_not_taken(text, message):
    with pytest.raises(ValueError) as refusal:
        parse_json(text)
    assert message in str(refusal.value) and len(str(refusal.value)) < 200


def test_json_that_is_taken():
    text = '{"a": [1, -9223372036854775808, 9223372036854775807, 0.5, true, null, "\\ud83d\\ude00"], "b": {"a": 1}}'
    assert parse_json(text) == {"a": [1, -(2**63), 2**63 - 1, 0.5, True, None, "\U0001f600"], "b": {"a": 1}}
    assert str(parse_json('[NaN, Infinity, {"a": -Infinity}]', nan=True)) == "[nan, inf, {'a': -inf}]"
    deep = "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH
    assert parse_json(deep)
    with pytest.raises(ValueError, match=r"nested more than 32 deep"):
        parse_json(f"[{deep}]")


def test_values_that_are_not_plain():
    check_plain({"a": date(2024, 1, 2), "b": [None, False]})
    for value, message in (
        (b"x", "a: bytes is not"),
        ({1}, "a: set is not"),
        ({1: 2}, "a: key '1' is not text; quote"),
    ):
        with pytest.raises(ValueError, match=message):
            check_plain({"a": value})
