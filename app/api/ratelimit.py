"""How often a caller may ask.

Two limits: of all requests, by API key or else by client address, in fixed windows; and of keys that were refused, by
client address, in a moving window. They are counted in this process's memory, or for all processes in the store that
`rate_limit_storage_url` names.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable
from typing import TypeVar

from anyio.to_thread import run_sync
from limits import RateLimitItem, parse
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, storage_from_string
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter

from app.errors import RateLimitsUnavailable, TooManyRequests
from app.redaction import redact

Found = TypeVar("Found")


class RateLimits:
    """Counts requests. Rates are written as `limits` reads them: `100/minute`.

    Raises `RateLimitsUnavailable` when the store's URL or its client library is no good; it is connected to when first
    asked.
    """

    def __init__(self, requests: str, failures: str, storage_url: str) -> None:
        try:
            storage = storage_from_string(storage_url, wrap_exceptions=True)
        except (ConfigurationError, ValueError) as error:
            raise RateLimitsUnavailable(
                f"WIDTHWISE_RATE_LIMIT_STORAGE_URL cannot be used: {redact(str(error))}"
            ) from error
        self._requests, self._failures = parse(requests), parse(failures)
        self._by_window, self._moving = FixedWindowRateLimiter(storage), MovingWindowRateLimiter(storage)
        self._is_local = isinstance(storage, MemoryStorage)

    async def count_request(self, caller: str) -> None:
        """Raises `TooManyRequests` when `caller` has no request left, and `RateLimitsUnavailable`."""
        await self._run(lambda: _take(self._by_window, self._requests, "request", caller))

    async def count_failure(self, address: str) -> None:
        """One more refused key from there. Raises `RateLimitsUnavailable`."""
        await self._run(lambda: self._moving.hit(self._failures, "failure", address))

    async def check_failures(self, address: str) -> None:
        """Raises `TooManyRequests` when too many keys from there were refused, and `RateLimitsUnavailable`."""
        await self._run(lambda: _check(self._moving, self._failures, "failure", address))

    async def _run(self, count: Callable[[], Found]) -> Found:
        """Memory is asked here and now, in microseconds; a store over the network in a worker thread."""
        try:
            return count() if self._is_local else await run_sync(count)
        except StorageError as error:
            raise RateLimitsUnavailable(f"the store of the rate limits failed: {error}") from error


def bucket_of(address: str) -> str:
    """What stands for one client: an IPv4 address, or the /64 that one IPv6 client has to itself."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)


def _take(limiter: RateLimiter, limit: RateLimitItem, *who: str) -> None:
    if not limiter.hit(limit, *who):
        raise _refusal(limiter, limit, *who)


def _check(limiter: RateLimiter, limit: RateLimitItem, *who: str) -> None:
    if not limiter.test(limit, *who):
        raise _refusal(limiter, limit, *who)


def _refusal(limiter: RateLimiter, limit: RateLimitItem, *who: str) -> TooManyRequests:
    wait_s = limiter.get_window_stats(limit, *who).reset_time - time.time()
    return TooManyRequests(str(limit), max(1, math.ceil(wait_s)))
