"""Every operation of the description, driven by schemathesis: no undocumented status, no 500, answers as described.

`WIDTHWISE_SCHEMATHESIS=N` sends N examples per operation instead of the few of an ordinary run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.db.migrate import migrate
from app.main import create_app
from app.settings import Settings
from chains import artifact
from chains.testing import pico_chain

EXAMPLES = int(os.environ.get("WIDTHWISE_SCHEMATHESIS", "12"))
KEY = "an-admin-key-of-these-tests-0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {KEY}", "Host": "localhost"}
FOLLOWS = "/jobs/{job_id}/events"  # an endless answer while a job waits; tests/app/test_jobs.py reads it


# Made at import, because the tests are one per operation of its description; nothing connects before the fixture.
FOLDER = tempfile.TemporaryDirectory(prefix="widthwise-schemathesis-")
APP = create_app(Settings(data_dir=FOLDER.name, auth="keys", admin_key=KEY, auth_failure_limit="1000000/minute"))
schema = schemathesis.openapi.from_asgi("/openapi.json", APP).exclude(path=FOLLOWS)


@schemathesis.serializer("application/offset+octet-stream")
def as_bytes(_: object, value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


@pytest.fixture(scope="session", autouse=True)
def served() -> Iterator[None]:
    services = APP.state.services
    migrate(services.database)
    services.registry.prepare_storage()
    services.registry.publish(artifact.dump(pico_chain()))
    yield
    services.database.dispose()
    FOLDER.cleanup()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_operation_answers_what_it_does_not_describe(case: schemathesis.Case) -> None:
    case.call_and_validate(
        headers=HEADERS,
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_headers_conformance,
            response_schema_conformance,
        ],
    )
