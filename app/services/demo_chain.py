"""The demo chain that ships with the package."""

from __future__ import annotations

from importlib.resources import files

from app.db.tables import ChainRow
from app.services.registry import Registry
from app.terms import Rights
from chains import artifact

DEMO_CHAIN = files("chains").joinpath("demo", "synthetic-r18.safetensors")


def publish_demo_chain_if_empty(registry: Registry) -> ChainRow | None:
    """Publish the demo chain into an empty registry; `None` when there were chains, or the package carries no demo.

    Idempotent, also when two servers start at once.
    """
    if not registry.is_empty() or not DEMO_CHAIN.is_file():
        return None
    content = DEMO_CHAIN.read_bytes()
    license_ = artifact.load(content).chain.license
    return registry.publish(content, rights=Rights(license_, "any", "synthetic"))  # of people who do not exist
