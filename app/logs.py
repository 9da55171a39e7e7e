"""Logging to standard error, one line per event, the libraries' logs included. Bodies and headers are never logged,
and what looks like a secret is taken out of every line, see `app.redaction`.

Console lines are for people, JSON lines for whatever collects logs. Both carry what is bound to the context
(`request_id`, `job`) and, inside a traced request or job, `trace_id` and `span_id`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, cast

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

from app.redaction import Redactor, secrets_of_environment
from app.settings import LogFormat, LogLevel

# Their own lines below WARNING repeat what ours say; those of the queue are kept one level up for the same reason.
CHATTY = ("alembic", "apscheduler", "boto3", "botocore", "dbos", "s3transfer", "urllib3")


def configure(level: LogLevel, log_format: LogFormat = "auto", secrets: Iterable[str] = ()) -> None:
    """Send structlog, the standard library's loggers and Python's warnings to standard error from `level` on.

    `auto` is console on a terminal and JSON elsewhere. secrets: values that never appear, besides everything that has
    the form of a secret.
    """
    redactor = Redactor([*secrets, *secrets_of_environment()])
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_trace,
    ]
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    is_console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                redact_fields(redactor),
                *(_console() if is_console else _json()),
                redact_line(redactor),
            ],
            foreign_pre_chain=before,
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    _give_up_own_handlers()
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


def redact_fields(redactor: Redactor) -> Processor:
    """Fields named like secrets lose their values."""

    def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return cast("EventDict", redactor.value(event))

    return redact


def redact_line(redactor: Redactor) -> Processor:
    """Comes last, over the written line: texts of exceptions, too, are in it by now."""

    def redact(_logger: WrappedLogger, _method: str, line: Any) -> str:
        return redactor.text(line)

    return redact


def add_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The ids of the span this happens in, in hex as traces show them; nothing outside one."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def _console() -> list[Processor]:
    # The pretty traceback of the default would print local variables, and with them whatever secret they hold.
    return [
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    ]


def _json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]


def _give_up_own_handlers() -> None:
    """Libraries that print by themselves would print beside the pipeline.

    dbos adds its console handler when its logger has none, and only then: an empty one stops it.
    """
    for name in ("dbos", "uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        logger.propagate = True
