"""Where images come from: a data set on disk or the renderer of synthetic people, by a configuration or by one word.

On the command line a source is written `synthetic`, `synthetic:station`, a path (its layout is found out), `kind:path`
such as `msmt17:/data/MSMT17`, or a TOML file, whose [data] it then is: a run's, or one with nothing else in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chains.config import SYNTHETIC, DataConfig, read_data
from chains.data.images import Images
from chains.data.readers import KINDS, DataSet, ReadOptions, detect, read
from chains.data.synthetic import STATION, PeopleSettings, gallery_images, query_images, train_images
from chains.errors import DataError


@dataclass(frozen=True, eq=False)
class Source:
    """The three splits of a data set, each made when first asked for. notes: how it was read, for the user."""

    name: str
    make: Callable[[str], Any]
    notes: tuple[str, ...] = ()

    @cached_property
    def train(self) -> Images:
        return self._some("train")

    @cached_property
    def query(self) -> Images:
        return self._some("query")

    @cached_property
    def gallery(self) -> Images:
        return self._some("gallery")

    def _some(self, split: str) -> Images:
        images: Images = self.make(split)
        if not len(images):
            raise DataError(f"{self.name} has no {split} images")
        return images


def parse_source(text: str) -> DataConfig:
    """A source as written on the command line. Raises `DataError`."""
    if text in SYNTHETIC:
        return DataConfig(kind=text)
    kind, colon, path = text.partition(":")
    has_kind = bool(colon) and kind in KINDS
    if not (path if has_kind else text):
        raise DataError(f"--data {text}{' ' * bool(text)}names no folder or file")
    if has_kind:
        return DataConfig(kind=kind, root=Path(path))
    if text.endswith(".toml"):
        return read_data(Path(text))
    return DataConfig(kind=detect(Path(text)).kind, root=Path(text))


def sized(config: DataConfig, height: int, width: int) -> DataConfig:
    """The same images as crops of another size, as a chain wants to see them."""
    return config.model_copy(update={"height": height, "width": width})


def open_source(config: DataConfig) -> Source:
    """The images of `config`; files are listed, pixels are not touched yet. Raises `DataError`."""
    if config.is_synthetic:
        source = _synthetic(config)
    else:
        dataset = read_dataset(config)
        source = Source(dataset.name, lambda split: getattr(dataset, split), dataset.notes)
    return source if config.name is None else replace(source, name=config.name)


def read_dataset(config: DataConfig) -> DataSet:
    """The data set on disk that `config` names. Raises `DataError` for synthetic people, which lie on none."""
    if config.root is None:
        raise DataError(f"{config.kind} people are rendered, not read: there are no files to look at")
    options = ReadOptions(
        size=config.size,
        seed=config.seed,
        boxes=config.boxes,
        has_val_in_train=config.has_val_in_train,
        query_camera=config.query_camera,
        queries_per_identity=config.queries_per_identity,
    )
    return read(None if config.kind == "auto" else config.kind, config.root, options)


def choose(images: Images, count: int, seed: int) -> Images:
    """A fixed random choice of at most `count` images, of many identities and every camera."""
    return images.take(np.random.default_rng(seed).permutation(len(images))[:count])


def first_identities(query: Images, gallery: Images, count: int) -> tuple[Images, Images]:
    """Queries and gallery images of the `count` identities with the smallest pids among the queries."""
    pids = np.unique(query.pids)[:count]
    queries, found = (images.take(np.flatnonzero(np.isin(images.pids, pids))) for images in (query, gallery))
    return queries, found


def _synthetic(config: DataConfig) -> Source:
    site = "station" if config.kind.endswith("station") else "default"
    height, width = config.size
    try:
        start = STATION if site == "station" else PeopleSettings()
        settings = replace(start, **{**config.people, "height": height, "width": width})
    except TypeError as error:
        raise DataError(f"data.people: {error}; see PeopleSettings for the names") from error
    makers = {"train": train_images, "query": query_images, "gallery": gallery_images}
    changed = "".join(f", {name} {value}" for name, value in sorted(config.people.items()))
    return Source(f"synthetic people, {site} settings{changed}", lambda split: makers[split](settings))
