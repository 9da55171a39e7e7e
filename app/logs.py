"""Logging to the console, one line per event, the libraries' logs included. Bodies and headers are never logged."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor

from app.settings import LogLevel


def configure(level: LogLevel) -> None:
    """Send structlog and the standard library's loggers to standard error from `level` on."""
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    # The pretty traceback of the default would print local variables, and with them whatever secret they hold.
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    handler = logging.StreamHandler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=console, foreign_pre_chain=before))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in ("botocore", "boto3", "urllib3", "s3transfer", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
