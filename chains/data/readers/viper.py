"""VIPeR (Gray et al., PETS 2007): 632 people, one image each from two cameras.

    cam_a/  cam_b/    000_45.bmp    pid 0, seen at 45 degrees

Protocol as in torchreid: people are shuffled, half are trained on (316), the other half is tested, one camera against
the other. Papers average over ten such splits in both directions: read with seeds 0 … 9 and `query_camera` "a" and "b".
The splits are those of our seeds, torchreid's are drawn without one: compare averages, never a single split.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from chains.data.files import ImageFiles
from chains.data.readers.dataset import Camera, DataSet, ReadOptions
from chains.data.readers.listing import Listing, missing
from chains.errors import DataError

CAMIDS: dict[Camera, int] = {"a": 1, "b": 2}
NAME = re.compile(r"([0-9]{1,9})_")
PEOPLE = 632


def why_not_viper(root: Path) -> str | None:
    return missing(root, [f"cam_{camera}" for camera in CAMIDS])


def read_viper(root: Path, options: ReadOptions) -> DataSet:
    listing = Listing(root)
    if lacking := why_not_viper(root):
        raise DataError(f"{root}: {lacking}, so this is not VIPeR as it is published")
    seen = {camera: _one_each(listing, camera) for camera in CAMIDS}
    for pid in sorted(seen["a"].keys() ^ seen["b"].keys()):
        path = seen["a"].get(pid) or seen["b"][pid]
        raise DataError(f"{path}: person {pid} has no image from the other camera")
    pids = sorted(seen["a"])
    if len(pids) < 2:
        raise DataError(f"{root}: {len(pids)} people cannot be split into training and test")
    shuffled = np.random.default_rng(options.seed).permutation(pids)
    trained, tested = (sorted(part.tolist()) for part in np.split(shuffled, [len(pids) // 2]))

    def images(people: list[int], *cameras: Camera) -> ImageFiles:
        rows = [(seen[camera][pid], pid, CAMIDS[camera]) for pid in people for camera in cameras]
        paths, chosen_pids, camids = zip(*rows, strict=True)
        return ImageFiles.of(paths, chosen_pids, camids, options.size)

    gallery_camera: Camera = "b" if options.query_camera == "a" else "a"
    notes = [
        f"split with seed {options.seed}: {len(trained)} of {len(pids)} people to train",
        f"queries from camera {options.query_camera}, gallery from camera {gallery_camera}",
    ]
    if len(pids) != PEOPLE:
        notes.append(f"{len(pids)} people; VIPeR as published has {PEOPLE}")
    return DataSet(
        "VIPeR",
        root,
        images(trained, "a", "b"),
        images(tested, options.query_camera),
        images(tested, gallery_camera),
        listing.reasons(),
        tuple(notes),
    )


def _one_each(listing: Listing, camera: Camera) -> dict[int, Path]:
    """The image of each person from one camera."""
    found: dict[int, Path] = {}
    for path in listing.images(f"cam_{camera}"):
        name = NAME.match(path.name)
        if name is None:
            listing.leave_out("the name does not begin like 000_", path)
        elif int(name[1]) in found:
            raise DataError(f"{path}: a second image of person {int(name[1])}, beside {found[int(name[1])].name}")
        else:
            found[int(name[1])] = path
    return found
