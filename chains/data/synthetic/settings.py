"""One synthetic site: how many people, seen by which cameras, how hard to tell apart.

The one surprise: how many people there are changes no picture of them; everything else may.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from chains.errors import DataError

FIRST_TEST_PID = 5001  # training people count from 1, test people from here
LAST_PID = 9999  # a Market-1501 file name has four digits for it

# The least and the most of every setting that is not a percentage.
_BOUNDS = {
    "seed": (0, 2**32 - 1),
    "train_identities": (1, FIRST_TEST_PID - 1),
    "train_images_per_identity": (1, 9999),
    "test_identities": (1, LAST_PID - FIRST_TEST_PID + 1),
    "queries_per_identity": (1, 9999),
    "gallery_images_per_identity": (2, 9999),  # with one alone, a query's own camera may have taken it
    "cameras": (2, 64),
    "height": (16, 1024),
    "width": (8, 512),
    "family_size": (1, 9999),
}


@dataclass(frozen=True)
class PeopleSettings:
    """One synthetic site: how many people, seen by which cameras, how hard to tell apart.

    Percentages are integers 0..100. `family_size` people share a wardrobe and each redraws an attribute with
    `family_change_percent`. How many people there are changes none of them, so a study may train on fewer and test on
    the same pictures. Raises `DataError` for numbers that cannot be rendered or that make a query unanswerable.
    """

    seed: int = 0
    train_identities: int = 2000
    train_images_per_identity: int = 8
    test_identities: int = 200
    queries_per_identity: int = 2
    gallery_images_per_identity: int = 8
    cameras: int = 6
    height: int = 128
    width: int = 64
    family_size: int = 4
    family_change_percent: int = 20
    plain_percent: int = 50  # garments without a pattern
    detail_percent: int = 70  # people with a given detail; rarer details take a half or a third of it
    warm_percent: int = 50  # long sleeves, long trousers, coats
    muted_percent: int = 20  # clothes dyed in dark and neutral colours only
    cast_percent: int = 10  # how far a camera's gain per colour may be off, either way; half as much again per shot
    blur_percent: int = 40  # 0: sharp; 100: a 3 x 3 binomial blur and more
    noise_percent: int = 30
    occlusion_percent: int = 25  # images with something in front
    scale_jitter_percent: int = 10
    shift_jitter_percent: int = 6

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            low, high = (0, 100) if name.endswith("_percent") else _BOUNDS[name]
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise DataError(f"{name} must be an integer from {low} to {high}, not {value!r}")


# A second, unlike site for studies across scenarios: indoors in winter. Muted warm clothes, other cameras with stronger
# casts, more noise and blur, looser boxes; look-alikes in pairs.
STATION = PeopleSettings(
    seed=1,
    cameras=8,
    family_size=2,
    family_change_percent=24,
    plain_percent=45,
    warm_percent=90,
    muted_percent=60,
    cast_percent=20,
    blur_percent=60,
    noise_percent=60,
    occlusion_percent=15,
    scale_jitter_percent=14,
    shift_jitter_percent=8,
)
