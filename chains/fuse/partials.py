"""Partial teachers: networks of this project, or ONNX graphs from anywhere, that look at one view of the person.

They only answer. They have no gradient, stay in evaluation mode and are no part of what is trained or checkpointed. A
graph is a program: run those that you trust, or confine them (`chains.fuse.answering`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from chains.chain import InputSpec
from chains.errors import ChainMismatch, DataError, WeightsRefused
from chains.export import read_exported
from chains.fuse.answering import Answerer, here
from chains.fuse.crops import crop_view
from chains.fuse.views import View, whole
from chains.importers.containers import sniff
from chains.importers.frozen import Pixels, require_shapes, same_pixels
from chains.model import ReIDModel
from chains.pipeline import IMAGENET_MEAN, IMAGENET_STD

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
PROBES = 2  # images: a graph that takes one at a time only is found out


@dataclass(frozen=True, eq=False)
class Answer:
    """What a network makes of images: its feature map (n, C, h, w), `None` where it shows none, the pooled feature in
    front of the neck and the embedding behind it, both (n, D); for graphs both are the embedding."""

    map: Tensor | None
    feature: Tensor
    embedding: Tensor


def perceive(model: ReIDModel, images: Tensor) -> Answer:
    """`ReIDModel.forward` with the feature map, where the backbone has not pooled by itself."""
    found: Tensor = model.backbone(images)
    feature = found.mean(dim=(2, 3)) if found.ndim == 4 else found
    return Answer(found if found.ndim == 4 else None, feature, model.neck(feature))


@dataclass(frozen=True, eq=False)
class Partial:
    """A frozen network and the view it looks at.

    name: of its file, or of the run directory. sha256: of the file. pixels: mean and std it was trained with.
    map_shape: (C, h, w) of its map. notes: what was taken as known, for the user. run: normalised images (n, 3,
    `view.height`, `view.width`) → answer.
    """

    name: str
    sha256: str
    view: View
    pixels: Pixels
    embedding_dim: int
    map_shape: tuple[int, int, int] | None
    notes: tuple[str, ...]
    run: Callable[[Tensor], Answer]

    @torch.no_grad()
    def answer(self, images: Tensor, input: InputSpec) -> Answer:
        """Of full images (n, 3, H, W) that are normalised as `input` says: the view is cut, that normalisation undone
        and the network's own applied. Raises `WeightsRefused`, also for an answer of another form than that to the
        images it was opened with, and for numbers that are not finite."""
        try:
            answer = self.run(_normalised_anew(crop_view(images, self.view), input, self.pixels))
            _require_form(answer, len(images), self.embedding_dim, self.map_shape)
            _require_finite(answer)
            return answer
        except WeightsRefused as error:
            raise WeightsRefused(f"input '{self.name}': {error}") from error


def run_here(path: Path) -> Answerer:
    """The graph in `path`, run by this process on as many threads as torch. Raises `WeightsRefused`."""
    return here(path, torch.get_num_threads())


def open_partial(
    path: Path,
    view: View | None = None,
    pixels: Pixels | None = None,
    usual_size: tuple[int, int] = (256, 128),
    open_graph: Callable[[Path], Answerer] = run_here,
) -> Partial:
    """The network in `path`: a file of this project, a run directory's `teacher.safetensors`, or an ONNX graph.

    view: by default the whole image, at the size that the file states, else at `usual_size` (height, width). pixels: of
    a graph that does not state them; by default ImageNet's. open_graph: who runs a graph.

    Raises `ChainMismatch` where the file states otherwise, `WeightsRefused` and `ChainFileError` for files that are of
    no use, `DataError` for one that is not there.
    """
    file = path / "teacher.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"input '{file}' is not there")
    try:
        kind = sniff(file)
        if kind == "torch":
            raise WeightsRefused(
                "a torch checkpoint is no partial teacher as it is: export the network to ONNX, or write it as "
                "safetensors of this project (python -m chains.importers.check --teacher)"
            )
        if kind == "onnx":
            found = _graph(file, view, pixels, usual_size, open_graph(file))
        else:
            found = _network(file, view, pixels)
    except WeightsRefused as error:
        raise WeightsRefused(f"input '{file}': {error}") from error
    return found if path == file else replace(found, name=path.resolve().name)


class Network:
    """A network of this project that only answers, wherever its images are."""

    def __init__(self, model: ReIDModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Answer:
        return perceive(self.model.to(images.device), images)


def _network(file: Path, view: View | None, pixels: Pixels | None) -> Partial:
    exported = read_exported(file)
    stated = exported.origin.input
    view = view or whole(stated.height, stated.width)
    _require_size(file, view, stated.height, stated.width)
    if pixels is not None and not same_pixels(pixels, (stated.mean, stated.std)):
        raise _other_pixels(file, pixels, (stated.mean, stated.std))
    return _probed(file, view, (stated.mean, stated.std), (), Network(exported.model))


class Graph:
    """A graph that only answers, with arrays on the CPU."""

    def __init__(self, graph: Answerer) -> None:
        self.graph = graph

    def __call__(self, images: Tensor) -> Answer:
        embedding, found = self.graph.answer(images.detach().cpu().numpy())
        tensor = torch.from_numpy(embedding).to(images.device)
        return Answer(None if found is None else torch.from_numpy(found).to(images.device), tensor, tensor)


def _graph(
    file: Path, view: View | None, pixels: Pixels | None, usual_size: tuple[int, int], graph: Answerer
) -> Partial:
    stated, notes = graph.pixels, []
    if stated is not None and pixels is not None and not same_pixels(pixels, stated):
        raise _other_pixels(file, pixels, stated)
    if stated is None and pixels is None:
        notes.append("nobody stated its mean and std, so ImageNet's were taken")
    if view is None:
        view = whole(graph.height or usual_size[0], graph.width or usual_size[1])
        if graph.height is None or graph.width is None:
            notes.append(f"it takes any size, so the whole image as {view.height} × {view.width} was taken")
    _require_size(file, view, graph.height, graph.width)
    return _probed(file, view, stated or pixels or IMAGENET, tuple(notes), Graph(graph))


def _probed(file: Path, view: View, pixels: Pixels, notes: tuple[str, ...], run: Callable[[Tensor], Answer]) -> Partial:
    """The teacher, with the shapes of what it answers to a few black images. Raises `WeightsRefused` for others."""
    with torch.no_grad():
        answer = run(torch.zeros(PROBES, 3, view.height, view.width))
    embedding, found = answer.embedding, answer.map
    require_shapes(PROBES, tuple(embedding.shape), None if found is None else tuple(found.shape))
    _require_finite(answer)
    shape = None if found is None else (found.shape[1], found.shape[2], found.shape[3])
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return Partial(file.name, sha256, view, pixels, embedding.shape[1], shape, notes, run)


def _require_form(answer: Answer, images: int, dim: int, map_shape: tuple[int, int, int] | None) -> None:
    found = None if answer.map is None else tuple(answer.map.shape)
    for what, shape, opened in (
        ("an embedding", tuple(answer.embedding.shape), (images, dim)),
        ("a map", found, None if map_shape is None else (images, *map_shape)),
    ):
        if shape != opened:
            raise WeightsRefused(
                f"it answers {what} of shape {shape} to {images} images; what it answered when it was opened asks for "
                f"{opened}"
            )


def _require_finite(answer: Answer) -> None:
    for found in (answer.embedding, answer.map):
        if found is not None and (bad := int((~found.flatten(1).isfinite().all(dim=1)).sum())):
            raise WeightsRefused(f"it answers numbers that are not finite to {bad} of {len(found)} images")


def _normalised_anew(images: Tensor, input: InputSpec, pixels: Pixels) -> Tensor:
    """x' = (x · std + mean - mean') / std': from the normalisation of `input` to that of `pixels`."""
    if (input.mean, input.std) == pixels:
        return images
    mean, std, new_mean, new_std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (input.mean, input.std, *pixels)
    )
    return (images * std + mean - new_mean) / new_std


def _require_size(file: Path, view: View, height: int | None, width: int | None) -> None:
    """`None`: the file takes any."""
    if (height or view.height, width or view.width) != (view.height, view.width):
        there = " × ".join("any" if side is None else str(side) for side in (height, width))
        raise ChainMismatch(
            f"input '{file}' is for images of {there} (height × width); its view says {view.height} × {view.width}"
        )


def _other_pixels(file: Path, said: Pixels, stated: Pixels) -> ChainMismatch:
    return ChainMismatch(
        f"input '{file}' states mean {stated[0]} and std {stated[1]}; the configuration says {said[0]} and {said[1]}"
    )
