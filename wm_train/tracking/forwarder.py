"""Send the record to MLflow from a thread, so that training never waits for a store."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable

from wm_train.tracking.mlflow_record import METRICS, MlflowRecord

EVERY_S = 2.0  # time between sendings, so that many steps share one call
RETRY_S, RETRY_LIMIT_S = 5.0, 60.0  # between attempts at a store that does not answer; doubles


class Forwarder:
    """Call `catch_up` every EVERY_S in a thread, and again after a failure.

    Only `close` waits for it.
    """

    def __init__(self, record: MlflowRecord, report: Callable[[str], None]) -> None:
        self.record, self.report = record, report
        self._ended = threading.Event()
        self._status = "FAILED"
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, status: str, timeout_s: float) -> None:
        """Send the rest and the end, or report the number of missing steps after `timeout_s`."""
        self._status = status
        self._ended.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._say_missing("did not answer in time")

    def _say_missing(self, why: str) -> None:
        self.report(
            f"MLflow at {self.record.shown_uri} {why}: {self.record.missing()} steps are in"
            f" {self.record.folder / METRICS} only."
            f" Fix: python -m wm_train.tracking replay {shlex.quote(str(self.record.folder))}"
        )

    def _run(self) -> None:
        pause, failed = EVERY_S, ""
        while True:
            ended = self._ended.wait(pause)
            try:
                steps = self.record.catch_up(self._status if ended else None)
                if failed:
                    self.report(
                        f"MLflow at {self.record.shown_uri} answers again; {steps} steps were sent"
                    )
                pause, failed = EVERY_S, ""
            # any failure of a tracking store, of whatever library, must not stop training
            except Exception as error:
                self.record.forget()
                pause = min(2 * pause, RETRY_LIMIT_S) if failed else RETRY_S
                if not failed and not ended:
                    self.report(
                        f"MLflow at {self.record.shown_uri} failed, the run goes on without it"
                        f" ({self.record.first_line(error)}). Every figure is in"
                        f" {self.record.folder / METRICS} and is sent when the store answers"
                    )
                failed = self.record.first_line(error)
            if ended:
                if failed:
                    self._say_missing(f"failed ({failed})")
                return
