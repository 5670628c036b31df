"""Other libraries' errors and long lists, cut to what fits in one line."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(error: BaseException, length: int = 200) -> str:
    """The message of an error, or its type if it has none.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length] + " …"


def few(names: Sequence[str], count: int = 3) -> str:
    """The first names and how many more there are.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
