"""Numbers, shares and lists as a person writes them.

`rounded` is for a sentence, where two digits say enough; `number` is for tables and figures, where values are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def rounded(value: float) -> str:
    """A figure inside a sentence: two digits, a large one in full.

    >>> [rounded(v) for v in (0.0, 0.00123, 0.4567, 3.0, 7.25, 48.3, 23902.3, 3.7e9)]
    ['0', '0.0012', '0.46', '3', '7.2', '48', '23,902', '3.7e+09']
    """
    size = abs(value)
    if size == 0:
        return "0"
    if not math.isfinite(value) or size < 1e-3 or size >= 1e7:
        return f"{value:.2g}"
    if size < 1:
        return f"{value:.2g}"
    return f"{value:.1f}".removesuffix(".0") if size < 10 else f"{value:,.0f}"


def number(value: float | int | None) -> str:
    """A value in a table: four significant digits.

    >>> number(0.000123456), number(21634.2), number(576), number(None), number(float("inf"))
    ('1.235e-04', '21,634', '576', '–', 'inf')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def amount(value: float) -> str:
    """A large count in three digits.

    >>> amount(134515008), amount(2048), amount(7)
    ('135M', '2.05k', '7')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def percent(share: float) -> str:
    """A share as a percentage, never rounded to 0 % or 100 % when it isn't.

    >>> [percent(s) for s in (0.0, 3e-7, 0.0004, 0.123, 0.98, 0.9996, 1.0)]
    ['0 %', 'under 0.001 %', '0.04 %', '12 %', '98 %', '99.96 %', '100 %']
    """
    value = 100 * share
    if 0 < value < 0.001:
        return "under 0.001 %"
    if value in (0.0, 100.0) or 1 <= value <= 99:
        return f"{value:.0f} %"
    return f"{value:.2g} %" if value < 1 else f"{value:.4g} %"


def plural(count: int, word: str) -> str:
    """A count with its noun.

    >>> plural(1, "token"), plural(2048, "token")
    ('1 token', '2,048 tokens')
    """
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def listed(names: Iterable[Any], most: int = 4) -> str:
    """Names in a sentence, cut after ``most``.

    >>> listed([3, 4, 5]), listed(range(9))
    ('3, 4 and 5', '0, 1, 2, 3 and 5 more')
    """
    words = [str(n) for n in names]
    if len(words) > most + 1:
        words = [*words[:most], f"{len(words) - most} more"]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "none"


def spans(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive integers as ``(first, last)``.

    >>> spans([2, 11, 12, 13, 20])
    [(2, 2), (11, 13), (20, 20)]
    """
    runs: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs


def range_words(blocks: Iterable[int]) -> str:
    """Blocks in words.

    >>> range_words([3]), range_words([1, 2, 3, 7])
    ('block 3', 'blocks 1-3 and 7')
    """
    runs = spans(blocks)
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    many = len(runs) > 1 or bool(runs and runs[0][0] != runs[0][1])
    return ("blocks " if many else "block ") + listed(parts)
