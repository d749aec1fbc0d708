"""Progress told to a URL about once a second, from a thread of its own: it never holds up a job or makes it fail."""

from __future__ import annotations

import base64
import json
import logging
import queue
import threading
import time
from collections.abc import Collection
from typing import Any

from ...backend.net import Access, Limits, post
from ...backend.urls import check_url
from ...core.images import preview_jpeg
from ...errors import DownloadError
from ...results import Progress

EVERY_SECONDS = 1.0
POST_SECONDS = 5.0  # that one may take
CLOSE_SECONDS = 0.8  # that an answer waits for the last one
MAX_FAILURES = 3

log = logging.getLogger(__name__)


class Postback:
    """POSTs the latest progress of a job as JSON: ``status``, ``stage``, ``step``, ``steps``, ``progress`` (0 to 1),
    ``eta_seconds``, ``image_index``, ``image_count``, and ``preview``, a data URL of a JPEG, where there is one.

    Args:
        allow: ``host:port`` entries that may be private and may do without https.

    Raises:
        InvalidURLError, BlockedURLError: the URL may not be asked.
    """

    def __init__(self, url: str, allow: Collection[str] = ()) -> None:
        check_url(url, allow)
        self._url, self._access = url, Access(allow)
        self._limits = Limits(0, POST_SECONDS, POST_SECONDS)
        self._latest: tuple[str, Progress | None]
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # of the latest: who puts may be interrupted anywhere
        self._preview: Any = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="postback", daemon=True)
        self._thread.start()

    def tell(self, progress: Progress) -> None:
        """Take note of where the job is; what was not sent yet is dropped for it."""
        self._preview = progress.preview or self._preview
        self._put(("processing", progress))

    def close(self, status: str) -> None:
        """Send the last word, as far as that takes less than a second."""
        self._put((status, None))
        self._ended.set()
        self._thread.join(CLOSE_SECONDS)

    def _put(self, item: tuple[str, Progress | None]) -> None:
        self._latest = item
        self._news.put(None)

    def _get(self) -> tuple[str, Progress | None]:
        """The latest, once there is any that was not sent."""
        self._news.get()
        while not self._news.empty():
            self._news.get()
        return self._latest

    def _run(self) -> None:
        failures = 0
        while failures < MAX_FAILURES:
            status, progress = self._get()
            failures = 0 if self._send(status, progress) else failures + 1
            if progress is None:
                return
            self._ended.wait(EVERY_SECONDS)
        log.warning("postback_url is given up for this job after %d failures in a row", failures)

    def _send(self, status: str, progress: Progress | None) -> bool:
        body = {"status": status, "progress": 1.0 if progress is None else progress.fraction, "time": time.time()}
        if progress is not None:
            fields = {"stage", "step", "steps", "eta_seconds", "image_index", "image_count"}
            body |= progress.model_dump(include=fields)
        try:
            body["preview"] = None if self._preview is None else _data_url(self._preview)
            answer = post(self._url, json.dumps(body).encode(), "application/json", self._limits, self._access)
        except (DownloadError, OSError) as error:
            log.warning("postback_url: %s", error)
            return False
        return answer < 400


def _data_url(picture: Any) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(preview_jpeg(picture)).decode()
