"""Memory of tensors that come and go is used again, and never while anything of them is alive."""

from __future__ import annotations

import gc
import threading

import torch

from meft_engine.offload.memory import ReusedMemory


def test_the_same_memory_serves_again_once_nothing_refers_to_it():
    memory = ReusedMemory()
    first = memory.empty(1000, 576).fill_(3)
    place, part = first.data_ptr(), first[10:20].view(-1)
    del first
    second = memory.empty(1000, 576).fill_(4)
    assert second.data_ptr() != place and bool((part == 3).all())
    del part
    assert memory.empty(900, 576).data_ptr() == place


def test_sizes_that_are_no_longer_asked_for_go_back():
    memory = ReusedMemory()
    for _ in range(3):
        for rows in (10_000, 1_000, 100):
            del_me = memory.empty(rows, 577)
            assert del_me.shape == (rows, 577) and del_me.dtype == torch.float32 and del_me.is_contiguous()
            del del_me
    assert len(memory._free) <= 2
    assert memory.empty(0, 5).shape == (0, 5)


def test_many_threads_and_cycles():
    """No two live tensors share memory, also where they only die in a collection of garbage."""
    memory, wrong = ReusedMemory(), []

    def work(number: int) -> None:
        for turn in range(100):
            mine = memory.empty(1 + turn % 7, 1000).fill_(number)
            cycle = [mine]
            cycle.append(cycle)
            if not bool((mine == number).all()):
                wrong.append(number)
            del mine, cycle
            if turn % 25 == 0:
                gc.collect()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
