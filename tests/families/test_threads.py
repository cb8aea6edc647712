"""Threads of PyTorch while several threads encode pictures."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from antgmm_jax.families.common.square import one_thread


def test_torch_has_its_threads_again_after_several_callers():
    """The first caller leaves while the second one is inside, which must not take 1 for the number before."""
    torch = pytest.importorskip("torch")
    before, inside, left = torch.get_num_threads(), threading.Event(), threading.Event()
    torch.set_num_threads(3)
    try:

        def first():
            with one_thread():
                inside.set()
                assert second_inside.wait(10)
                assert torch.get_num_threads() == 1
            left.set()
            return torch.get_num_threads()

        def second():
            assert inside.wait(10)
            with one_thread():
                second_inside.set()
                assert left.wait(10)
                assert torch.get_num_threads() == 1
            return torch.get_num_threads()

        second_inside = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            calls = pool.submit(first), pool.submit(second)
            assert [call.result() for call in calls] == [3, 3]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3  # of a thread that begins later
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
