"""What a worker does beside its jobs, now and then: garbage is collected, deleted data sets leave its disk."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from threading import Event

import structlog

from app.actor import WORKER
from app.db.session import Database
from app.errors import DatabaseUnavailable, StorageUnavailable
from app.services.garbage import Garbage
from app.settings import Settings
from app.worker.datasets import drop_unowned

EVERY_S = 300.0  # between looks; whether garbage is collected then is decided by the time of the last collection
_log = structlog.get_logger(__name__)


class Housekeeping:
    """Looks after what no job does. Nothing that goes wrong here ends the worker; being killed in it does no harm."""

    def __init__(self, settings: Settings, database: Database, garbage: Garbage) -> None:
        self._settings = settings
        self._database = database
        self._garbage = garbage

    def run(self, ended: Event) -> None:
        """About every `EVERY_S` seconds until `ended`; the first time after that long. Begins nothing once it has."""
        # Workers that were started together must not all look at once: about one of them is to collect.
        while not ended.wait(EVERY_S * random.uniform(0.75, 1.25)):  # noqa: S311 - no secret
            self.tidy(ended)

    def tidy(self, ended: Event) -> None:
        """Once, now."""
        for task in (self._drop_data_sets, self._collect_garbage):
            if not ended.is_set():
                _attempted(task)

    def _drop_data_sets(self) -> None:
        if gone := drop_unowned(self._settings, self._database):
            _log.info("removed data sets that are gone", folders=gone)

    def _collect_garbage(self) -> None:
        if self._settings.gc_interval_h > 0:
            self._garbage.collect_if_due(WORKER, timedelta(hours=self._settings.gc_interval_h))


def _attempted(task: Callable[[], None]) -> None:
    try:
        task()
    except (DatabaseUnavailable, StorageUnavailable) as error:
        _log.warning("housekeeping waits for the next time", reason=str(error))
    except Exception:
        _log.exception("a mistake in housekeeping")
