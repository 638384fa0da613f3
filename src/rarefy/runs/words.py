"""Numbers as people read them."""

from __future__ import annotations


def time_words(seconds: float) -> str:
    """Seconds as minutes:seconds, with hours before them where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def memory_words(num_bytes: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
