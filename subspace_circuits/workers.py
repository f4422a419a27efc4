"""Processes that help, and that end with the one that they help. It imports nothing else, so that a worker is bound to
its parent before it imports torch."""
import os, signal, threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait

__all__ = ["in_workers"]


def _bind():
    "End when the parent has ended, however that was; leave Ctrl-C to it."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    def watch():
        wait([parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _no_interrupt():
    "Start processes that Ctrl-C does not reach: a terminal sends it to all of them. Python sets it in its main thread."
    main = threading.current_thread() is threading.main_thread()
    before = main and signal.signal(signal.SIGINT, signal.SIG_IGN)
    try: yield
    finally: main and signal.signal(signal.SIGINT, before)


def in_workers(jobs: list[tuple[Callable, tuple]], n: int = 2) -> Iterator:
    "Call functions in processes of their own, `n` at a time, and yield what they return; broken off, they end at once."
    others, pool = set(active_children()), ProcessPoolExecutor(n, get_context("spawn"), _bind)
    try:
        with _no_interrupt(): futures = [pool.submit(f, *args) for f, args in jobs]
        for o in as_completed(futures): yield o.result()
    except BrokenProcessPool:
        raise ValueError("a worker was ended from outside, most often for want of memory: make room, and the same "
                         "command continues") from None
    finally:
        if any(not o.done() for o in futures):
            for o in set(active_children()) - others: o.kill()
        pool.shutdown(cancel_futures=True)
