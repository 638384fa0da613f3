"""What has been measured on the way to a smaller model, so that nothing is measured twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Memo(dict[str, Any]):
    """Plain values (for JSON) by what they are of; whoever keeps them on the disk, too, overrides ``keep``."""

    def keep(self, found: Mapping[str, Any]) -> None:
        """Take in what has just been found."""
        self.update(found)
