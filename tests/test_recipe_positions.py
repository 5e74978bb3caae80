"""Positions of keys and values in TOML texts, checked against tomli's values and known positions."""

from __future__ import annotations

from typing import Any

import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.recipe.layers import parse
from toolkit.recipe.toml_positions import KeyPath, Span, scan
from toolkit.recipe.toml_writer import toml_document, toml_key, toml_value

SAMPLE = '''\
# comment = 1
top = 1
"quo.ted" . 'lit' = [1, [2, "x] # no"], # ]
    {e = 'q', f.g = """a""b"""""}, ]

  [ table . sub ]  # header
  date = 1979-05-27 07:32:00
  "\\u00e9" = '''
SAMPLE += "'''it's\n# no comment'''\n[[list]]\n[[list]]\nz = {}\n[list.inner]\nq = true\n"


def test_keys_and_values_are_at_known_positions() -> None:
    spans = scan(SAMPLE)
    expected: dict[KeyPath, tuple[int, int, int, int]] = {
        ("top",): (2, 1, 2, 7),
        ("quo.ted", "lit"): (3, 13, 3, 21),
        ("quo.ted", "lit", 1, 1): (3, 29, 3, 29),
        ("quo.ted", "lit", 2, "e"): (4, 6, 4, 10),
        ("quo.ted", "lit", 2, "f", "g"): (4, 17, 4, 21),
        ("table", "sub"): (6, 13, 6, 3),
        ("table", "sub", "é"): (8, 3, 8, 14),
        ("list", 0): (10, 3, 10, 1),
        ("list", 1, "z"): (12, 1, 12, 5),
        ("list", 1, "inner", "q"): (14, 1, 14, 5),
    }
    found = {path: (*line_and_column(spans[path].key), *line_and_column(spans[path].value)) for path in expected}
    assert found == expected


def line_and_column(offset: int) -> tuple[int, int]:
    """Return line and column of an offset in the sample, both counted from 1."""
    before = SAMPLE[:offset].split("\n")
    return len(before), len(before[-1]) + 1


def test_windows_line_endings_do_not_change_positions() -> None:
    windows, plain = parse("x", SAMPLE.replace("\n", "\r\n")), parse("x", SAMPLE)
    for path in plain.spans:
        for at_key in (True, False):
            assert windows.location(path, at_key=at_key) == plain.location(path, at_key=at_key)


KEYS = st.text(min_size=1, max_size=6) | st.sampled_from(["a", "b", "a.b", "with space", "é", '"', "'", "#", "="])
SCALARS = (
    st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.text(max_size=12)
    | st.sampled_from(['"""', "'''", "# not a comment", "]", "}", "a\nb", "\\", "\x7f"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)


def every_path(value: Any, path: KeyPath = ()) -> list[KeyPath]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in children for found in [(*path, key), *every_path(item, (*path, key))]]


def surrogate_free(value: Any) -> bool:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def text_at(text: str, span: Span, *, at_key: bool) -> str:
    return text[span.key if at_key else span.value :].split("\n")[0]


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS.filter(surrogate_free), st.sampled_from(["", "# c [x] = \n\n", "\t \n"]))
def test_every_value_that_tomli_reads_has_the_position_of_its_key(document: dict[str, Any], before: str) -> None:
    text = before + toml_document(document)
    parsed = tomli.loads(text)
    assert parsed == document
    spans = scan(text)
    for path in every_path(parsed):
        key, value = path[-1], parsed
        for part in path:
            value = value[part]
        if isinstance(key, str):
            assert text_at(text, spans[path], at_key=True).startswith(toml_key(key))
        if not isinstance(value, dict | list):
            assert text_at(text, spans[path], at_key=False).startswith(toml_value(value))


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS.filter(surrogate_free))
def test_written_toml_is_read_back_unchanged(document: dict[str, Any]) -> None:
    assert tomli.loads(toml_document(document)) == document
    assert tomli.loads(f"value = {toml_value(document)}") == {"value": document}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_text_that_tomli_accepts_is_scanned_completely(data: st.DataObject) -> None:
    """Lines drawn from all kinds of TOML syntax; texts that tomli rejects are not scanned."""
    lines = data.draw(st.lists(st.sampled_from(LINES), max_size=8))
    text = "\n".join(lines)
    try:
        parsed = tomli.loads(text)
    except tomli.TOMLDecodeError:
        return
    assert set(every_path(parsed)) <= set(scan(text))


LINES = [
    "a = 1 # x",
    "b.c = 'x'",
    '"b".d = """\n"two" lines\\\n  """',
    "e = [\n 1, # one\n [ ], {x = 1, y.z = 2},\n]",
    "[t]",
    "[t.u]",
    "[[l]]",
    "[[l.m]]",
    "f = { }",
    "g = '''a''''",
    "[ q . 'r' ]",
    "h = -1.5e-3",
    "i = 07:32:00",
    "j = [ [[]], '#', \"]\" ]",
    "",
    "# [not] = a table",
]
