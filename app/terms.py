"""What may be done with a teacher, a data set, or what was made from them.

A chain inherits the strictest of everything it was made from. `unknown` is the strictest: nobody has said anything, so
nothing may be assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

Terms = Literal["any", "research", "unknown"]  # from free to strict: any use, research only, nobody has said
ConsentBasis = Literal["synthetic", "consent", "public", "legitimate-interest", "unknown"]  # of people in images
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Rights:
    """A licence in its maker's words, its terms, and why the images of people in it may be used."""

    license: str
    terms: Terms
    consent_basis: ConsentBasis

    @property
    def unknowns(self) -> tuple[str, ...]:
        """The names of what nobody has said."""
        return tuple(name for name in ("terms", "consent_basis") if getattr(self, name) == UNKNOWN)


class Ruled(Protocol):
    """What has rights: rows of chains, teachers and data sets, whose texts were checked on their way in."""

    @property
    def license(self) -> str: ...
    @property
    def terms(self) -> str: ...
    @property
    def consent_basis(self) -> str: ...


def rights_of(ruled: Ruled) -> Rights:
    """What may be done with it."""
    return Rights(ruled.license, cast("Terms", ruled.terms), cast("ConsentBasis", ruled.consent_basis))


def strictest(rights: Sequence[Rights]) -> Rights:
    """What holds for something made from all of these; licences are named one after another.

    >>> strictest([Rights("MIT", "any", "synthetic"), Rights("CC-BY-NC-4.0", "research", "public")])
    Rights(license='MIT AND CC-BY-NC-4.0', terms='research', consent_basis='public')
    """
    terms, bases = get_args(Terms), get_args(ConsentBasis)
    return Rights(
        " AND ".join(dict.fromkeys(right.license for right in rights)),
        max((right.terms for right in rights), key=terms.index),
        max((right.consent_basis for right in rights), key=bases.index),
    )
