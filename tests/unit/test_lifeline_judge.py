"""Which rank is named, given what rank 0 knows; and messages that make no sense."""

from __future__ import annotations

import socket

import pytest

from meft_engine.parallel.judge import Judge
from meft_engine.parallel.wire import Peer, Place, decode, decode_place


@pytest.mark.parametrize(
    "position, inside, held",
    [
        ("5", "true", "1.0"),
        ("null", "true", "1.0"),
        ("[1.5]", "true", "1.0"),
        ('["a"]', "true", "1.0"),
        ("[[1]]", "true", "1.0"),
        ("[true]", "true", "1.0"),
        ("[1]", "1", "1.0"),
        ("[1]", "true", "NaN"),
        ("[1]", "true", "-1.0"),
        ("[1]", "true", "Infinity"),
        ("[1]", "true", "true"),
    ],
)
def test_place_that_makes_no_sense_is_none(position: str, inside: str, held: str) -> None:
    line = '{{"kind": "beat", "position": {}, "inside": {}, "held": {}}}'
    assert decode_place(decode(line.format("[1, 2]", "true", "1.0").encode()), 9.0) == Place((1, 2), True, 8.0)
    assert decode_place(decode(line.format(position, inside, held).encode()), 9.0) is None


def judged(own: tuple, *others: tuple) -> str | None:
    """What rank 0 says, after 10 s, of places (position, inside, since); the limit is 7 s."""
    judge = Judge(0, [f"rank {i}" for i in range(9)], limit=7.0, beat=1.0, age=lambda moment: 10.0 - moment)
    pair = socket.socketpair()  # stands for every connection
    peers = {rank: Peer(rank, pair[0]) for rank in range(1, len(others) + 1)}
    for peer, place in zip(peers.values(), others, strict=True):
        peer.place, peer.heard_at = Place(*place), 10.0
    judge.look(peers, Place(*own), 10.0)
    for end in pair:
        end.close()
    return judge.verdict(10.0)


def test_who_is_named_by_places() -> None:
    ahead, behind, long, short = (5, 1), (5, 0), 0.0, 5.0
    assert judged((ahead, True, long), (behind, False, long)).startswith("rank 1 has not come beyond (5, 0) for 10.0 s")
    assert judged((behind, True, long), (ahead, True, long)).startswith("rank 0 has not come beyond (5, 0)")
    assert judged((ahead, True, long), ((), False, long)).startswith("rank 1 has not begun for 10.0 s")
    assert judged((ahead, False, long), (behind, True, long)) is None  # nobody waits
    assert judged((ahead, True, short), (behind, False, long)) is None  # not for long
    assert judged((ahead, True, long), (behind, False, short)) is None  # it is slow
    assert judged((ahead, True, long), (ahead, True, long)) is None  # all are
    assert judged((ahead, True, long), (behind, True, long), ((4, 9), True, short)) is None  # rank 1 may wait itself
    both = judged((ahead, True, long), (behind, False, long), ((4, 9), True, long), ((4, 9), False, long))
    assert both.count("has not") == 2 and "rank 2 has not" in both and "rank 3 has not" in both


def test_message_names_no_more_than_a_few() -> None:
    names = [f"rank {i}" for i in range(1000)]
    judge = Judge(0, names, limit=7.0, beat=1.0, age=lambda moment: 10.0)
    judge.look({rank: Peer(rank, None) for rank in range(1, 1000)}, Place((), False, 0.0), 10.0)
    verdict = judge.verdict(10.0)
    assert verdict.count("has not connected") == 8
    assert verdict.endswith("; 991 others are lost too; stopping. The last checkpoint is as it was written.")
