import gc
import weakref

import pytest

from service import heap


class Circle:
    def __init__(self):
        self.itself = self


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_what_is_in_use_is_left_out_of_later_rounds():
    heap.settle()
    assert gc.get_freeze_count() > 1000


def test_what_refers_to_itself_alone_is_dropped_though_it_was_left_out_before():
    circle = Circle()
    gone = weakref.ref(circle)
    heap.settle()
    del circle
    gc.collect()
    assert gone() is not None  # nobody looks there any more
    heap.settle()
    assert gone() is None
