"""Object storage: the port, and one adapter per kind of store.

Published bytes live under the digest of their content and are never overwritten; the database points at them.
"""

from app.storage.factory import open_store
from app.storage.port import ObjectStat, ObjectStore, content_key, read_verified

__all__ = ["ObjectStat", "ObjectStore", "content_key", "open_store", "read_verified"]
