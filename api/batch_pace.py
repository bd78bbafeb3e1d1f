"""How many lines of one API key are under way at a time: as many as its limits let through."""

import math
import time
from dataclasses import dataclass

_SOON_S = 1.0
"""A refusal that says so means that jobs under way hold the room."""
_SHORTEST_S, _LONGEST_S = 2.0, 60.0


@dataclass(slots=True)
class Pace:
    """Grows by one line with each round of answers, and falls back to what runs when the limits refuse a line. So
    at most a few refusals are asked for, and other callers of the key meet the limits no sooner for them."""

    most: float = math.inf
    num_sent: int = 0
    """Lines that somebody is busy with, accepted or not."""
    num_accepted: int = 0
    not_before: float = 0.0
    """time.monotonic()."""

    @property
    def has_room(self) -> bool:
        return self.num_sent < self.most and time.monotonic() >= self.not_before

    def start_anew(self) -> None:
        """The limits are other ones."""
        self.most, self.not_before = math.inf, 0.0

    def answered(self) -> None:
        self.most += 1 / self.most

    def refused(self, retry_after_s: float) -> None:
        """Wait as long as told; where the room is held by lines of ours, until one of them ends."""
        self.most = max(self.num_accepted, 1)
        if not self.num_accepted or retry_after_s > _SOON_S:
            self.not_before = time.monotonic() + min(max(retry_after_s, _SHORTEST_S), _LONGEST_S)
