"""The one table from errors to answers.

`chains` and `app.services` raise what went wrong and know no HTTP; here each of their error classes has a row. Details
of answers of 500 and above stay in the log: they may name hosts, folders or other people's chains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app import errors as app_errors
from app.api.problems import ProblemResponse, problem
from chains import errors as chains_errors

_log = structlog.get_logger(__name__)


class ApiError(app_errors.AppError):
    """Base of the mistakes that only exist in HTTP."""


class NotAcceptable(ApiError):
    """The Accept header refuses everything this resource can be answered as."""

    def __init__(self) -> None:
        super().__init__("this answers as application/onnx (the model) or application/json (its manifest)")


class MalformedBody(ApiError):
    """The body is not the JSON this service reads; the message says why."""


class UnsupportedMediaType(ApiError):
    """The body is not plain JSON."""

    def __init__(self) -> None:
        super().__init__("send the body as application/json, not compressed")


class NotAnUpload(ApiError):
    """The headers of a request that sends bytes of a file do not say so."""


class PreconditionFailed(ApiError):
    """If-Match names another version than the one there is."""

    def __init__(self) -> None:
        super().__init__("If-Match does not name this artifact; an artifact never changes, so fetch it without")


class RangeNotSatisfiable(ApiError):
    """The range begins behind the last byte."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the artifact has {size} bytes, and the range lies behind them")
        self.size = size


class NotReady(ApiError):
    """Something the service depends on does not answer."""


@dataclass(frozen=True)
class Row:
    """How an error class is answered. Without `public` the error's own words are replaced by `code`'s."""

    status: int
    code: str

    @property
    def public(self) -> bool:
        return self.status < 500


TABLE: dict[type[Exception], Row] = {
    chains_errors.ChainsError: Row(500, "internal-error"),
    chains_errors.WidthError: Row(422, "width-not-available"),
    chains_errors.ArchitectureError: Row(422, "architecture-unknown"),
    chains_errors.CutError: Row(500, "chain-damaged"),
    chains_errors.ChainMismatch: Row(500, "chain-damaged"),
    chains_errors.ChainFileError: Row(500, "chain-damaged"),
    chains_errors.NotCalibrated: Row(422, "width-not-calibrated"),
    chains_errors.LimitsError: Row(422, "limits-invalid"),
    chains_errors.BudgetTooSmall: Row(422, "budget-too-small"),
    chains_errors.UnsupportedOption: Row(422, "option-unsupported"),
    chains_errors.DataError: Row(422, "data-unusable"),
    chains_errors.WeightsRefused: Row(422, "weights-refused"),
    app_errors.AppError: Row(500, "internal-error"),
    app_errors.UnknownChain: Row(404, "chain-unknown"),
    app_errors.UnknownModel: Row(404, "model-unknown"),
    app_errors.ChainNameTaken: Row(409, "chain-name-taken"),
    app_errors.ChainRightsDiffer: Row(409, "chain-rights-differ"),
    app_errors.ChainInUse: Row(409, "chain-in-use"),
    app_errors.UnknownAlias: Row(404, "alias-unknown"),
    app_errors.AliasMoved: Row(409, "alias-moved"),
    app_errors.AliasNotRemovable: Row(409, "alias-not-removable"),
    app_errors.PromotionRefused: Row(409, "promotion-refused"),
    app_errors.OfferRefused: Row(409, "offer-refused"),
    app_errors.UnknownOffer: Row(404, "offer-unknown"),
    app_errors.NothingToRollBack: Row(409, "nothing-to-roll-back"),
    app_errors.ReservedName: Row(422, "chain-name-reserved"),
    app_errors.LatencyNotMeasurable: Row(422, "latency-not-measurable-yet"),
    app_errors.InvalidPageToken: Row(422, "page-token-invalid"),
    app_errors.NotReproducible: Row(410, "model-not-reproducible"),
    app_errors.Unauthenticated: Row(401, "unauthenticated"),
    app_errors.Forbidden: Row(403, "forbidden"),
    app_errors.NotOnLoopback: Row(403, "not-on-loopback"),
    app_errors.TooManyRequests: Row(429, "too-many-requests"),
    app_errors.UnknownKey: Row(404, "key-unknown"),
    app_errors.InvalidExpiry: Row(422, "expiry-invalid"),
    app_errors.KeyNotActive: Row(409, "key-not-active"),
    app_errors.NoAdminKey: Row(500, "internal-error"),
    app_errors.RateLimitsUnavailable: Row(503, "rate-limits-unavailable"),
    app_errors.UnknownUpload: Row(404, "upload-unknown"),
    app_errors.UploadNotAwaited: Row(409, "upload-not-awaited"),
    app_errors.OffsetMismatch: Row(409, "upload-offset-mismatch"),
    app_errors.UploadTooLarge: Row(413, "upload-too-large"),
    app_errors.UploadTooLong: Row(413, "upload-too-long"),
    app_errors.UploadIncomplete: Row(422, "upload-incomplete"),
    app_errors.UploadCorrupt: Row(422, "upload-corrupt"),
    app_errors.TooManyUploads: Row(429, "too-many-uploads"),
    app_errors.UnknownTeacher: Row(404, "teacher-unknown"),
    app_errors.TeacherNameTaken: Row(409, "teacher-name-taken"),
    app_errors.TeacherExists: Row(409, "teacher-exists"),
    app_errors.TeacherInUse: Row(409, "teacher-in-use"),
    app_errors.TeacherNotReady: Row(409, "teacher-not-ready"),
    app_errors.UnknownDataset: Row(404, "dataset-unknown"),
    app_errors.DatasetNameTaken: Row(409, "dataset-name-taken"),
    app_errors.DatasetSourceRefused: Row(422, "dataset-source-refused"),
    app_errors.DatasetInUse: Row(409, "dataset-in-use"),
    app_errors.DatasetNotReady: Row(409, "dataset-not-ready"),
    app_errors.DatasetRefused: Row(422, "dataset-refused"),
    app_errors.DatasetChanged: Row(409, "dataset-changed"),
    app_errors.LandlockFailed: Row(500, "internal-error"),
    app_errors.SandboxUnavailable: Row(500, "sandbox-unavailable"),
    app_errors.TracingNotInstalled: Row(500, "internal-error"),
    app_errors.UnknownJob: Row(404, "job-unknown"),
    app_errors.UnknownJobFile: Row(404, "job-file-unknown"),
    app_errors.IdempotencyConflict: Row(422, "idempotency-key-reused"),
    app_errors.UnknownJobKind: Row(422, "job-kind-unknown"),
    app_errors.InvalidJobRequest: Row(422, "request-invalid"),
    app_errors.JobImpossible: Row(422, "job-impossible"),
    app_errors.ChainExists: Row(409, "chain-exists"),
    app_errors.JobEnded: Row(409, "job-ended"),
    app_errors.JobNotRetryable: Row(409, "job-not-retryable"),
    app_errors.JobCancelled: Row(409, "job-cancelled"),
    app_errors.ChildFailed: Row(500, "internal-error"),
    app_errors.JobPermanentlyFailed: Row(500, "internal-error"),
    app_errors.TrainingNotInstalled: Row(500, "internal-error"),
    app_errors.WorkerNotAlive: Row(503, "worker-not-alive"),
    app_errors.DatabaseUnavailable: Row(503, "database-unavailable"),
    app_errors.StorageError: Row(503, "storage-unavailable"),
    app_errors.ObjectNotFound: Row(500, "stored-object-missing"),
    app_errors.ObjectCorrupt: Row(500, "stored-object-corrupt"),
    app_errors.InvalidKey: Row(500, "internal-error"),
    app_errors.StorageUnavailable: Row(503, "storage-unavailable"),
    ApiError: Row(400, "bad-request"),
    NotAcceptable: Row(406, "not-acceptable"),
    MalformedBody: Row(400, "body-malformed"),
    UnsupportedMediaType: Row(415, "media-type-unsupported"),
    NotAnUpload: Row(415, "upload-media-type-unsupported"),
    PreconditionFailed: Row(412, "precondition-failed"),
    RangeNotSatisfiable: Row(416, "range-not-satisfiable"),
    NotReady: Row(503, "not-ready"),
}
HTTP_CODES = {
    400: "body-malformed",
    404: "path-unknown",
    405: "method-not-allowed",
    408: "body-stalled",
    413: "body-too-large",
}
RETRY_AFTER_S = "5"
PRIVATE_DETAIL = "the service could not do this; nothing is wrong with the request. The log has more under request_id"
_SAID_BY_HTTP = {
    400: "the body is no JSON this service can read: it must be UTF-8, of moderate depth, with numbers of sane size",
    404: "there is nothing at this path; GET /openapi.json lists what there is",
    405: "this path does not know that method; the Allow header lists those it knows",
    408: "the body did not arrive in time; send it again on a better connection",
    413: "the body is larger than this service reads",
}


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document. What no handler knows is caught by `app.api.middleware`."""
    app.add_exception_handler(chains_errors.ChainsError, answer_known)
    app.add_exception_handler(app_errors.AppError, answer_known)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(RequestValidationError, answer_invalid)


def row_of(error: Exception) -> Row:
    """The row of the error's class, or of its nearest ancestor that has one."""
    return next(TABLE[known] for known in type(error).__mro__ if known in TABLE)


async def answer_known(_request: Request | None, error: Exception) -> Response:
    row = row_of(error)
    if row.public:
        return problem(row.status, row.code, str(error), _headers(error), **_extensions(error))
    if row.status == 503:  # somebody else's failure: which one says enough, and probes repeat it every few seconds
        _log.warning("not available", code=row.code, reason=str(error))
        return problem(row.status, row.code, PRIVATE_DETAIL, {"retry-after": RETRY_AFTER_S})
    _log.error("request failed", code=row.code, exc_info=error)
    return problem(row.status, row.code, PRIVATE_DETAIL)


async def answer_http(request: Request, error: Exception) -> Response:
    """Errors of the framework: no such path or method, an unreadable or too large body."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for nothing else
    status = error.status_code
    code = HTTP_CODES.get(status, "http-error")
    headers = _allowed(request) if status == 405 else None
    return problem(status, code, _SAID_BY_HTTP.get(status, str(error.detail)), headers or error.headers)


async def answer_invalid(_request: Request, error: Exception) -> Response:
    """Bodies and parameters that do not fit their schema; the values sent are not repeated, they may be anything."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for nothing else
    mistakes = error.errors()
    if any(mistake["type"] == "json_invalid" for mistake in mistakes):
        return problem(400, HTTP_CODES[400], _SAID_BY_HTTP[400])
    fields = [field_error(mistake) for mistake in mistakes]
    detail = "; ".join(f"{field['pointer'] or 'body'}: {field['message']}" for field in fields[:4])
    return problem(422, "request-invalid", detail, errors=fields[:20])


def answer_unexpected(error: Exception) -> ProblemResponse:
    """A mistake of ours. Nothing of it leaves the house."""
    _log.error("unexpected error", exc_info=error)
    return problem(500, "internal-error", PRIVATE_DETAIL)


def field_error(mistake: Mapping[str, Any]) -> dict[str, str]:
    """One pydantic error as `FieldError`: where, which kind, and words."""
    kind, location = str(mistake["type"]), list(mistake["loc"])
    path = location[1:] if location[:1] == ["body"] else location
    pointer = "".join("/" + str(part)[:80].replace("~", "~0").replace("/", "~1") for part in path)
    message = "unknown field" if kind == "extra_forbidden" else str(mistake["msg"])
    return {"pointer": pointer, "code": kind.replace("_", "-"), "message": message}


def _allowed(request: Request) -> dict[str, str]:
    """`Allow` with all methods of the path; the router names only those of the first route that it finds there."""
    path = getattr(request.scope.get("route"), "path_format", None)
    described = request.app.openapi()["paths"].get(path, {})
    return {"allow": ", ".join(method.upper() for method in described)} if described else {}


def _headers(error: Exception) -> dict[str, str]:
    match error:
        case RangeNotSatisfiable():
            return {"content-range": f"bytes */{error.size}"}
        case app_errors.OffsetMismatch() | app_errors.UploadIncomplete():
            return {"upload-offset": str(error.received_bytes)}
        case app_errors.TooManyUploads():
            return {"retry-after": RETRY_AFTER_S}
        case app_errors.Unauthenticated():
            return {"www-authenticate": "Bearer"}
        case app_errors.TooManyRequests():
            return {"retry-after": str(error.retry_after_s)}
    return {}


def _extensions(error: Exception) -> dict[str, object]:
    match error:
        case chains_errors.BudgetTooSmall():
            return {name: getattr(error, name) for name in ("limit", "requested", "smallest_available", "chain")}
        case app_errors.AliasMoved():
            changed_at = error.changed_at and error.changed_at.isoformat()
            return {"chain": error.chain, "changed_at": changed_at, "changed_by": error.changed_by}
        case app_errors.PromotionRefused():
            return {"unknown": error.unknown}
        case app_errors.InvalidJobRequest():
            return {"errors": [field_error(mistake) for mistake in error.mistakes[:20]]}
    return {}
