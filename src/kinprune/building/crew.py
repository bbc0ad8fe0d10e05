"""Who prunes the source tasks of a build: this process, several beside it, or a cluster (``cluster.py``)."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from threading import Thread
from typing import Protocol

from kinprune.backbones import Backbone
from kinprune.bank import Bank, open_bank
from kinprune.bank.backbone import load_bank_backbone
from kinprune.building.sources import Place
from kinprune.building.work import Outcome, Work, do
from kinprune.errors import BankError
from kinprune.pruning import OnStep
from kinprune.tasks.task import Labelled

LOST = (
    "a worker of the build was lost (killed, or out of memory); what was done is in the bank: run the same build again "
    "to go on, with fewer --workers if memory was short"
)


class Crew(Protocol):
    """Workers. A build begins as many tasks as there is room for, and asks for those that are finished."""

    def room(self) -> int:
        """How many more tasks can be begun now."""
        ...

    def begin(self, work: Work) -> None:
        """Give a task to a worker."""
        ...

    def finished(self, seconds: float) -> list[tuple[Work, Outcome]]:
        """Wait for tasks to be finished, so long at most, and give them; BankError where a worker was lost."""
        ...

    def close(self) -> None:
        """Stop all that is under way; nothing is begun any more."""
        ...


class Alone:
    """No other process: one task after the other, ``finished`` does the work."""

    def __init__(self, bank: Bank, images: Mapping[Place, Labelled], on_step: OnStep | None) -> None:
        self.bank, self.images, self.on_step = bank, images, on_step
        self.work: Work | None = None

    def room(self) -> int:
        return 0 if self.work else 1

    def begin(self, work: Work) -> None:
        self.work = work

    def finished(self, seconds: float) -> list[tuple[Work, Outcome]]:
        work, self.work = self.work, None
        assert work is not None
        images = self.images[work.source.place]
        return [(work, do(work, images, self.bank.header, partial(_backbone, self.bank), self.on_step))]

    def close(self) -> None:
        pass


class Processes:
    """``workers`` processes of this machine."""

    def __init__(self, bank: Bank, workers: int) -> None:
        self.address, self.workers = bank.address, workers
        self.pool = ProcessPoolExecutor(workers, _context(), _begin_worker)
        self.under_way: dict[Future[Outcome], Work] = {}

    def room(self) -> int:
        return self.workers - len(self.under_way)

    def begin(self, work: Work) -> None:
        try:
            self.under_way[self.pool.submit(_in_worker, self.address, work)] = work
        except BrokenProcessPool as error:
            raise BankError(LOST) from error

    def finished(self, seconds: float) -> list[tuple[Work, Outcome]]:
        done = wait(self.under_way, seconds, FIRST_COMPLETED).done
        # What was done comes first: a worker that was lost beside it is told the next time.
        whole = [future for future in done if future.exception() is None] or done
        try:
            return [(self.under_way.pop(future), future.result()) for future in whole]
        except BrokenProcessPool as error:
            raise BankError(LOST) from error

    def close(self) -> None:
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(10)


def _context() -> BaseContext:
    """How workers start: never as forks of this process, for torch's thread pool does not survive that.

    Where the system can, they are forks of a process that has loaded the libraries and computed nothing yet: that
    saves each worker the seconds and the memory of loading them.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _begin_worker() -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the builder, and end when the builder does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    builder = parent_process()
    assert builder is not None

    def follow() -> None:
        builder.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _in_worker(address: str, work: Work) -> Outcome:
    import torch

    torch.set_num_threads(work.threads)
    bank = _bank(address)
    return do(work, _images(work.source.place), bank.header, partial(_backbone, bank))


@lru_cache(maxsize=1)
def _bank(address: str) -> Bank:
    return open_bank(address)


@lru_cache(maxsize=4)
def _backbone(bank: Bank, num_classes: int) -> Backbone:
    return load_bank_backbone(bank, num_classes)


@lru_cache(maxsize=16)
def _images(place: Place) -> Labelled:
    """Of a worker, which lives as long as one build."""
    return place.open()
