"""API keys: made, listed, rotated, revoked, and what is kept of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event, select, update
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs
from typer.testing import CliRunner

from app.actor import Actor
from app.cli import cli
from app.db.migrate import migrate
from app.db.session import Database
from app.db.tables import AuditRow, KeyRow
from app.errors import InvalidExpiry, InvalidPageToken, KeyNotActive, NoAdminKey, Unauthenticated, UnknownKey
from app.services import keys as keys_module
from app.services.keys import Keys

BY = Actor("0123456789ab", "admin", "request-1")
ADMIN_KEY = "correct-horse-battery-staple-0123456789"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path}/keys.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    database = Database(url)
    migrate(database)
    yield database
    database.dispose()


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database, required=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the memory of keys forward by seconds."""
    moved = [0.0]
    real = keys_module.time.monotonic

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return real() + moved[0]

    monkeypatch.setattr(keys_module, "time", Clock)

    def forward(seconds: float) -> None:
        moved[0] += seconds

    return forward


def stored(database: Database, key_id: str) -> KeyRow:
    with database.transaction() as session:
        return session.get_one(KeyRow, key_id)


def change(database: Database, key_id: str, **values: object) -> None:
    """What another process does."""
    with database.transaction() as session:
        session.execute(update(KeyRow).where(KeyRow.id == key_id).values(**values))


def trail(database: Database) -> list[tuple[str, str, str]]:
    with database.transaction() as session:
        return [(row.actor, row.action, row.target) for row in session.scalars(select(AuditRow).order_by(AuditRow.id))]


def test_a_key_lets_its_holder_in(keys: Keys) -> None:
    made = keys.create("camera 1", "device", None, BY)
    assert re.fullmatch(r"ww_[0-9a-f]{12}_[0-9a-f]{64}", made.key)
    assert keys.authenticate(made.key) == Actor(made.row.id, "device")


def test_only_the_sha256_of_the_secret_is_kept(keys: Keys, database: Database) -> None:
    made = keys.create("camera 1", "device", None, BY)
    secret = made.key.rsplit("_", 1)[1]
    row = stored(database, made.row.id)
    assert row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    with database.transaction() as session:
        told = [str(vars(entry)) for entry in session.scalars(select(AuditRow))]
    assert not any(secret in text for text in [str(vars(row)), *told])


def test_keys_are_compared_in_constant_time(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known id or not, one comparison of sha256s decides, and it does not stop at the first difference."""
    made = keys.create("camera 1", "device", None, BY)
    compared: list[tuple[str, str]] = []
    real = keys_module.hmac.compare_digest

    def watched(one: str, other: str) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", watched)
    counts = []
    for key in (f"ww_{made.row.id}_{'0' * 64}", f"ww_{'0' * 12}_{'0' * 64}"):
        compared.clear()
        with pytest.raises(Unauthenticated):
            keys.authenticate(key)
        counts.append(len(compared))
        assert {len(text) for pair in compared for text in pair} == {64}
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "wrong", ["", "ww_", "nonsense", "ww_0123456789ab_" + "0" * 64, "ww_' OR 1=1 --_x", "\x00", "ü"]
)
def test_what_is_no_key_of_ours_is_refused(keys: Keys, wrong: str) -> None:
    with pytest.raises(Unauthenticated):
        keys.authenticate(wrong)


def test_a_refusal_never_says_which_of_unknown_expired_revoked_it_is(keys: Keys, database: Database) -> None:
    expired, revoked = (keys.create("camera", "device", None, BY) for _ in range(2))
    change(database, expired.row.id, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    keys.revoke(revoked.row.id, BY)
    said = set()
    for key in (expired.key, revoked.key, f"ww_{'0' * 12}_{'0' * 64}", f"ww_{expired.row.id}_{'0' * 64}"):
        with pytest.raises(Unauthenticated) as refused:
            keys.authenticate(key)
        said.add(str(refused.value))
    assert len(said) == 1


def test_a_key_revoked_here_stops_working_at_once(keys: Keys) -> None:
    made = keys.create("camera", "device", None, BY)
    assert keys.authenticate(made.key)
    keys.revoke(made.row.id, BY)
    with pytest.raises(Unauthenticated):
        keys.authenticate(made.key)


def test_a_key_revoked_elsewhere_works_no_longer_than_it_is_remembered(
    keys: Keys, database: Database, clock: Callable[[float], None]
) -> None:
    made = keys.create("camera", "device", None, BY)
    assert keys.authenticate(made.key)
    Keys(database, required=True).revoke(made.row.id, BY)
    assert keys.authenticate(made.key), "remembered"
    clock(keys_module.CACHE_S + 0.1)
    with pytest.raises(Unauthenticated):
        keys.authenticate(made.key)
    assert not keys.was_good(made.key), "so that its holder cannot go on asking without limit"


def test_a_remembered_key_asks_no_database(keys: Keys, database: Database) -> None:
    made = keys.create("camera", "device", None, BY)
    keys.authenticate(made.key)
    asked: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    for _ in range(100):
        keys.authenticate(made.key)
    assert asked == []


def test_a_remembered_key_still_expires_on_time(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    made = keys.create("camera", "device", datetime.now(UTC) + timedelta(hours=1), BY)
    assert keys.authenticate(made.key)

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.now(UTC) + timedelta(hours=2)

    monkeypatch.setattr(keys_module, "datetime", Later)
    with pytest.raises(Unauthenticated):
        keys.authenticate(made.key)


def test_the_memory_of_keys_is_bounded(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "CACHED_KEYS", 2)
    made = [keys.create("camera", "device", None, BY) for _ in range(3)]
    for one in made:
        keys.authenticate(one.key)
    assert [keys.was_good(one.key) for one in made] == [False, True, True]


def test_the_last_use_is_written_once_a_minute(
    keys: Keys, database: Database, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = keys.create("camera", "device", None, BY)
    assert stored(database, made.row.id).last_used_at is None
    keys.authenticate(made.key)
    first = stored(database, made.row.id).last_used_at
    assert first is not None
    assert datetime.now(UTC) - first < timedelta(minutes=1)
    clock(keys_module.CACHE_S + 1)
    keys.authenticate(made.key)
    assert stored(database, made.row.id).last_used_at == first
    change(database, made.row.id, last_used_at=first - timedelta(minutes=2))
    clock(keys_module.CACHE_S + 1)
    keys.authenticate(made.key)
    assert stored(database, made.row.id).last_used_at >= first


def test_a_use_that_cannot_be_written_lets_the_holder_in_all_the_same(keys: Keys, database: Database) -> None:
    made = keys.create("camera", "device", None, BY)

    def fail(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE"):
            raise OperationalError(statement, {}, Exception("database is locked"))

    event.listen(database.engine, "before_cursor_execute", fail)
    with capture_logs() as logs:
        assert keys.authenticate(made.key).id == made.row.id
    assert [log["event"] for log in logs] == ["last use of a key not recorded"]


def test_rotation_gives_a_new_key_and_the_old_one_an_end(keys: Keys, database: Database) -> None:
    old = keys.create("camera", "device", None, BY)
    keys.authenticate(old.key)
    new = keys.rotate(old.row.id, 3600, BY)
    assert (new.row.name, new.row.scope, new.row.expires_at) == ("camera", "device", None)
    assert keys.authenticate(old.key).id != keys.authenticate(new.key).id
    end = stored(database, old.row.id).expires_at
    assert end is not None
    assert timedelta(minutes=59) < end - datetime.now(UTC) <= timedelta(hours=1)


def test_rotation_without_overlap_ends_the_old_key_at_once(keys: Keys) -> None:
    old = keys.create("camera", "device", None, BY)
    keys.authenticate(old.key)
    new = keys.rotate(old.row.id, 0, BY)
    assert keys.authenticate(new.key)
    with pytest.raises(Unauthenticated):
        keys.authenticate(old.key)
    with pytest.raises(KeyNotActive):
        keys.rotate(old.row.id, 0, BY)


def test_rotation_keeps_the_lifetime_and_never_lengthens_the_old_one(keys: Keys, database: Database) -> None:
    old = keys.create("camera", "device", datetime.now(UTC) + timedelta(minutes=10), BY)
    new = keys.rotate(old.row.id, 3600, BY)
    assert stored(database, old.row.id).expires_at == old.row.expires_at
    assert new.row.expires_at is not None
    assert abs(new.row.expires_at - datetime.now(UTC) - timedelta(minutes=10)) < timedelta(seconds=30)


def test_a_revoked_key_cannot_be_rotated_back_to_life(keys: Keys) -> None:
    made = keys.create("admin", "admin", None, BY)
    keys.revoke(made.row.id, BY)
    with pytest.raises(KeyNotActive):
        keys.rotate(made.row.id, 0, BY)


@pytest.mark.parametrize("key_id", ["", "0" * 12, "' OR 1=1", "0" * 400, "../../etc"])
def test_a_key_that_is_not_there_is_called_so(keys: Keys, key_id: str) -> None:
    for ask in (keys.find, lambda it: keys.revoke(it, BY), lambda it: keys.rotate(it, 0, BY)):
        with pytest.raises(UnknownKey):
            ask(key_id)


def test_every_deed_is_in_the_trail_and_nothing_is_told_twice(keys: Keys, database: Database) -> None:
    first = keys.create("camera", "device", None, BY).row.id
    second = keys.rotate(first, 60, BY).row.id
    keys.revoke(first, BY)
    keys.revoke(first, BY)
    assert trail(database) == [
        (BY.id, "key.create", first),
        (BY.id, "key.rotate", first),
        (BY.id, "key.revoke", first),
    ]
    assert second != first


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(days=-1), timedelta(days=4000)])
def test_a_key_ends_in_the_future_and_not_too_far_in_it(keys: Keys, database: Database, ahead: timedelta) -> None:
    with pytest.raises(InvalidExpiry):
        keys.create("camera", "device", datetime.now(UTC) + ahead, BY)
    assert trail(database) == []


def test_pages_hold_every_key_once(keys: Keys) -> None:
    made = sorted(keys.create(f"camera {number}", "device", None, BY).row.id for number in range(5))
    listed: list[str] = []
    after: str | None = ""
    while after is not None:
        page = keys.page(after, 2)
        listed += [key.id for key in page.keys]
        after = page.continue_after
    assert listed == made
    with pytest.raises(InvalidPageToken):
        keys.page("no id", 2)


def test_a_server_with_keys_and_no_admin_refuses_to_start(keys: Keys, database: Database) -> None:
    with pytest.raises(NoAdminKey, match="widthwise keys create"):
        keys.require_an_admin_key("0.0.0.0")
    device = keys.create("camera", "device", None, BY)
    with pytest.raises(NoAdminKey):
        keys.require_an_admin_key("0.0.0.0")
    admin = keys.create("me", "admin", None, BY)
    keys.require_an_admin_key("0.0.0.0")
    keys.revoke(admin.row.id, BY)
    with pytest.raises(NoAdminKey):
        keys.require_an_admin_key("0.0.0.0")
    assert keys.authenticate(device.key)
    Keys(database, required=True, admin_key=ADMIN_KEY).require_an_admin_key("0.0.0.0")
    Keys(database, required=False).require_an_admin_key("127.0.0.1")


def test_the_admin_key_of_the_environment_is_an_admin_and_stored_nowhere(database: Database) -> None:
    keys = Keys(database, required=True, admin_key=ADMIN_KEY)
    assert keys.authenticate(ADMIN_KEY) == Actor("admin-key", "admin")
    with pytest.raises(Unauthenticated):
        keys.authenticate(ADMIN_KEY[:-1])
    with pytest.raises(Unauthenticated):
        Keys(database, required=True).authenticate(ADMIN_KEY)
    assert keys.page("", 10).keys == []


# The same over HTTP and by the command line.


@pytest.fixture
def admin(make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    app = make_app(auth="keys", admin_key=ADMIN_KEY)
    with TestClient(app, headers={"authorization": f"Bearer {ADMIN_KEY}"}) as client:
        yield client


def test_a_key_is_made_used_rotated_and_revoked_over_http(admin: TestClient) -> None:
    made = admin.post("/keys", json={"name": "gate camera", "scope": "device"})
    assert made.status_code == 201, made.text
    assert made.headers["cache-control"] == "no-store"
    body = made.json()
    bearer = {"authorization": f"Bearer {body['key']}"}
    assert admin.get("/chains", headers=bearer).status_code == 200
    shown = admin.get(made.headers["location"]).json()
    assert shown["state"] == "active"
    assert shown["last_used_at"] is not None
    assert "key" not in shown
    rotated = admin.post(f"/keys/{body['id']}/rotate", json={"overlap_s": 60})
    assert rotated.status_code == 201, rotated.text
    assert admin.get("/chains", headers=bearer).status_code == 200, "the old key overlaps"
    assert admin.delete(f"/keys/{body['id']}").status_code == 204
    assert admin.get("/chains", headers=bearer).status_code == 401
    assert admin.get("/chains", headers={"authorization": f"Bearer {rotated.json()['key']}"}).status_code == 200
    listed = admin.get("/keys").json()["keys"]
    assert {key["id"]: key["state"] for key in listed} == {body["id"]: "revoked", rotated.json()["id"]: "active"}
    assert body["key"] not in admin.get("/keys").text + admin.get("/audit").text


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"scope": "root"}, "/scope"),
        ({"name": ""}, "/name"),
        ({"name": "x" * 65}, "/name"),
        ({"name": "two\nlines"}, "/name"),
        ({"name": "\x1b[2J"}, "/name"),
        ({"expires_at": 4e9}, "/expires_at"),
        ({"expires_at": "2099-01-01"}, "/expires_at"),
        ({"expires_at": "2099-01-01T00:00:00"}, "/expires_at"),
        ({"secret": "mine"}, "/secret"),
    ],
)
def test_a_key_that_is_asked_for_wrongly(admin: TestClient, change: dict[str, object], pointer: str) -> None:
    answer = admin.post("/keys", json={"name": "camera", "scope": "device", **change})
    assert (answer.status_code, answer.json()["code"]) == (422, "request-invalid")
    assert pointer in {error["pointer"] for error in answer.json()["errors"]}


@pytest.mark.parametrize("when", ["2001-01-01T00:00:00Z", "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+12:00"])
def test_a_key_that_would_end_at_an_odd_time(admin: TestClient, when: str) -> None:
    answer = admin.post("/keys", json={"name": "camera", "scope": "device", "expires_at": when})
    assert (answer.status_code, answer.json()["code"]) == (422, "expiry-invalid")


def test_the_trail_is_read_newest_first_page_by_page(admin: TestClient) -> None:
    ids = [admin.post("/keys", json={"name": "c", "scope": "device"}).json()["id"] for _ in range(3)]
    admin.delete(f"/keys/{ids[0]}", headers={"x-request-id": "the-deed"})
    newest = admin.get("/audit?page_size=2").json()
    assert [(entry["action"], entry["target"]) for entry in newest["entries"]] == [
        ("key.revoke", ids[0]),
        ("key.create", ids[2]),
    ]
    assert newest["entries"][0]["request_id"] == "the-deed"
    assert newest["entries"][0]["actor"] == "admin-key"
    older = admin.get("/audit", params={"page_size": 100, "page_token": newest["next_page_token"]}).json()
    assert [entry["target"] for entry in older["entries"]][:2] == [ids[1], ids[0]]
    assert older["next_page_token"] is None
    for token in ("x", "MQ", "LTE", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5"):  # the last two: -1, and more than 64 bits
        answer = admin.get("/audit", params={"page_token": token})
        assert answer.status_code in ({200} if token == "MQ" else {422}), token


def test_keys_by_the_command_line(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, make_app: Callable[..., FastAPI]
) -> None:
    monkeypatch.setenv("WIDTHWISE_DATA_DIR", f"{tmp_path}/cli")
    monkeypatch.setattr("app.logs.configure", lambda *_: None)  # it is for a process of its own
    run = CliRunner().invoke
    made = run(cli, ["keys", "create", "me", "--scope", "admin", "--expires-in-days", "30"])
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    key_id = key.split("_")[1]
    with TestClient(make_app(data_dir=f"{tmp_path}/cli", auth="keys")) as client:
        assert client.get("/keys", headers={"authorization": f"Bearer {key}"}).status_code == 200
    listed = run(cli, ["keys", "list"]).stdout
    assert key_id in listed
    assert "last used" in listed
    assert key not in listed
    rotated = run(cli, ["keys", "rotate", key_id, "--overlap-s", "0"]).stdout.strip()
    assert rotated.startswith("ww_")
    assert run(cli, ["keys", "revoke", rotated.split("_")[1]]).exit_code == 0
    assert run(cli, ["keys", "create", "bad\nname"]).exit_code == 2
    assert isinstance(run(cli, ["keys", "revoke", "nothing"]).exception, UnknownKey)
