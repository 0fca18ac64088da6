"""Which rank is lost, from what one rank knows of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from meft_engine.parallel.wire import Peer, Place

_GATHER = 0.2  # seconds in which further deaths belong to the first; shorter than launchers take to end the others
_MAX_NAMED = 8  # ranks in one message


class Judge:
    """Gathers what befell ranks and says whom to name.

    Args:
        rank: of this process. Rank 0 hears of all places; the others know only their own, and whether rank 0 has ended.
        names: what messages call each rank.
        limit: seconds of silence or of delay after which a rank is lost.
        beat: seconds between two signs of life.
        age: seconds since a moment (of ``time.monotonic``) in which this process was awake.
    """

    def __init__(
        self, rank: int, names: Sequence[str], limit: float, beat: float, age: Callable[[float], float]
    ) -> None:
        self._rank, self._names, self._limit, self._beat, self._age = rank, names, limit, beat, age
        self._losses: dict[int, tuple[str, bool]] = {}  # what befell whom, and whether those are its own words
        self._due = math.inf
        self.delay = 0.0  # seconds from the fault to the verdict

    def died(self, rank: int, now: float) -> None:
        """The connection of ``rank`` ended without a goodbye."""
        self._lose(rank, "died", now + _GATHER)

    def failed(self, rank: int, text: str, now: float) -> None:
        """An exception ended ``rank``, by its own words."""
        self._lose(rank, f"ended with {text}", now + _GATHER, own_words=True)

    def lost_its_lifeline(self, rank: int, error: Exception, now: float) -> None:
        """The thread that watches in ``rank`` failed."""
        self._lose(rank, f"has lost its lifeline ({error!r})", now)

    def look(self, peers: Mapping[int, Peer], own_place: Place, now: float) -> None:
        """Look for ranks that are silent or stay behind, unless one is lost already."""
        if not self._losses:
            self._look_for_silence(peers, now)
        if not self._losses:
            self._compare_places(peers, own_place, now)

    def verdict(self, now: float) -> str | None:
        """The message that names the lost; ``None`` while there is none, or while further losses may come."""
        if now < self._due:
            return None
        first, _ = next(iter(self._losses.values()))
        # Ranks in which a collective fails because another one has died end with an exception too.
        named = [
            f"{self._names[rank]} {what}" for rank, (what, own) in self._losses.items() if not own or what == first
        ]
        more = f"; {len(named) - _MAX_NAMED} others are lost too" if len(named) > _MAX_NAMED else ""
        return f"{'; '.join(named[:_MAX_NAMED])}{more}; stopping. The last checkpoint is as it was written."

    def _lose(self, rank: int, what: str, due: float, *, own_words: bool = False) -> None:
        if rank not in self._losses:
            self._losses[rank] = (what, own_words)
            self._due = min(self._due, due)

    def _give_up(self, rank: int, what: str, now: float) -> None:
        self.delay = self._limit
        self._lose(rank, what, now)

    def _look_for_silence(self, peers: Mapping[int, Peer], now: float) -> None:
        silent = {rank: self._age(peer.heard_at) for rank, peer in peers.items() if peer.ended_at is None}
        if max(silent.values(), default=0.0) <= self._limit:
            return
        for rank, age in silent.items():
            # The last beats of those that were lost with one host came within a beat of each other.
            if age <= self._limit - 2 * self._beat:
                continue
            what = f"has given no sign of life for {age:.1f} s: it hangs, or its host cannot be reached"
            if peers[rank].connection is None:
                what = f"has not connected to {self._names[0]} for {age:.1f} s"
            self._give_up(rank, what, now)

    def _compare_places(self, peers: Mapping[int, Peer], own_place: Place, now: float) -> None:
        places = {self._rank: own_place}
        if self._rank == 0:
            places |= {rank: peer.place for rank, peer in peers.items() if peer.connection is not None}
        waiting = [place for place in places.values() if place.inside and self._age(place.since) > self._limit]
        if not waiting:
            return
        farthest = max(waiting)
        for rank, peer in peers.items():
            # One that has left the place where the others still are is not what they wait for.
            behind = (peer.place.position, not peer.place.inside) <= (farthest.position, False)
            if behind and peer.ended_at is not None and self._age(peer.ended_at) > self._limit:
                self._give_up(rank, "has ended, while others wait for it", now)
        hindmost = min(place.position for place in places.values())
        for rank, place in places.items():
            held = self._age(place.since)
            if place.position == hindmost < farthest.position and held > self._limit:
                done = f"come beyond {place}" if hindmost else "begun"
                self._give_up(rank, f"has not {done} for {held:.1f} s, while others wait for it at {farthest}", now)
