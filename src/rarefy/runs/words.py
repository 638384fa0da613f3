"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

_BARS = "▁▂▃▄▅▆▇█"


def time_words(seconds: float) -> str:
    """Seconds as minutes:seconds, with hours before them where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Numbers as a line of bars, the highest of full height; means where there are more of them than ``width``."""
    if not values:
        return ""
    width = min(width, len(values))
    ends = [len(values) * place // width for place in range(width + 1)]
    means = [fmean(values[begin:end]) for begin, end in pairwise(ends)]
    low, high = min(means), max(means)
    if low == high:
        return _BARS[3] * width
    return "".join(_BARS[round((len(_BARS) - 1) * (mean - low) / (high - low))] for mean in means)


def memory_words(num_bytes: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
