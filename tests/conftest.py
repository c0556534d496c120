"""What all tests share: hypothesis draws the same examples each time, and no example is judged by how long it took."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("tensorlink", deadline=None, derandomize=True)
settings.load_profile("tensorlink")
