"""Conversion of records to pandas data frames. pandas is optional, and imported only when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.errors import missing_package

if TYPE_CHECKING:
    from pandas import DataFrame


def data_frame(records: Sequence[Mapping[str, Any]], index: str) -> DataFrame:
    """Return a data frame with one row per record, indexed by the column ``index``.

    The columns are the keys of all records in order of appearance; NaN marks values that a record does not have.
    Raises UserError if pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise missing_package("a data frame", "pandas", "pandas") from None
    return pandas.DataFrame(list(records), columns=None if records else [index]).set_index(index)
