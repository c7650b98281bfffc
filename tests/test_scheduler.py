"""The order in which requests are read and continued."""

import random

import pytest

from nanochat.eval.scheduler import QueueFull, Scheduler, Work


def test_requests_get_slots_in_the_order_in_which_they_came():
    scheduler = Scheduler(slots=2, queue=3, piece=4)
    works = [Work(ticket, n_prompt=1) for ticket in range(4)]
    for work in works[:3]:
        scheduler.add(work)
    with pytest.raises(QueueFull, match="3 requests wait"):
        scheduler.add(works[3])
    assert scheduler.admit() == works[:2] and scheduler.admit() == []
    assert [work.slot for work in works] == [0, 1, None, None]
    scheduler.add(works[3])
    assert scheduler.remove(0) is works[0] and scheduler.remove(0) is None
    assert scheduler.admit() == [works[2]] and works[2].slot == 0


def test_a_prompt_is_read_in_pieces_that_end_at_multiples():
    scheduler = Scheduler(slots=2, queue=2, piece=4)
    # of the second, 3 tokens are known from another request
    scheduler.add(Work(0, n_prompt=10))
    scheduler.add(Work(1, n_prompt=6, n_read=3))
    scheduler.admit()
    pieces = []
    while piece := scheduler.next_piece():
        work, first, end = piece
        pieces.append((work.ticket, first, end, scheduler.read(work, end)))
    assert pieces == [
        (0, 0, 4, False),
        (0, 4, 8, False),
        (0, 8, 10, True),
        (1, 3, 4, False),
        (1, 4, 6, True),
    ]
    assert list(scheduler.continued) == [0, 1]


@pytest.mark.parametrize("where", ["waiting", "reading", "continued"])
def test_a_request_can_be_taken_out_anywhere(where):
    scheduler = Scheduler(slots=1, queue=2, piece=4)
    scheduler.add(Work(7, n_prompt=2))
    if where != "waiting":
        scheduler.admit()
    if where == "continued":
        scheduler.read(scheduler.next_piece()[0], 2)
    assert scheduler.idle == (where == "waiting")
    assert scheduler.remove(7).ticket == 7
    assert scheduler.idle and scheduler.next_piece() is None and not scheduler.waiting
    scheduler.add(Work(8, n_prompt=1))
    assert scheduler.admit()[0].slot == 0


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_events_keeps_the_books(seed):
    """No slot is given twice or lost, and everyone is served."""
    rng = random.Random(seed)
    scheduler = Scheduler(slots=3, queue=5, piece=4)
    alive, served, ticket = set(), set(), 0
    for _ in range(2000):
        event = rng.random()
        if event < 0.3 and len(scheduler.waiting) < 5:
            scheduler.add(Work(ticket, n_prompt=rng.randint(1, 11)))
            alive.add(ticket)
            ticket += 1
        elif event < 0.4 and alive:
            gone = rng.choice(sorted(alive))
            assert scheduler.remove(gone).ticket == gone
            alive.remove(gone)
        elif event < 0.9:
            scheduler.admit()
            if piece := scheduler.next_piece():
                work, _, end = piece
                if scheduler.read(work, end):
                    served.add(work.ticket)
        elif scheduler.continued:
            done = rng.choice(sorted(scheduler.continued))
            scheduler.remove(done)
            alive.remove(done)
        held = [work.slot for work in (*scheduler.reading, *scheduler.continued.values())]
        assert sorted(held + scheduler.free) == [0, 1, 2]
        assert len(alive) == len(held) + len(scheduler.waiting)
    assert len(served) > 100
