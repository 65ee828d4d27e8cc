"""The thread that all work of torch is done in: it steps the lanes in turn, and between steps does what it is told."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

from inference.serving.job import Failure, Job
from inference.serving.lane import Lane, Told

logger = logging.getLogger(__name__)
BROKE = Failure(500, "Drawing this answer failed; the server's log says why.")


class Worker:
    """`tell` is called in the worker's thread, after each step and each order."""

    def __init__(self, lanes: Sequence[Lane], tell: Callable[[Told], None]):
        self._lanes, self._tell = lanes, tell
        self._orders: SimpleQueue[Callable[[], Told]] = SimpleQueue()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the end of the step that is being done; jobs that are not over hear nothing more."""
        self._orders.put(self._stop)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, lane: Lane, job: Job) -> None:
        self._orders.put(lambda: lane.admit(job))

    def drop(self, lane: Lane, wanted: Callable[[Job], bool], failure: Failure) -> None:
        """The jobs that are `wanted` leave the lane before its next step and hear of the failure."""
        self._orders.put(lambda: lane.drop(wanted, failure))

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._round()
            except Exception:  # out of memory, or an error in a model's own code: ends the jobs, and not the server
                logger.exception("drawing failed; all answers that are on their way are given up")
                for lane in self._lanes:
                    self._tell(lane.drop_all(BROKE))

    def _round(self) -> None:
        """The orders that there are, then one step for each lane that has work."""
        for order in self._next_orders():
            self._tell(order())
        for lane in self._lanes:
            if not lane.is_idle:
                self._tell(lane.step())

    def _next_orders(self) -> Iterator[Callable[[], Told]]:
        """Those that there are; without anything else to do the thread waits for one."""
        if all(lane.is_idle for lane in self._lanes):
            yield self._orders.get()
        while True:
            try:
                yield self._orders.get_nowait()
            except Empty:
                return

    def _stop(self) -> Told:
        self._is_stopping = True
        return []
