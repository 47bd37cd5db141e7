"""One experiment on one machine: Flower's simulation, with a Ray actor a core, while this process goes on being the server."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for name, value in QUIET.items():  # before Flower and Ray read them: nothing is reported to anybody
    os.environ.setdefault(name, value)

from flwr.app import Context  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402

from fedgc.errors import WorkFailedError  # noqa: E402

END_SECONDS = 20.0


@contextmanager
def simulated_grid(app: ClientApp, nodes: int) -> Iterator[tuple[Grid, Callable[[], None]]]:
    """A grid to that many nodes, each of which runs ``app``, and a function that raises where the simulation has ended.

    Every process of it is gone when the block is left, however it is left. Raises WorkFailedError where it cannot be started.
    """
    import ray

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what a node reports is in its answer
    handed: queue.Queue[Grid | None] = queue.Queue()
    done = threading.Event()
    failure: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        handed.put(grid)
        done.wait()

    def run() -> None:
        from flwr.simulation import run_simulation

        cores = os.cpu_count() or 1
        backend: Any = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": min(cores, nodes), "logging_level": logging.CRITICAL, "log_to_driver": False},
        }
        try:
            run_simulation(server, app, nodes, backend_config=backend)
        except BaseException as error:
            failure.append(error)
        finally:
            handed.put(None)
            done.set()

    def check() -> None:
        _take_signals_back()  # at every look, since Ray starts at its own time
        if done.is_set():
            raise _ended(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        grid = handed.get()
        if grid is None:
            raise _ended(failure)
        yield grid, check
    finally:
        done.set()
        thread.join(END_SECONDS)
        ray.shutdown()


def _ended(failure: list[BaseException]) -> WorkFailedError:
    return WorkFailedError(f"Flower's simulation has ended: {failure[0] if failure else 'no reason was given'}")


def _take_signals_back() -> None:
    """Ray has put a handler of its own, which prints a stack, before the one that this process has."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not None:
                signal.signal(number, handler)
