"""Hash of JSON-serializable values, which identifies recipes and cache entries."""

from __future__ import annotations

import hashlib
import json


def json_hash(value: object) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of a JSON-serializable value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
