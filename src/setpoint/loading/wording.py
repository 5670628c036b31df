"""Other libraries' errors, cut to what fits in one line."""

from __future__ import annotations


def one_line(error: BaseException, length: int = 200) -> str:
    """The message of an error, or its type if it has none.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length] + " …"
