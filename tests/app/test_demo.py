from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from app import demo
from app.cli import main
from app.demo import DemoFailed, devices, run_demo, table


@pytest.fixture
def make_url(make_app: Callable[..., FastAPI]) -> Iterator[Callable[..., str]]:
    """Where a service with these settings runs."""
    running = []

    def make(**settings: object) -> str:
        server = uvicorn.Server(uvicorn.Config(make_app(**settings), port=0, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield make
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture
def url(make_url: Callable[..., str]) -> str:
    return make_url()


def test_three_devices_get_three_models_that_search_together(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TEST_IDENTITIES", 4)
    report = run_demo(url)
    assert "Chain pico: 8 queries, 32 gallery images" in report
    for words in ("battery camera", "street camera", "edge box", "max_macs", "max_artifact_bytes", "max_memory_bytes"):
        assert words in report
    widths = [line.split()[0] for line in report.splitlines() if re.match(r"\s*\dx2-4-8 ", line)]
    assert widths == ["2x2-4-8", "6x2-4-8", "8x2-4-8"]


def test_a_service_that_asks_for_a_key_gets_it(
    make_url: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TEST_IDENTITIES", 4)
    key = "k" * 40
    url = make_url(auth="keys", admin_key=key)
    with pytest.raises(DemoFailed, match="401: this needs an API key"):
        run_demo(url)
    monkeypatch.setenv("WIDTHWISE_KEY", key)
    monkeypatch.setattr(sys, "argv", ["widthwise", "demo", "--url", url])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "battery camera" in capsys.readouterr().out
    assert "battery camera" in run_demo(url, key)


@pytest.mark.parametrize("key", ["line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(DemoFailed, match="no header can carry"):
        run_demo("http://127.0.0.1:9", key)


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
