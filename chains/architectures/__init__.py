"""The tables of all architectures this library knows, by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from chains.arch import Architecture
from chains.architectures import mobilenetv2, msinet, osnet, resnet, vit
from chains.errors import ArchitectureError

TABLES: dict[str, Callable[[str], Architecture]] = {
    **dict.fromkeys(resnet.RESNETS, resnet.table),
    mobilenetv2.MOBILENETV2: mobilenetv2.table,
    msinet.MSINET: msinet.table,
    **dict.fromkeys(osnet.OSNETS, osnet.table),
    **dict.fromkeys(vit.VITS, vit.table),
}

# Families whose names are written by a grammar, by how names begin; more of their names are known than listed above.
FAMILIES: dict[str, Callable[[str], Architecture]] = {"resnet": resnet.table, "vit_": vit.table}


def register(name: str, table: Callable[[str], Architecture]) -> None:
    """Make an architecture of your own known in this process: chains of it can be loaded and served. `table` is called
    with `name`; `chains.backbones.register` adds its torch module too. Raises `ArchitectureError` for a name that is
    taken, for a table of another name, and for one that is not sound."""
    if is_architecture(name):
        raise ArchitectureError(f"there is an architecture '{name[:40]}' already; choose another name")
    made = table(name)
    if made.name != name:
        raise ArchitectureError(f"the table registered as '{name[:40]}' calls itself '{made.name[:40]}'")
    made.require_sound()
    TABLES[name] = table


def architecture_names() -> tuple[str, ...]:
    """Those to list; `architecture` knows all that their families' grammars have."""
    return tuple(TABLES)


def is_architecture(name: str) -> bool:
    try:
        architecture(name)
    except ArchitectureError:
        return False
    return True


@lru_cache(maxsize=256)  # a grammar has more names than anybody should keep
def architecture(name: str) -> Architecture:
    """The architecture called `name`. Raises `ArchitectureError` when there is none."""
    table = TABLES.get(name) or next((FAMILIES[start] for start in FAMILIES if name.startswith(start)), None)
    if table is None:
        raise ArchitectureError(f"no architecture '{name[:40]}'; there are: {', '.join(TABLES)}")
    return table(name)
