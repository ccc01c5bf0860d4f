"""Micro-batches that are built while the model has the one before."""

import threading
import weakref

import pytest

from llada_megatron.training.ahead import Ahead, builder


class Batch:
    def __init__(self, number: int) -> None:
        self.number, self.thread = number, threading.current_thread()

    def map(self, function):
        return self


def made(number: int, built: list[weakref.ref]) -> Batch:
    batch = Batch(number)
    built.append(weakref.ref(batch))
    return batch


def batches(count: int, built: list[weakref.ref], fails_at: int | None = None):
    for number in range(count):
        if number == fails_at:
            raise ValueError(f"no batch {number}")
        yield made(number, built)


@pytest.fixture(scope="module")
def thread():
    with builder() as executor:
        yield executor


def test_virtual_stages_get_the_same_batches_and_each_is_built_once_one_ahead(thread):
    built: list[weakref.ref] = []
    ahead = Ahead(batches(5, built), 5, 2, thread)  # type: ignore[arg-type]
    first, second = ahead.reader(), ahead.reader()
    taken = [next(first) for _ in range(3)]
    thread.submit(lambda: None).result()
    assert len(built) == 4  # those three and one ahead
    assert [next(second) for _ in range(3)] == taken
    assert [batch.number for batch in (*first, *second)] == [3, 4, 3, 4]
    assert len(built) == 5 and all(batch.thread is not threading.main_thread() for batch in taken)


def test_a_batch_is_let_go_when_the_last_reader_has_let_it_go(thread):
    built: list[weakref.ref] = []
    ahead = Ahead(batches(4, built), 4, 2, thread)  # type: ignore[arg-type]
    first, second = ahead.reader(), ahead.reader()
    for index in range(2):
        next(first)
        assert built[index]() is not None  # the second reader will want it
        next(second)
        assert built[index]() is None


def test_what_a_batch_cannot_be_built_for_reaches_the_reader(thread):
    ahead = Ahead(batches(4, [], fails_at=2), 4, 1, thread)  # type: ignore[arg-type]
    reader = ahead.reader()
    assert [next(reader).number for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="no batch 2"):
        next(reader)
