"""The processes of a grid's cells on a cluster, by Ray (`pip install 'holdfast[ray]'`).

Ray only says where: a cell is the process that it is here, started by a Ray worker that has room, so the folder of the
cells must be one that every machine sees, and holdfast must be installed on each. A worker or a machine that dies takes
its cell's process with it; the sweep starts the cell again, and the run goes on from its last finished step.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.errors import ConfigError, RunError
from holdfast.experiment.cell_process import COMMAND, HereProcesses, StoppedError

LOCAL = "local"


class RayPlaces:
    """Places of a Ray cluster. address: of its head ("10.0.0.1:6379", "auto"), or "local" for one on this machine.

    cpus, gpus: that a cell reserves; a share of a GPU lets several cells have one. workers: CPUs of a local cluster, in
    cells; None: as many as it has room for.

    Raises: ConfigError: Ray is not installed, or a wrong amount. RunError: no cluster at the address.
    """

    def __init__(
        self,
        address: str = LOCAL,
        *,
        cpus: float = 1,
        gpus: float = 0,
        workers: int | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        if cpus <= 0 or gpus < 0:
            raise ConfigError(
                f"a cell reserves {cpus:g} CPUs and {gpus:g} GPUs; expected some CPU, and no GPU or more."
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        try:
            import ray
        except ImportError:
            raise ConfigError("Ray is not installed; pip install 'holdfast[ray]'.") from None
        self._ray: Any = ray
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
        if address == LOCAL:
            # Cells pass nothing through Ray's store of objects; by default it takes 30 % of the memory.
            options |= {"num_cpus": None if workers is None else max(1, round(workers * cpus))}
            options |= {"object_store_memory": 80 * 2**20}
        else:
            options = {"address": address, "log_to_driver": False, "configure_logging": False}
            _require_listener(address)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise RunError(f"No Ray cluster answers at {address!r}: {error}") from error
        remote = ray.remote(_cell)
        # The sweep counts retries itself: it tells a mistake from a death.
        self._cell = remote.options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
        self._command = command
        self._lock, self._stopped, self._waiting = threading.Lock(), False, set[Any]()

    def run(self, job: Mapping[str, Any]) -> tuple[int, str]:
        """(status, what it said on stderr) of one process on some worker. Raises: StoppedError."""
        with self._lock:
            if self._stopped:
                raise StoppedError
            asked = self._cell.remote(json.dumps(job), self._command)
            self._waiting.add(asked)
        try:
            status, said = self._ray.get(asked)
        except self._ray.exceptions.RayTaskError as error:
            # What the worker ran into before there was a process: no worker is lost.
            return 1, f"a Ray worker could not start it: {error.cause}"
        except self._ray.exceptions.RayError as error:
            return 1, f"its Ray worker is gone ({type(error).__name__})"
        finally:
            with self._lock:
                self._waiting.discard(asked)
        return int(status), str(said)

    def stop(self) -> None:
        """End the cells that run, and leave the cluster."""
        with self._lock:
            self._stopped = True
            waiting = list(self._waiting)
        for asked in waiting:
            self._ray.cancel(asked, force=True)
        self.close()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()


def _require_listener(address: str) -> None:
    """Raises RunError: nobody listens there. Ray itself ends the process where it cannot connect."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "//" in host:
        return  # "auto", or a client's address, which Ray answers for
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"No Ray cluster answers at {address!r}: {error}. `ray status` there says whether one runs."
        ) from None


def _cell(job: str, command: Sequence[str] | None) -> tuple[int, str]:
    """Runs on a worker. When the worker dies, the pipe to the process ends, and with it the process."""
    # The default is the worker's own interpreter, which may lie elsewhere than that of whoever asks.
    return HereProcesses(command or COMMAND).run(json.loads(job))


__all__ = ["LOCAL", "RayPlaces"]
