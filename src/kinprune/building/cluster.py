"""A Ray cluster as a build's workers: each source task is one Ray task, which is run again where its machine is lost.

Images and backbone are put into Ray's object store once: the other machines need Kinprune and Ray, and no data, bank or
weights. What they make comes back to this process, which alone writes to the bank.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.backbones import Backbone
from kinprune.bank import Bank, Header
from kinprune.bank.backbone import build_backbone
from kinprune.building.sources import Place
from kinprune.building.work import Outcome, Work, do
from kinprune.errors import BankError
from kinprune.tasks.packing import pack_source
from kinprune.tasks.task import Labelled, Task

RETRIES = 5
"""How often a task is begun again whose machine or worker was lost."""

ANSWER_SECONDS = 10.0
"""How long a cluster's address may take to answer at all."""

READY_SECONDS = 10.0
"""How long a cluster may have no machine for a task before it is refused."""

_EXPECTED = "expected local, auto (the cluster that this machine is part of), HOST:PORT or ray://HOST:PORT"

_LOST = (
    f"a source task was begun {RETRIES + 1} times on the cluster, and its machine or worker was lost each time "
    "({error}); what was done is in the bank: look at 'ray status', give each task more with --task-cpus if memory was "
    "short, and run the same build again to go on"
)


@dataclass(frozen=True)
class Cluster:
    """Where Ray is, and what each source task takes of it.

    ``address``: ``local`` starts Ray on this machine for the time of the build; ``auto``, ``HOST:PORT`` and
    ``ray://HOST:PORT`` are clusters that run. ``gpus`` may be a part of one.
    """

    address: str
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.address not in ("local", "auto") and _socket(self.address) is None:
            raise BankError(f"'{self.address}' is no Ray cluster: {_EXPECTED}")
        if self.cpus < 1 or self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise BankError(
                f"{self.cpus} CPUs and {self.gpus:g} GPUs a task were asked for, expected at least 1 CPU, and a part "
                "of a GPU or whole ones"
            )


class OnCluster:
    """The workers of a cluster, which get the images of some tasks, by the place that they were taken of."""

    def __init__(
        self, cluster: Cluster, bank: Bank, opened: Mapping[Place, Labelled], tasks: Mapping[Place, Sequence[Task]]
    ) -> None:
        check_reachable(cluster)
        self.cluster = cluster
        self.ray = _import_ray()
        self.ours = not self.ray.is_initialized()
        if self.ours:
            _connect(self.ray, cluster.address)
        self.under_way: dict[Any, Work] = {}
        try:
            if not self._has_slots():
                raise BankError(
                    f"no machine of the cluster at {cluster.address} has {cluster.cpus} CPUs and {cluster.gpus:g} GPUs "
                    "for a task: lower --task-cpus or --task-gpus, or see 'ray status'"
                )
            content = np.frombuffer(bank.store.get(bank.header.backbone_weights), dtype=np.uint8)
            self.model = self.ray.put((bank.header, content))
            self.images = {place: self.ray.put(pack_source(opened[place], taken)) for place, taken in tasks.items()}
        except BaseException:
            self.close()
            raise
        remote = self.ray.remote(_in_task)
        self.remote = remote.options(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=RETRIES)

    def room(self) -> int:
        """So many that no worker waits for the next task, and few enough that the cluster holds no long queue."""
        slots = self._slots()
        return slots + 1 + slots // 8 - len(self.under_way)

    def begin(self, work: Work) -> None:
        self.under_way[self.remote.remote(work, self.images[work.source.place], self.model)] = work

    def finished(self, seconds: float) -> list[tuple[Work, Outcome]]:
        ready, _ = self.ray.wait(list(self.under_way), num_returns=1, timeout=seconds)
        return [(self.under_way.pop(one), self._get(one)) for one in ready]

    def close(self) -> None:
        for one in self.under_way:
            self.ray.cancel(one, force=True)
        if self.ours:
            self.ray.shutdown()

    def _get(self, one: Any) -> Outcome:
        exceptions = self.ray.exceptions
        try:
            outcome: Outcome = self.ray.get(one)
        except exceptions.RayTaskError as error:  # raised by the task itself
            raise getattr(error, "cause", None) or error from error
        except exceptions.RayError as error:
            raise BankError(_LOST.format(error=type(error).__name__)) from error
        return outcome

    def _has_slots(self) -> bool:
        """Whether any machine takes a task; one that has just come says a little later what it has."""
        until = time.monotonic() + READY_SECONDS
        while self._slots() < 1:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True

    def _slots(self) -> int:
        """How many tasks run at a time; machines come and go."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(_tasks_on(self.cluster, node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)


def _tasks_on(cluster: Cluster, cpus: float, gpus: float) -> int:
    by_cpus = int(cpus // cluster.cpus)
    if cluster.gpus == 0:
        return by_cpus
    by_gpus = int(gpus // cluster.gpus) if cluster.gpus >= 1 else int(gpus) * int(1 / cluster.gpus + 1e-9)
    return min(by_cpus, by_gpus)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers unless told not to
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what it will do anyway, or it warns each time
    try:
        import ray
    except ImportError as error:
        raise BankError(f"a cluster needs Ray, which is not here ({error}): pip install 'kinprune[ray]'") from error
    return ray


def check_reachable(cluster: Cluster) -> None:
    """Refuse, before any work, a cluster that cannot be there; BankError where Ray is missing or nothing answers."""
    _import_ray()
    where = _socket(cluster.address)
    if where is None:
        return
    try:
        with socket.create_connection(where, ANSWER_SECONDS):  # Ray itself would try for minutes
            return
    except OSError as error:
        raise _no_cluster(cluster.address, error) from error


def _connect(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options |= {"num_cpus": cores, "include_dashboard": False}
    _complain_on_stderr(ray)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from error


def _complain_on_stderr(ray: Any) -> None:
    """Ray prints what goes wrong on a cluster, such as a machine's end, on standard output, where results belong."""
    worker = ray._private.worker
    printed = getattr(worker, "print_to_stdstream", None)
    if printed is None or getattr(printed, "complains", False):  # another version's way, or done before
        return

    def complain(data: dict[str, Any], *given: Any, **more: Any) -> None:
        printed({**data, "is_err": True}, *given, **more)

    complain.complains = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = complain


def _no_cluster(address: str, error: Exception) -> BankError:
    first = str(error).strip().partition("\n")[0]
    return BankError(
        f"no Ray cluster can be used at {address} ({first}): start one with 'ray start --head', on the other machines "
        f"'ray start --address=HOST:6379'; {_EXPECTED}"
    )


def _socket(address: str) -> tuple[str, int] | None:
    """Host and port of an address that has them."""
    found = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[^\s:/]+):(\d{1,5})", address)
    return (found[1].strip("[]"), int(found[2])) if found and int(found[2]) < 2**16 else None


def _in_task(work: Work, images: Labelled, model: tuple[Header, NDArray[np.uint8]]) -> Outcome:
    """What a worker does; Ray has taken ``images`` and ``model`` from its store, without copying them."""
    import torch

    torch.set_num_threads(work.threads)
    header, content = model
    return do(work, images, header, partial(_backbone, header, content))


_backbones: dict[tuple[str, int], Backbone] = {}
"""Of a worker, which does one task after the other."""


def _backbone(header: Header, content: NDArray[np.uint8], num_classes: int) -> Backbone:
    key = (header.backbone, num_classes)
    if key not in _backbones:
        _backbones.clear()
        _backbones[key] = build_backbone(header, content.tobytes(), num_classes)
    return _backbones[key]
