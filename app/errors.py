"""Every error the service raises on purpose, apart from those of `chains`.

    AppError
    ├── UnknownChain           no chain or alias of that name
    ├── UnknownModel           no model of that id
    ├── ChainNameTaken         the name already points at another file
    ├── ChainRightsDiffer      a published chain is said to have other terms or another consent basis
    ├── ChainInUse             an alias or a job that has not ended needs the chain
    ├── ReservedName           a chain is named like an alias of the service
    ├── UnknownAlias           no alias of that name, or it points at no chain
    ├── AliasMoved             the alias points at another chain than the caller thought
    ├── AliasNotRemovable      `stable` always points at a chain
    ├── PromotionRefused       terms, consent basis or accuracy of the chain are not known
    ├── OfferRefused           a chain cannot be offered with another
    ├── UnknownOffer           the chain is offered with no other
    ├── NothingToRollBack      there is no chain before, or it was deleted
    ├── LatencyNotMeasurable   a latency limit was stated before any device can report latency
    ├── InvalidPageToken       a page token this service did not make
    ├── NotReproducible        a stored recipe needs a writer this version no longer has
    ├── Unauthenticated        no API key, or one that is unknown, expired or revoked
    ├── Forbidden              the caller is known and may not do this
    │   └── NotOnLoopback      an open server was asked from, or by the name of, another machine
    ├── TooManyRequests        the caller has used up its rate limit
    ├── UnknownKey             no API key of that id
    ├── InvalidExpiry          an API key would end in the past, or too late
    ├── KeyNotActive           the API key has expired or was revoked
    ├── NoAdminKey             keys are required and nobody could be let in
    ├── RateLimitsUnavailable  the store of the rate limits does not answer
    ├── UnknownUpload          no upload is open for this target
    ├── UploadNotAwaited       the file is there already, or is being checked
    ├── OffsetMismatch         bytes were sent for another place than the next free one
    ├── UploadTooLarge         a file larger than this service takes was announced
    ├── UploadTooLong          more bytes came than were announced
    ├── UploadIncomplete       fewer bytes came than were announced
    ├── UploadCorrupt          the whole file does not have the sha256 that was announced
    ├── TooManyUploads         as many uploads are open as the service allows
    ├── UnknownTeacher         no teacher of that name
    ├── TeacherNameTaken       the name already belongs to another teacher
    ├── TeacherExists          the name of a teacher to be made is taken
    ├── TeacherInUse           a job that has not ended needs the teacher
    ├── TeacherNotReady        the teacher's weights have not arrived, are not checked yet or were refused
    ├── UnknownDataset         no data set of that name
    ├── DatasetNameTaken       the name already belongs to another data set, or to one that was deleted
    ├── DatasetSourceRefused   a folder or bucket that this service may not read
    ├── DatasetInUse           a job that has not ended needs the data set
    ├── DatasetNotReady        the data set is not there yet, was refused or was deleted
    ├── DatasetRefused         what was found in a data set makes it unusable
    │   └── DatasetChanged     its files are not those that were checked
    ├── LandlockFailed         the kernel refuses to keep a process from writing
    ├── SandboxUnavailable     this machine cannot confine a process that reads an untrusted file
    ├── TracingNotInstalled    traces are asked for and their exporter is not installed
    ├── UnknownJob             no job of that id
    ├── UnknownJobFile         the job keeps no file of that name
    ├── IdempotencyConflict    an idempotency key came again with another request
    ├── UnknownJobKind         no kind of job of that name can be asked for
    ├── InvalidJobRequest      the request of a job does not fit its kind
    ├── JobImpossible          the job could never succeed, whichever worker had it
    ├── ChainExists            the name of a chain to be made is taken
    ├── JobEnded               the job has ended, so there is nothing to cancel
    ├── JobNotRetryable        only a failed job can be tried again
    ├── JobCancelled           the job was cancelled, its step must stop
    ├── ChildFailed            a program that a step had started ended badly
    ├── JobPermanentlyFailed   a step can never succeed, its message says why
    │   └── TrainingNotInstalled the worker that got the job has no torch
    ├── WorkerNotAlive         no worker of this machine gives a sign of life
    ├── DatabaseUnavailable    the database does not answer, or is not migrated
    └── StorageError
        ├── ObjectNotFound     no object under that key
        ├── ObjectCorrupt      the bytes do not have the digest they are stored under
        ├── InvalidKey         a key outside the alphabet that all object stores share
        └── StorageUnavailable the object store does not answer, or refuses

Messages are for people and safe to show to clients, except those of `DatabaseUnavailable` and `StorageError`, which may
name hosts and folders and stay in the log. They know no HTTP: `app.api.errors` maps each class to a status.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any


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


class ChainRightsDiffer(AppError):
    """A published chain is said to have other terms or another consent basis than recorded."""

    def __init__(self, name: str, field: str, recorded: str, stated: str) -> None:
        super().__init__(
            f"the {field} of chain '{name}' is recorded as '{recorded}' and cannot become '{stated}': a chain keeps "
            "what was stated when it was published, and one made by a job what its teacher and data set state"
        )


class ChainInUse(AppError):
    """An alias points at the chain, or a job that has not ended names it."""

    def __init__(self, name: str, by: str) -> None:
        super().__init__(f"chain '{name}' is in use: {by}")


class ReservedName(AppError):
    """A chain is named like an alias of the service, which it would hide."""

    def __init__(self, name: str) -> None:
        super().__init__(f"'{name}' is the name of an alias; give the chain another name")


class UnknownAlias(AppError):
    """No alias of that name, or it points at no chain."""

    def __init__(self, alias: str) -> None:
        super().__init__(
            f"no alias '{alias[:80]}' points at a chain; there are 'stable' and 'canary', and PUT "
            "/chains/{name}/aliases/{alias} sets one"
        )


class AliasMoved(AppError):
    """The alias points at another chain than the caller thought."""

    def __init__(
        self, alias: str, chain: str | None, changed_at: datetime | None = None, changed_by: str | None = None
    ) -> None:
        where = "at no chain" if chain is None else f"at '{chain}'"
        since = f", since {changed_at:%Y-%m-%d %H:%M:%S} UTC by {changed_by or 'nobody known'}" if changed_at else ""
        super().__init__(f"alias '{alias}' points {where}{since}; look at GET /aliases and decide again")
        self.alias, self.chain, self.changed_at, self.changed_by = alias, chain, changed_at, changed_by


class AliasNotRemovable(AppError):
    """`stable` answers when no chain is asked for, so it always points at one."""

    def __init__(self, alias: str) -> None:
        super().__init__(f"alias '{alias}' cannot be removed, only moved: devices that name no chain get what it names")


class PromotionRefused(AppError):
    """Terms, consent basis or accuracy of the chain are not known, and nobody has accepted that."""

    def __init__(self, chain: str, refused: str, unknown: Sequence[str]) -> None:
        """refused: what is not done with the chain."""
        super().__init__(
            f"chain '{chain}' is not {refused}: nobody knows its {' and its '.join(unknown)}. State terms "
            "and consent basis where it is published and publish it measured, or send accept_unknown, which the audit "
            "trail will keep"
        )
        self.unknown = list(unknown)


class OfferRefused(AppError):
    """A chain cannot be offered with another: it is not terminal, or the two cannot be compared."""

    def __init__(self, terminal: str, chain: str, why: str) -> None:
        super().__init__(f"chain '{terminal}' is not offered with '{chain}': {why}")


class UnknownOffer(AppError):
    """The chain is offered with no other."""

    def __init__(self, terminal: str) -> None:
        super().__init__(f"chain '{terminal}' is offered with no other; PUT /chains/{terminal}/offer does that")


class NothingToRollBack(AppError):
    """The alias points at the first chain of its history, or the one before was deleted."""

    def __init__(self, alias: str, current: str, before: str | None) -> None:
        why = "came there first" if before is None else f"came there from '{before}', which was deleted since"
        super().__init__(f"alias '{alias}' points at '{current}' and {why}; promote a chain by its name")


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


class Unauthenticated(AppError):
    """No API key, or one that is unknown, expired or revoked. The message never says which of the three."""


class Forbidden(AppError):
    """The caller is known and may not do this; the message says what it would need."""


class NotOnLoopback(Forbidden):
    """A server without API keys was asked from, or by the name of, another machine."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"this server asks for no API keys, so it answers this machine alone: {what}. Ask by http://localhost or "
            "http://127.0.0.1; to serve other machines, start it with WIDTHWISE_AUTH=keys"
        )


class TooManyRequests(AppError):
    """The caller has used up its rate limit. retry_after_s: whole seconds until there is room again."""

    def __init__(self, limit: str, retry_after_s: int) -> None:
        super().__init__(f"the limit of {limit} is used up; ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class UnknownKey(AppError):
    """No API key of that id."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"there is no API key '{key_id[:40]}'; GET /keys lists what there is")


class InvalidExpiry(AppError):
    """An API key would end in the past, or too late."""

    def __init__(self, max_days: int) -> None:
        super().__init__(f"expires_at must lie ahead, by {max_days} days at most; leave it out for a key without end")


class KeyNotActive(AppError):
    """The API key has expired or was revoked, so it cannot be rotated."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"API key {key_id} has expired or was revoked; make a new one instead")


class NoAdminKey(AppError):
    """Keys are required, and there is none that could make others."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"the service would answer {host} and ask for API keys, but there is no admin key yet: make one with "
            "`widthwise keys create NAME --scope admin`, or set WIDTHWISE_ADMIN_KEY to at least 32 random characters"
        )


class RateLimitsUnavailable(AppError):
    """The store of the rate limits does not answer; the message may name its host."""


class UnknownUpload(AppError):
    """No upload is open for this target."""

    def __init__(self, kind: str, target: str) -> None:
        super().__init__(
            f"no upload is open for {kind} '{target[:80]}': it was finished, discarded or dropped as stale"
        )


class UploadNotAwaited(AppError):
    """The file of this target is there already, or is being checked."""

    def __init__(self, kind: str, target: str, state: str) -> None:
        super().__init__(
            f"{kind} '{target[:80]}' is {state} and awaits no file; delete it, or register another under a new name"
        )


class OffsetMismatch(AppError):
    """Bytes were sent for another place than the next free one. `received_bytes`: where that is."""

    def __init__(self, offset: int, received_bytes: int) -> None:
        super().__init__(
            f"the bytes sent begin at {offset}, and the upload goes on at {received_bytes}: ask with HEAD, then send "
            "from there. Only one client at a time can send a file"
        )
        self.received_bytes = received_bytes


class UploadTooLarge(AppError):
    """A file larger than this service takes was announced."""

    def __init__(self, size_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"a file of {size_bytes:,} bytes was announced; this service takes up to {max_bytes:,} "
            "(WIDTHWISE_MAX_UPLOAD_BYTES)"
        )


class UploadTooLong(AppError):
    """More bytes came than were announced; the part that goes past the end is not kept."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"the file was announced with {size_bytes:,} bytes, and more were sent")


class UploadIncomplete(AppError):
    """Fewer bytes came than were announced."""

    def __init__(self, received_bytes: int, size_bytes: int) -> None:
        super().__init__(
            f"{received_bytes:,} of {size_bytes:,} bytes are here; send the rest with PATCH, from Upload-Offset on"
        )
        self.received_bytes = received_bytes


class UploadCorrupt(AppError):
    """The whole file does not have the sha256 that was announced. The upload has started over."""

    def __init__(self, size_bytes: int, sha256: str) -> None:
        super().__init__(
            f"the {size_bytes:,} bytes received do not have the sha256 {sha256[:12]}… that was announced; the upload "
            "starts over at 0. Send the file again, or delete and announce it with its own sha256"
        )


class TooManyUploads(AppError):
    """As many uploads are open as the service allows."""

    def __init__(self, max_open: int) -> None:
        super().__init__(
            f"{max_open} uploads are open already (WIDTHWISE_MAX_OPEN_UPLOADS); finish or delete one, then try again"
        )


class UnknownTeacher(AppError):
    """No teacher of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no teacher '{name[:80]}'; GET /teachers lists what there is")


class TeacherNameTaken(AppError):
    """The name already belongs to a teacher with other weights or other rights; teachers are never overwritten."""

    def __init__(self, name: str, differs: str) -> None:
        super().__init__(
            f"teacher '{name}' is already registered with another {differs}; delete it first, or take another name"
        )


class TeacherExists(AppError):
    """The name of a teacher that a job would make is taken, or will be by another job."""


class TeacherInUse(AppError):
    """A job that has not ended needs the teacher."""

    def __init__(self, name: str, job: str) -> None:
        super().__init__(f"job {job} needs teacher '{name}' and has not ended; wait for it or cancel it first")


class TeacherNotReady(AppError):
    """The teacher's weights have not arrived, are not checked yet or were refused."""

    def __init__(self, name: str, state: str) -> None:
        super().__init__(
            f"teacher '{name}' is {state}, and only a ready one can be used; GET /teachers/{name} says more"
        )


class UnknownDataset(AppError):
    """No data set of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no data set '{name[:80]}'; GET /datasets lists what there is")


class DatasetNameTaken(AppError):
    """The name already belongs to a data set that differs, or to a deleted one; names are never used again."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"data set '{name}' {why}; take another name")


class DatasetSourceRefused(AppError):
    """A folder or bucket that this service may not read; the message says how it would be allowed."""


class DatasetInUse(AppError):
    """A job that has not ended needs the data set."""

    def __init__(self, name: str, job: str) -> None:
        super().__init__(f"job {job} needs data set '{name}' and has not ended; wait for it or cancel it first")


class DatasetNotReady(AppError):
    """The data set's archive has not arrived, it is not checked yet, was refused or was deleted."""

    def __init__(self, name: str, state: str) -> None:
        super().__init__(f"data set '{name}' is {state}, so this cannot be done; GET /datasets/{name} says more")


class DatasetRefused(AppError):
    """What was found in a data set makes it unusable; the message says what, and how to mend it."""


class DatasetChanged(DatasetRefused):
    """The files of a data set are not those that were checked."""

    def __init__(self, name: str, recorded: str, found: str) -> None:
        super().__init__(
            f"the files of data set '{name}' have digest {found[:12]}…; when they were checked, {recorded[:12]}…; "
            f"put them back, or have them checked again with POST /datasets/{name}/recheck"
        )


class LandlockFailed(AppError):
    """The kernel has Landlock and refuses a ruleset, so the process that it should confine is not started."""


class SandboxUnavailable(AppError):
    """The machine cannot confine a process that reads an untrusted file, so the file is not read at all."""


class TracingNotInstalled(AppError):
    """Traces are asked for and their exporter is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces and their exporter is not installed: pip install "
            "'widthwise[otel]', or leave the variable unset"
        )


class UnknownJob(AppError):
    """No job of that id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job '{job_id[:80]}'; GET /jobs lists what there is")


class UnknownJobFile(AppError):
    """The job keeps no file of that name."""

    def __init__(self, job_id: str, name: str) -> None:
        super().__init__(f"job {job_id} keeps no file '{name[:80]}'; GET /jobs/{job_id}/files lists what it keeps")


class IdempotencyConflict(AppError):
    """An idempotency key came again with another request; the first one's job is left as it is."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"this Idempotency-Key belongs to job {job_id}, which was asked for with another request. "
            "Send the same request to get that job, or another key to get a new one."
        )


class UnknownJobKind(AppError):
    """No kind of job of that name can be asked for."""

    def __init__(self, kind: str, known: Sequence[str]) -> None:
        super().__init__(f"there is no kind of job '{kind[:40]}'; there are {', '.join(known)}")


class InvalidJobRequest(AppError):
    """The request of a job does not fit its kind. mistakes: as pydantic tells them."""

    def __init__(self, kind: str, mistakes: Sequence[Mapping[str, Any]]) -> None:
        places = ("/".join(str(part)[:80] for part in mistake["loc"]) or "request" for mistake in mistakes)
        words = (str(mistake["msg"]).removeprefix("Value error, ") for mistake in mistakes)
        found = [f"{place}: {text}" for place, text in zip(places, words, strict=True)]
        super().__init__(f"this is no request for a job of kind '{kind}': {'; '.join(found[:4])}")
        self.mistakes = tuple(mistakes)


class JobImpossible(AppError):
    """The job could never succeed, whichever worker had it; the message says why and what to do."""


class ChainExists(AppError):
    """The name of a chain that a job would make is taken, or will be by another job."""


class JobEnded(AppError):
    """The job has ended, so there is nothing to cancel."""

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(f"job {job_id} has ended ({state}), so there is nothing to cancel")


class JobNotRetryable(AppError):
    """Only a failed job can be tried again."""

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(f"job {job_id} is {state}; only a failed job can be tried again. POST /jobs makes a new one")


class JobCancelled(AppError):
    """The job was cancelled. Raised inside its step, which must stop; what it did so far is thrown away."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} was cancelled")


class ChildFailed(AppError):
    """A program that a step had started ended badly.

    status: its exit status, negative for the signal that ended it. lines: the last it wrote.
    """

    def __init__(self, program: str, status: int, lines: Sequence[str]) -> None:
        ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        said = "; it wrote nothing" if not lines else ". The last it wrote:\n" + "\n".join(lines)
        super().__init__(f"{program} {ended}{said}")
        self.status = status
        self.lines = tuple(lines)

    @property
    def is_transient(self) -> bool:
        """True when trying again may help: something outside ended it, or the disk was full."""
        return self.status < 0 or any("No space left on device" in line for line in self.lines)


class JobPermanentlyFailed(AppError):
    """A step can never succeed, however often it is tried; the message says why and what to do."""


class TrainingNotInstalled(JobPermanentlyFailed):
    """The worker that got the job has no torch."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"a job of kind '{kind}' needs the training install, and the worker that got it has no torch. Install "
            "widthwise[train] where workers run (or use the worker image), then POST …/retry"
        )


class WorkerNotAlive(AppError):
    """No worker of this machine has given a sign of life lately."""

    def __init__(self, lease_s: float) -> None:
        super().__init__(f"no worker of this machine has given a sign of life in the last {lease_s:g} s")


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
