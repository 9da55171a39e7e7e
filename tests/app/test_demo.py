from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from app import demo
from app.demo import DemoFailed, devices, run_demo, table


@pytest.fixture
def url(make_app: Callable[..., FastAPI]) -> Iterator[str]:
    app = make_app()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_three_devices_get_three_models_that_search_together(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TEST_IDENTITIES", 4)
    report = run_demo(url)
    assert "Chain pico: 8 queries, 32 gallery images" in report
    for words in ("battery camera", "street camera", "edge box", "max_macs", "max_artifact_bytes", "max_memory_bytes"):
        assert words in report
    widths = [line.split()[0] for line in report.splitlines() if re.match(r"\s*\dx2-4-8 ", line)]
    assert widths == ["2x2-4-8", "6x2-4-8", "8x2-4-8"]


def test_limits_are_exactly_what_the_frontier_says() -> None:
    costs = [{"macs": n, "artifact_bytes": 10 * n, "memory_bytes_bound": 100 * n} for n in (1, 2, 3)]
    found = devices({"widths": [{"costs": cost} for cost in costs]})
    assert [(device.limit, device.allowed) for device in found] == [
        ("max_macs", 1),
        ("max_artifact_bytes", 20),
        ("max_memory_bytes", 300),
    ]


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "file:///etc/passwd", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(DemoFailed, match="no http URL"):
        run_demo(url)


def test_the_service_s_own_words_are_passed_on(url: str) -> None:
    device: Any = demo.Device("tiny", "max_macs", 1)
    with pytest.raises(DemoFailed, match=r"422: no student of chain"):
        demo.fetch(url, device)


def test_columns_line_up() -> None:
    assert table([["a", "bb"], ["ccc", "d"]]) == "  a  bb\n-------\nccc   d"
