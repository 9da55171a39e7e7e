"""Settings: one object, read from the environment when it is made and never at import.

Every default is the embedded one: SQLite and a folder inside `data_dir`, served on loopback. The unsafe choice of this
version, answering the network while API keys do not exist yet, is refused unless it is asked for by a name that nobody
sets by accident.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import AliasChoices, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """The service's settings; field `x` is read from `WIDTHWISE_X` (`port` also from `PORT`).

    `database_url` and `storage_url` default to places inside `data_dir`. S3 credentials are not settings: boto3 takes
    them from the ordinary AWS variables and files.
    """

    model_config = SettingsConfigDict(
        env_prefix="WIDTHWISE_", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    data_dir: Path = Path("data")
    database_url: SecretStr | None = None
    storage_url: str | None = None
    s3_endpoint_url: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, validation_alias=AliasChoices("WIDTHWISE_PORT", "PORT"))] = 8000
    allow_open_bind: bool = False
    max_body_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024
    chain_cache_bytes: Annotated[int, Field(ge=0)] = 1024**3
    log_level: LogLevel = "info"

    @model_validator(mode="after")
    def _refuse_open_bind(self) -> Settings:
        if not is_loopback(self.host) and not self.allow_open_bind:
            raise ValueError(
                f"host {self.host} would answer the network, and this version has no API keys yet. Bind 127.0.0.1, or, "
                "inside a container whose port is published on loopback only, set WIDTHWISE_ALLOW_OPEN_BIND=true"
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
    def storage(self) -> str:
        """`file:///folder` or `s3://bucket/prefix`."""
        return self.storage_url or (self.data_dir.absolute() / "objects").as_uri()


def is_loopback(host: str) -> bool:
    """True for `localhost` and the addresses of 127.0.0.0/8 and ::1; a name that must be looked up is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
