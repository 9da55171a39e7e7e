"""API keys: who is it, and may they come in.

A key reads `ww_<id>_<secret>`. The id is public and names the key in logs and in the audit trail; the secret is 256
random bits, shown once, and kept as its sha256: with that many bits a slow hash would protect nothing more. Keys that
were looked up are remembered for `CACHE_S`, so that serving asks no database: a key revoked by another process works
for so long still.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import cast

import structlog
from structlog.contextvars import get_contextvars

from app.actor import Actor, Scope
from app.db.audit import Audit
from app.db.keys import ApiKeys
from app.db.session import Database
from app.db.tables import KeyRow
from app.errors import (
    DatabaseUnavailable,
    InvalidExpiry,
    InvalidPageToken,
    KeyNotActive,
    NoAdminKey,
    Unauthenticated,
    UnknownKey,
)

CACHE_S = 5.0
CACHED_KEYS = 10_000
LAST_USED_EVERY = timedelta(minutes=1)
DEFAULT_OVERLAP_S = 24 * 3600
MAX_OVERLAP_S = 30 * 24 * 3600
MAX_LIFETIME = timedelta(days=3660)
ANONYMOUS = "anonymous"
BOOTSTRAP = "admin-key"  # the actor of WIDTHWISE_ADMIN_KEY
NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$"
_ID = re.compile(r"[0-9a-f]{12}")
_KEY = re.compile(r"ww_(?P<id>[0-9a-f]{12})_(?P<secret>[0-9a-f]{64})")
_NOBODY = "0" * 64  # no secret has this sha256: unknown ids cost the same comparison as known ones
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class IssuedKey:
    """A new key and, this once, the text that works."""

    row: KeyRow
    key: str


@dataclass(frozen=True)
class Page:
    """Some keys in order of id, and the id to continue after (`None`: that was all)."""

    keys: Sequence[KeyRow]
    continue_after: str | None


@dataclass(frozen=True)
class _Remembered:
    id: str
    secret_sha256: str
    scope: Scope
    expires_at: datetime | None
    until: float  # of time.monotonic


class Keys:
    """Makes, lists, rotates, revokes and checks API keys.

    required: without, everybody is the admin `anonymous`. admin_key: one more admin key, which is stored nowhere.
    """

    def __init__(self, database: Database, *, required: bool, admin_key: str | None = None) -> None:
        self.required = required
        self._database = database
        self._admin_sha256 = _sha256(admin_key) if admin_key is not None else _NOBODY
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()
        self._lock = Lock()

    def authenticate(self, presented: str) -> Actor:
        """Whose key this is. Raises `Unauthenticated` and `DatabaseUnavailable`."""
        if hmac.compare_digest(_sha256(presented), self._admin_sha256):
            return _actor(BOOTSTRAP, "admin")
        return self.recall(presented) or self._look_up(presented)

    def recall(self, presented: str) -> Actor | None:
        """Whose key this is, if it was looked up in the last `CACHE_S`; `None` says nothing about the key."""
        key = self._remembered_key(presented)
        if key is None or key.until < time.monotonic() or _has_passed(key.expires_at):
            return None
        return _actor(key.id, key.scope)

    def was_good(self, presented: str) -> bool:
        """True for a key that was let in before, however long ago: no guess."""
        return self._remembered_key(presented) is not None

    def still_admits(self, actor: Actor) -> bool:
        """Whether the key of somebody who was let in works still; for answers that last longer than `CACHE_S`.

        Raises `DatabaseUnavailable`."""
        if actor.id in (ANONYMOUS, BOOTSTRAP):
            return True
        with self._database.transaction() as session:
            row = ApiKeys(session).find(actor.id)
        return row is not None and row.revoked_at is None and not _has_passed(row.expires_at)

    def require_an_admin_key(self, host: str) -> None:
        """Raises `NoAdminKey` when keys are required and no admin could make any."""
        if not self.required or self._admin_sha256 != _NOBODY:
            return
        with self._database.transaction() as session:
            if not ApiKeys(session).has_admin(datetime.now(UTC)):
                raise NoAdminKey(host)

    def create(self, name: str, scope: Scope, expires_at: datetime | None, by: Actor) -> IssuedKey:
        """A new key. `expires_at`: when it stops working, `None`: never. Raises `InvalidExpiry`."""
        now = datetime.now(UTC)
        if expires_at is not None and not now < expires_at <= now + MAX_LIFETIME:
            raise InvalidExpiry(MAX_LIFETIME.days)
        issued = _issue(name, scope, expires_at)
        with self._database.transaction() as session:
            ApiKeys(session).add(issued.row)
            Audit(session).add(by, "key.create", issued.row.id, name=name, scope=scope, expires_at=_text(expires_at))
        return issued

    def find(self, key_id: str) -> KeyRow:
        """Raises `UnknownKey`."""
        with self._database.transaction() as session:
            return _known(key_id, ApiKeys(session).find)

    def page(self, after: str, size: int) -> Page:
        """Up to `size` keys whose ids follow `after` (empty: from the first). Raises `InvalidPageToken`."""
        if after and _ID.fullmatch(after) is None:
            raise InvalidPageToken
        with self._database.transaction() as session:
            found = ApiKeys(session).page(after, size + 1)
        return Page(found[:size], found[size - 1].id if len(found) > size else None)

    def revoke(self, key_id: str, by: Actor) -> None:
        """End a key now; elsewhere it works for up to `CACHE_S` more. Again changes nothing. Raises `UnknownKey`."""
        with self._database.transaction() as session:
            key = _known(key_id, ApiKeys(session).find_for_change)
            if key.revoked_at is None:
                key.revoked_at = datetime.now(UTC)
                Audit(session).add(by, "key.revoke", key.id, name=key.name)
        self._forget(key_id)

    def rotate(self, key_id: str, overlap_s: int, by: Actor) -> IssuedKey:
        """A new key of the same name, scope and lifetime; the old one expires in `overlap_s` seconds, if not before.

        Raises `UnknownKey` and `KeyNotActive`.
        """
        now = datetime.now(UTC)
        with self._database.transaction() as session:
            keys = ApiKeys(session)
            old = _known(key_id, keys.find_for_change)
            if old.revoked_at is not None or _has_passed(old.expires_at):
                raise KeyNotActive(old.id)
            lifetime = None if old.expires_at is None else old.expires_at - old.created_at
            issued = _issue(old.name, cast("Scope", old.scope), None if lifetime is None else now + lifetime)
            keys.add(issued.row)
            end = now + timedelta(seconds=overlap_s)
            old.expires_at = end if old.expires_at is None else min(old.expires_at, end)
            Audit(session).add(by, "key.rotate", old.id, new=issued.row.id, old_expires_at=_text(old.expires_at))
        self._forget(key_id)
        return issued

    def _remembered_key(self, presented: str) -> _Remembered | None:
        parts = _KEY.fullmatch(presented)
        with self._lock:
            key = self._remembered.get(parts["id"]) if parts else None
        return key if parts and key and _is_secret(parts["secret"], key.secret_sha256) else None

    def _look_up(self, presented: str) -> Actor:
        parts = _KEY.fullmatch(presented)
        if parts is None:
            raise _refusal()
        now = datetime.now(UTC)
        with self._database.transaction() as session:
            row = ApiKeys(session).find(parts["id"])
        matches = _is_secret(parts["secret"], row.secret_sha256 if row else _NOBODY)
        if row is None or not matches:
            raise _refusal()
        if row.revoked_at is not None or _has_passed(row.expires_at):
            self._forget(row.id)
            raise _refusal()
        self._remember(row)
        if row.last_used_at is None or row.last_used_at <= now - LAST_USED_EVERY:
            self._touch(row.id, now)
        return _actor(row.id, cast("Scope", row.scope))

    def _remember(self, row: KeyRow) -> None:
        until = time.monotonic() + CACHE_S
        key = _Remembered(row.id, row.secret_sha256, cast("Scope", row.scope), row.expires_at, until)
        with self._lock:
            self._remembered[row.id] = key
            self._remembered.move_to_end(row.id)
            if len(self._remembered) > CACHED_KEYS:
                self._remembered.popitem(last=False)

    def _forget(self, key_id: str) -> None:
        with self._lock:
            self._remembered.pop(key_id, None)

    def _touch(self, key_id: str, now: datetime) -> None:
        """A database that is busy here must not cost the caller the answer; the next look-up tries again."""
        try:
            with self._database.transaction() as session:
                ApiKeys(session).touch(key_id, now, LAST_USED_EVERY)
        except DatabaseUnavailable:
            _log.warning("last use of a key not recorded", key=key_id, exc_info=True)


def anonymous() -> Actor:
    """Everybody, on an open server."""
    return _actor(ANONYMOUS, "admin")


def _issue(name: str, scope: Scope, expires_at: datetime | None) -> IssuedKey:
    key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
    row = KeyRow(
        id=key_id,
        name=name,
        scope=scope,
        secret_sha256=_sha256(secret),
        created_at=datetime.now(UTC),
        last_used_at=None,
        expires_at=expires_at,
        revoked_at=None,
    )
    return IssuedKey(row, f"ww_{key_id}_{secret}")


def _known(key_id: str, find: Callable[[str], KeyRow | None]) -> KeyRow:
    found = find(key_id) if _ID.fullmatch(key_id) else None
    if found is None:
        raise UnknownKey(key_id)
    return found


def _actor(key_id: str, scope: Scope) -> Actor:
    return Actor(key_id, scope, get_contextvars().get("request_id"))


def _is_secret(offered: str, sha256: str) -> bool:
    return hmac.compare_digest(_sha256(offered), sha256)


def _has_passed(moment: datetime | None) -> bool:
    return moment is not None and moment <= datetime.now(UTC)


def _refusal() -> Unauthenticated:
    return Unauthenticated("this API key is not valid here: it is misspelt, unknown, expired or revoked")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
