"""Settings: one object, read from the environment when it is made and never at import.

Every default is the embedded one: SQLite and a folder inside `data_dir`, served on loopback without API keys. The
unsafe choice, answering the network without keys, is refused unless it is asked for by a name that nobody sets by
accident.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, unquote, urlsplit

import limits
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

LogLevel = Literal["debug", "info", "warning", "error"]
AuthMode = Literal["auto", "keys", "open"]
MIN_ADMIN_KEY = 32  # characters; half a sha256 in hex


def _strong(key: SecretStr) -> SecretStr:
    """Raises `ValueError` for a key that can be guessed, or that no HTTP header can carry."""
    text = key.get_secret_value()
    if len(text) < MIN_ADMIN_KEY:
        raise ValueError(f"has {len(text)} characters and needs {MIN_ADMIN_KEY}; make one with `openssl rand -hex 32`")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("must be ASCII letters, digits and signs, without spaces")
    return key


def _rate(text: str) -> str:
    """Raises `ValueError` for what is no rate."""
    try:
        limits.parse(text)
    except ValueError as error:
        raise ValueError(f"'{text[:80]}' is no rate: write it as 100/minute or 5 per 10 seconds") from error
    return text


def _absolute(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Raises `ValueError` for a path that depends on where the process was started."""
    if relative := [path for path in paths if not path.is_absolute()]:
        raise ValueError(f"'{relative[0]}' must be an absolute path")
    return paths


def _listed(value: object) -> object:
    """`a, b` as a list: the environment holds text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


PathList = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_absolute)]
NameList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]
AdminKey = Annotated[SecretStr, AfterValidator(_strong)]
Rate = Annotated[str, AfterValidator(_rate)]
LogFormat = Literal["auto", "console", "json"]


class Settings(BaseSettings):
    """The service's settings; field `x` is read from `WIDTHWISE_X` (`port` also from `PORT`).

    `database_url` and `storage_url` default to places inside `data_dir`. S3 credentials are not settings: boto3 takes
    them from the ordinary AWS variables and files.
    """

    model_config = SettingsConfigDict(
        env_prefix="WIDTHWISE_",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    data_dir: Path = Path("data")
    database_url: SecretStr | None = None
    storage_url: str | None = None
    s3_endpoint_url: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, validation_alias=AliasChoices("WIDTHWISE_PORT", "PORT"))] = 8000
    allow_open_bind: bool = False
    auth: AuthMode = "auto"
    admin_key: AdminKey | None = None
    rate_limit: Rate = "100000/minute"
    auth_failure_limit: Rate = "20/minute"
    rate_limit_storage_url: SecretStr | None = None
    body_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30
    max_body_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024
    chain_cache_bytes: Annotated[int, Field(ge=0)] = 1024**3
    log_level: LogLevel = "info"
    embedded_worker: bool | None = None  # None: yes on SQLite
    worker_slots: Annotated[int, Field(ge=1, le=64)] = 1
    work_dir: Path | None = None
    heartbeat_s: Annotated[float, Field(gt=0)] = 5
    lease_s: Annotated[float, Field(gt=0)] = 20
    queue_poll_s: Annotated[float, Field(gt=0)] = 1
    step_attempts: Annotated[int, Field(ge=1)] = 5
    retry_wait_s: Annotated[float, Field(gt=0)] = 2
    job_takeovers: Annotated[int, Field(ge=1)] = 10
    child_grace_s: Annotated[float, Field(ge=0)] = 5
    max_train_processes: Annotated[int, Field(ge=1, le=1024)] = 8
    checkpoint_upload_s: Annotated[float, Field(gt=0)] = 60
    upload_part_bytes: Annotated[int, Field(ge=64 * 1024, le=1024**3)] = 8 * 1024**2
    max_upload_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024**3
    dataset_roots: PathList = ()
    dataset_buckets: NameList = ()
    dataset_max_files: Annotated[int, Field(ge=1)] = 1_000_000
    dataset_max_bytes: Annotated[int, Field(ge=1024**2)] = 64 * 1024**3
    dataset_check_memory_bytes: Annotated[int, Field(ge=1024**3)] = 4 * 1024**3
    dataset_check_timeout_s: Annotated[float, Field(gt=0)] = 4 * 3600
    max_open_uploads: Annotated[int, Field(ge=1)] = 32
    upload_retention_h: Annotated[float, Field(gt=0)] = 48
    teacher_check_memory_bytes: Annotated[int, Field(ge=1024**3)] = 8 * 1024**3
    teacher_check_timeout_s: Annotated[float, Field(gt=0)] = 900
    job_retention_days: Annotated[float, Field(gt=0)] = 30
    gc_interval_h: Annotated[float, Field(ge=0)] = 24
    gc_grace_h: Annotated[float, Field(ge=1)] = 24
    log_format: LogFormat = "auto"
    worker_metrics_port: Annotated[int | None, Field(ge=0, le=65535)] = None

    @model_validator(mode="after")
    def _refuse_open_bind(self) -> Settings:
        if not (self.keys_required or is_loopback(self.host) or self.allow_open_bind):
            raise ValueError(
                f"host {self.host} would answer the network, and WIDTHWISE_AUTH=open asks nobody for an API key. Leave "
                "WIDTHWISE_AUTH at auto or keys, bind 127.0.0.1, or, where something in front of this port guards it, "
                "set WIDTHWISE_ALLOW_OPEN_BIND=true"
            )
        return self

    @property
    def keys_required(self) -> bool:
        """`auto` asks for keys on every address but loopback."""
        return self.auth == "keys" or (self.auth == "auto" and not is_loopback(self.host))

    @property
    def rate_limit_storage(self) -> str:
        """URL for the `limits` library; may hold a password. Memory is that of one process."""
        return self.rate_limit_storage_url.get_secret_value() if self.rate_limit_storage_url else "memory://"

    @model_validator(mode="after")
    def _beat_within_lease(self) -> Settings:
        if self.heartbeat_s * 2 > self.lease_s:
            raise ValueError(
                f"lease_s {self.lease_s:g} must be at least twice heartbeat_s {self.heartbeat_s:g}: a worker that "
                "misses one sign of life would lose its jobs"
            )
        return self

    @property
    def database(self) -> str:
        """The SQLAlchemy URL; may hold a password, so it is never logged. Plain `postgresql://` means psycopg 3."""
        if self.database_url is None:
            return f"sqlite:///{quote(str(self.data_dir.absolute() / 'widthwise.db'))}"
        url = self.database_url.get_secret_value()
        scheme, separator, rest = url.partition("://")
        return f"postgresql+psycopg://{rest}" if separator and scheme in ("postgres", "postgresql") else url

    @property
    def runs_worker(self) -> bool:
        """Whether `widthwise serve` runs jobs itself."""
        return self.database.startswith("sqlite") if self.embedded_worker is None else self.embedded_worker

    @property
    def work(self) -> Path:
        """Where workers keep what a running job needs; nothing in it must survive them."""
        return self.work_dir or self.data_dir.absolute() / "work"

    @property
    def secrets(self) -> list[str]:
        """Every secret these settings hold, as it may turn up in an error: passwords also as they stand in the URL."""
        found = [self.admin_key.get_secret_value()] if self.admin_key else []
        for url in (self.database_url, self.rate_limit_storage_url):
            password = _password(url) if url else None
            found += [password, unquote(password)] if password else []
        return found

    @property
    def storage(self) -> str:
        """`file:///folder` or `s3://bucket/prefix`."""
        return self.storage_url or (self.data_dir.absolute() / "objects").as_uri()


def _password(url: SecretStr) -> str | None:
    """As it stands in the URL; none in what is no URL, which whoever connects to it will say."""
    try:
        return urlsplit(url.get_secret_value()).password
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """True for `localhost` and the addresses of 127.0.0.0/8 and ::1; a name that must be looked up is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
