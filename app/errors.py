"""Every error the service raises on purpose, apart from those of `chains`.

    AppError
    ├── UnknownChain           no chain or alias of that name
    ├── UnknownModel           no model of that id
    ├── ChainNameTaken         the name already points at another file
    ├── ReservedName           a chain is named like an alias of the service
    ├── LatencyNotMeasurable   a latency limit was stated before any device can report latency
    ├── InvalidPageToken       a page token this service did not make
    ├── NotReproducible        a stored recipe needs a writer this version no longer has
    ├── DatabaseUnavailable    the database does not answer, or is not migrated
    └── StorageError
        ├── ObjectNotFound     no object under that key
        ├── ObjectCorrupt      the bytes do not have the digest they are stored under
        ├── InvalidKey         a key outside the alphabet that all object stores share
        └── StorageUnavailable the object store does not answer, or refuses

Messages are for people and safe to show to clients, except those of `DatabaseUnavailable` and `StorageError`, which may
name hosts and folders and stay in the log. They know no HTTP: `app.api.errors` maps each class to a status.
"""


class AppError(Exception):
    """Base of all errors raised on purpose by the service."""


class UnknownChain(AppError):
    """No chain or alias of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no chain or alias '{name[:80]}'; GET /chains lists what there is")


class UnknownModel(AppError):
    """No model of that id; models come into being by POST /models."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"there is no model '{model_id[:80]}'; POST /models makes one")


class ChainNameTaken(AppError):
    """The name already points at a file with another digest; published chains are never overwritten."""

    def __init__(self, name: str, stored: str, offered: str) -> None:
        super().__init__(
            f"chain '{name}' is already published with digest {stored[:12]}…; the offered file has {offered[:12]}…. "
            "Publish it under another name."
        )


class ReservedName(AppError):
    """A chain is named like an alias of the service, which it would hide."""

    def __init__(self, name: str) -> None:
        super().__init__(f"'{name}' is the name of an alias; give the chain another name")


class LatencyNotMeasurable(AppError):
    """A latency limit was stated before any device can report latency."""

    def __init__(self) -> None:
        super().__init__(
            "max_latency_ms and device_class need latencies measured on devices, and this version cannot take them in; "
            "state max_macs or another limit instead"
        )


class InvalidPageToken(AppError):
    """A page token this service did not make."""

    def __init__(self) -> None:
        super().__init__("page_token is not one of ours: pass next_page_token of the page before, unchanged")


class NotReproducible(AppError):
    """A stored recipe needs a writer this version no longer has, so its bytes cannot be made again."""


class DatabaseUnavailable(AppError):
    """The database does not answer, or is not migrated."""


class StorageError(AppError):
    """Base of the object store's errors."""


class ObjectNotFound(StorageError):
    """No object under that key."""


class ObjectCorrupt(StorageError):
    """The bytes do not have the digest they are stored under."""


class InvalidKey(StorageError):
    """A key outside the alphabet that all object stores share."""


class StorageUnavailable(StorageError):
    """The object store does not answer, or refuses."""
