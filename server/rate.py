"""How often somebody may ask: a bucket of permits that fills up again at a constant rate."""

from __future__ import annotations

from typing import Final

REQUESTS_A_SECOND: Final = 100.0
"""For each site. A busy agent asks 10 to 40 times a second."""
BURST: Final = 400.0


class Bucket:
    """Permits of one site.

    >>> bucket = Bucket(now=0.0)
    >>> sum(bucket.take(now=0.0) for _ in range(1000)), bucket.take(now=1.0)
    (400, True)
    """

    def __init__(self, *, now: float) -> None:
        self._permits = BURST
        self._now = now

    def take(self, *, now: float) -> bool:
        """Takes a permit; False where there is none. ``now``: monotonic, in seconds."""
        self._permits = min(BURST, self._permits + (now - self._now) * REQUESTS_A_SECOND)
        self._now = now
        if self._permits < 1:
            return False
        self._permits -= 1
        return True
