"""Encoding of class and image file names as text that is safe in any file, terminal and spreadsheet.

A file name can be any bytes except ``/`` and NUL. In every file and message of this project such a name is
percent-encoded as in URLs (RFC 3986), but only where necessary. Each part between slashes is encoded separately; the
bytes of these characters are written as ``%XX``:

- ``%`` itself,
- bytes that are not UTF-8,
- control and format characters (newline, carriage return, tab, escape, right-to-left override, zero-width
  characters), line and paragraph separators,
- white space at the start or the end,
- ``=``, ``+``, ``-``, ``@`` and their full-width forms at the start, which begin a formula in a spreadsheet.

Everything else is unchanged. The encoding is injective, and any URL decoder restores the name:
:func:`decode_name`, or ``os.fsdecode(urllib.parse.unquote_to_bytes(text))``.
"""

from __future__ import annotations

import unicodedata
from urllib.parse import unquote_to_bytes

_FORMULA = "=+-@\uff1d\uff0b\uff0d\uff20"
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of unsafe characters. Cs: surrogates, by which Python represents bytes that are not UTF-8."""


def encode_name(name: str) -> str:
    """Encode a class name or path, as returned by Python (bytes that are not UTF-8 as surrogates), as safe text."""
    return "/".join(_encode_part(part) for part in name.split("/"))


def decode_name(text: str) -> str:
    """Decode a name; the inverse of :func:`encode_name`."""
    return unquote_to_bytes(text).decode("utf-8", "surrogateescape")


def escape_control_characters(text: str) -> str:
    """Encode characters of a message that a terminal would interpret, as in names; keep newlines and tabs."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNSAFE else _percent(c) for c in text)


def _encode_part(part: str) -> str:
    if part.isascii() and part.replace("_", "").replace(".", "").isalnum():  # most names; there may be millions
        return part
    start, end = len(part) - len(part.lstrip()), len(part.rstrip())
    return "".join(
        _percent(char)
        if char == "%" or not start <= i < end or (i == 0 and char in _FORMULA) or unicodedata.category(char) in _UNSAFE
        else char
        for i, char in enumerate(part)
    )


def _percent(char: str) -> str:
    # A surrogate that does not represent a byte cannot be in a file name, but may be in the text of a message.
    errors = "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass"
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", errors))
