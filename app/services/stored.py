"""How a row comes to name an object of the store, though garbage collection may run at any moment.

See `app.services.garbage`. Rows that name an object before it is put (an upload's, a teacher's, an archive's) need none
of this: what is named is never collected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.orm import Session

from app.errors import ObjectNotFound
from app.storage.port import ObjectStore, content_key

ATTEMPTS = 3  # one loses a race only to somebody who got something done
Named = TypeVar("Named")


def put_and_name(
    put: Callable[[], object], name: Callable[[], Named], *, again: tuple[type[Exception], ...] = ()
) -> Named:
    """Call `put`, then `name`, which calls `require_stored`; both again when the object was collected in between, or
    when `name` raises one of `again`. Returns what `name` does, and raises what it raises at last."""
    lost: tuple[type[Exception], ...] = (ObjectNotFound, *again)
    for _ in range(ATTEMPTS - 1):
        put()
        try:
            return name()
        except lost:
            continue
    put()
    return name()


def require_stored(session: Session, store: ObjectStore, sha256: str) -> None:
    """In the transaction whose rows name the object, after they were added. Raises `ObjectNotFound` when it was taken
    for garbage before they could protect it."""
    session.flush()  # from here on a collection waits for us, and one that was quicker is over
    store.stat(content_key(sha256))
