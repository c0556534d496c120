"""Placeholder."""

from typing import Any


class Examiner:
    def examine(self, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        raise NotImplementedError
