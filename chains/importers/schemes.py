"""How a toolkit names its tensors, as data, and reading a network by it.

A scheme says where in a file each tensor of our tables is, what else a file of its toolkit holds and why that does not
matter, and which architecture its code builds, where two toolkits have the same names for different functions. Reading
never guesses: every tensor of the network is found or its absence is refused with its name, and what lies among the
layers of the network and is none of its tensors is refused, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chains.arch import NORM_EPSILON, Architecture
from chains.architectures import architecture
from chains.chain import STATISTICS
from chains.errors import WeightsRefused, WidthError
from chains.importers.containers import State
from chains.importers.strangers import stranger
from chains.model import ReIDModel, model_of
from chains.width import Width

NECK = "neck."
BATCHES = "num_batches_tracked"
IMAGENET_CLASSES = 1000
MAX_EMBEDDING = 9999
PIXELS = ("pixel_mean", "pixel_std")  # of pixels 0..255, as fast-reid keeps them
NOT_OURS = "outside the network: nothing of the embedding reads it"
Arrays = dict[str, NDArray[np.float32]]
Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True, eq=False)
class Recognised:
    """A network found in a file, in eval mode.

    neck: whether the file has one; without, `identity_neck` makes one. classifier: (identities, D), where it has one.
    pixels: mean and std of pixels 0..1, where the file says them. pretraining: why it is no teacher of people but only
    something to begin with; `None` for a teacher. matched: tensors of the file that were taken. missing: tensors of the
    network that the file lacks, with what stands in for them; ignored: tensors of the file that play no part, with the
    reason; notes: what was done or assumed, for people; assumed: that one of them which says why this architecture was
    taken, where others have the same tensors."""

    toolkit: str
    model: ReIDModel
    neck: bool
    classifier: Tensor | None
    pixels: Pixels | None
    pretraining: str | None
    matched: int
    missing: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    assumed: str | None = None


@dataclass(frozen=True)
class Match:
    """How well a scheme explains a file: `share`, from 0 to 1, of all tensors that the one wants or the other has among
    the layers of the network; `left_over`: how many tensors elsewhere it cannot tell. `take` reads the network, or
    raises `WeightsRefused` with the first mismatch."""

    share: float
    take: Callable[[], Recognised]
    left_over: int = 0

    @property
    def rank(self) -> tuple[float, int]:
        """Greater is better."""
        return self.share, -self.left_over


@dataclass(frozen=True)
class Scheme:
    """A toolkit's names for some architectures, of which the nearest is taken.

    renames: how names begin, in our tables and in the file; the first that fits counts, and the last one, ("", prefix),
        is the backbone's. necks: where the neck may be; none there: the embedding is the feature in front of it.
    marks: names that a file must have to be looked at; bars: beginnings that it must not have.
    classifiers: where the classifier may be. ignored: regular expression -> why such tensors change no embedding.
    examined: regular expression -> what decides that from the values: it answers with the reason, or refuses.
    identities: beginnings of tensors of ours that the toolkit's network has not: they are made to change nothing.
    embedding: the tensor whose rows are the embedding, where the architecture's name ends in `_emb` and their number.
    assumes: what the toolkit's code does that no tensor shows.
    """

    toolkit: str
    architectures: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = (("", ""),)
    necks: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    bars: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    examined: tuple[tuple[str, Callable[[State, str], str]], ...] = ()
    identities: tuple[str, ...] = ()
    embedding: str | None = None
    assumes: str | None = None

    def match(self, tensors: State, stated: str | None = None) -> Match | None:
        """`None` for a file that has not the marks. stated: an architecture that is taken where it is a variant of the
        one found, with the same tensors: what neither tensors nor toolkit say, the owner knows."""
        if not all(mark in tensors for mark in self.marks) or any(n.startswith(b) for n in tensors for b in self.bars):
            return None
        fits = (_Fit.of(self, architecture(name), tensors) for name in self._candidates(tensors))
        best = max(fits, key=lambda fit: fit.share)
        return Match(best.share, lambda: best.take(stated), len(best.foreign))

    def _candidates(self, tensors: State) -> Iterator[str]:
        if self.embedding is None:
            yield from self.architectures
            return
        shape = _shape(tensors, self.embedding)
        if not shape or not 1 <= shape[0] <= MAX_EMBEDDING:
            raise WeightsRefused(
                f"{self.embedding} has shape {shape}; its rows are the embedding, 1 to {MAX_EMBEDDING}"
            )
        yield from (f"{name}_emb{shape[0]}" for name in self.architectures)

    def source(self, name: str, neck: str | None) -> str | None:
        """Where the tensor of our table is in the file; `None`: not in it."""
        if name.startswith(NECK):
            return None if neck is None else neck + name.removeprefix(NECK)
        if name.startswith(self.identities):
            return None
        ours, theirs = next((ours, theirs) for ours, theirs in self.renames if name.startswith(ours))
        return theirs + name.removeprefix(ours)

    def explanation(self, name: str) -> str | None:
        """Why a tensor of the file changes no embedding, where that follows from its name."""
        return next((why for pattern, why in self.ignored if re.search(pattern, name)), None)


@dataclass(frozen=True)
class _Fit:
    """A scheme laid over a file, for one architecture. sources: name in the table -> name in the file; unknown: tensors
    among the network's layers that it has not; foreign: tensors elsewhere."""

    scheme: Scheme
    table: Architecture
    tensors: State
    neck: str | None
    sources: Mapping[str, str]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    foreign: tuple[str, ...]

    @classmethod
    def of(cls, scheme: Scheme, table: Architecture, tensors: State) -> _Fit:
        neck = next((place for place in scheme.necks if f"{place}running_mean" in tensors), None)
        found = {name: scheme.source(name, neck) for name in _names(table)}
        sources = {name: source for name, source in found.items() if source is not None}
        if sources.get("neck.bias") not in tensors:
            sources.pop("neck.bias", None)  # of a neck that is trained without
        rest = [name for name in tensors if not name.endswith(BATCHES)]
        used = set(sources.values())
        strange = [name for name in rest if name not in used and not _is_explained(scheme, name)]
        places = {_place(source) for source in used}
        prefixes = tuple(theirs for _, theirs in scheme.renames if theirs)
        is_inside = {n: n.startswith(prefixes) or _place(n) in places or bool(stranger(n)) for n in strange}
        return cls(
            scheme,
            table,
            tensors,
            neck,
            sources,
            tuple(source for source in sources.values() if source not in tensors),
            tuple(name for name in strange if is_inside[name]),
            tuple(name for name in strange if not is_inside[name]),
        )

    @property
    def share(self) -> float:
        known = len(self.sources) - len(self.missing)
        return known / max(1, known + len(self.missing) + len(self.unknown))

    def take(self, stated: str | None) -> Recognised:
        """Raises `WeightsRefused` with the first mismatch."""
        self._require_names()
        reasons = [f"{name}: {why}" for name, why in self._ignored()]
        width = self._width()
        table, assumed = self._settled(width, stated)
        notes = [] if assumed is None else [assumed]
        made = _identities(self.table, width, self.scheme.identities) | _plain_neck(self.table, width)
        arrays = {name: array(source, self.tensors, notes) for name, source in self.sources.items()}
        self._require_shapes(width, arrays)
        missing = [f"{name}: absent; taken as {stands}" for name, stands in self._stand_ins()]
        name, classifier = self._classifier(self.table.embedding_dim(width), notes)
        pixels = _pixels(self.tensors)
        if self.neck is None:
            notes.append("the file has no neck, so the embedding is the pooled feature; an identity neck was added")
        wanted = self.table.tensor_shapes(width)
        flat = {ours: values.reshape(wanted[ours]) if ours in wanted else values for ours, values in arrays.items()}
        return Recognised(
            toolkit=self.scheme.toolkit,
            model=model_of(table.name, width, made | flat),
            neck=self.neck is not None,
            classifier=classifier,
            pixels=pixels,
            pretraining=self._pretraining(name),
            matched=len(arrays) + (classifier is not None) + (2 if pixels else 0),
            missing=tuple(missing),
            ignored=tuple(sorted(reasons)),
            notes=tuple(notes),
            assumed=assumed,
        )

    def _require_names(self) -> None:
        """Raises `WeightsRefused` with the first tensor that the file lacks and the first that the network lacks."""
        if why := next((f"{name[:80]}: {why}" for name in self.unknown if (why := stranger(name))), None):
            raise WeightsRefused(why)
        words = []
        if self.missing:
            words.append(f"{self.missing[0]} is missing{self._wanted_shape()}{_more(self.missing)}")
        if self.unknown:
            name = self.unknown[0]
            words.append(f"{name[:80]} of shape {_shape(self.tensors, name)} is unknown to it{_more(self.unknown)}")
        if words:
            raise WeightsRefused(f"nearest is {self.table.name} ({self.scheme.toolkit}): {'; '.join(words)}")

    def _wanted_shape(self) -> str:
        """Of the first missing tensor, where the file's other layers tell how wide it is."""
        ours = next(name for name, source in self.sources.items() if source == self.missing[0])
        try:
            width = self._width()
            return f", which has shape {_shapes(self.table, width)[ours]} at width {width}"
        except WeightsRefused:
            return ""

    def _ignored(self) -> Iterator[tuple[str, str]]:
        """Raises `WeightsRefused` for what a look at the values refuses."""
        used = {*self.sources.values(), *self._classifier_names()[:1], *(PIXELS if _pixels(self.tensors) else ())}
        for name in self.tensors:
            if name in used or name.endswith(BATCHES):
                continue
            look = next((look for pattern, look in self.scheme.examined if re.search(pattern, name)), None)
            yield name, look(self.tensors, name) if look else self.scheme.explanation(name) or NOT_OURS

    def _stand_ins(self) -> Iterator[tuple[str, str]]:
        if self.neck is None:
            yield "neck", "one that changes nothing"
        elif "neck.bias" not in self.sources:
            yield f"{self.neck}bias", "zeros"
        for beginning in self.scheme.identities:
            yield beginning.rstrip("."), "layers that change nothing"

    def _width(self) -> Width:
        """From the rows of the first layer of every stage. Raises `WeightsRefused`."""
        rows = {stage: self._stage(stage) for stage in range(1 + len(self.table.multipliers))}
        stem, *others = rows.values()
        if any(size % stem for size in others):
            raise WeightsRefused(
                f"the stem has {stem} channels and the stages {', '.join(map(str, others))}: they must be multiples of "
                "the stem"
            )
        try:
            width = Width(stem, tuple(size // stem for size in others))
            self.table.group_sizes(width)
            return width
        except WidthError as error:
            raise WeightsRefused(f"this width is outside what a chain can have: {error}") from error

    def _stage(self, stage: int) -> int:
        """Channels of the stage, from the first weight whose rows follow it alone."""
        groups = self.table.groups
        for name, axes in self.table.axes.items():
            of = [groups[group] for group in axes.rows]
            share = sum(Fraction(group.expansion) for group in of)
            if name not in self.sources or share.denominator != 1:
                continue
            if any(group.constant is not None or group.stage != stage for group in of):
                continue
            source = self.sources[name]
            shape = _shape(self.tensors, source)
            if not shape or not shape[0] or shape[0] % share:
                raise WeightsRefused(f"{source} has shape {shape}; its rows must be a multiple of {share}, and some")
            return shape[0] // int(share)
        raise WeightsRefused(f"the file has no layer that tells how wide stage {stage + 1} of {self.table.name} is")

    def _settled(self, width: Width, stated: str | None) -> tuple[Architecture, str | None]:
        """The architecture to build, and why."""
        found, toolkit = self.table.name, self.scheme.toolkit
        assumed = None if self.scheme.assumes is None else f"{self.scheme.assumes}: taken as {found}"
        if stated is not None and stated.startswith(f"{found}_") and is_alike(architecture(stated), self.table, width):
            return architecture(stated), f"the names are those of {toolkit}'s {found}: taken as {stated}, as stated"
        return self.table, assumed

    def _require_shapes(self, width: Width, arrays: Arrays) -> None:
        wanted = _shapes(self.table, width)
        for name, values in arrays.items():
            shape = values.shape
            is_flat = len(wanted[name]) == 2 and shape == (*wanted[name], 1, 1)  # a linear layer kept as a convolution
            if shape != wanted[name] and not is_flat:
                raise WeightsRefused(
                    f"{self.sources[name]} has shape {shape}; in {self.table.name} of width {width} it has "
                    f"{wanted[name]}"
                )

    def _classifier_names(self) -> list[str]:
        return [name for name in self.scheme.classifiers if name in self.tensors]

    def _classifier(self, channels: int, notes: list[str]) -> tuple[str | None, Tensor | None]:
        """Its name and (identities, D), of any number of identities; one that does not fit the embedding is left out,
        and said."""
        name = next(iter(self._classifier_names()), None)
        if name is None:
            return None, None
        shape = _shape(self.tensors, name)
        if len(shape) != 2 or shape[1] != channels or not shape[0]:
            notes.append(f"{name} has shape {shape} and reads no embedding of {channels} numbers; left out")
            return name, None
        return name, torch.from_numpy(array(name, self.tensors, notes).copy())

    def _pretraining(self, classifier: str | None) -> str | None:
        """Why the network is no teacher: torchvision's head, and nobody trained a neck onto it."""
        is_torchvisions = classifier is not None and classifier.endswith("fc.weight")
        if self.neck is None and is_torchvisions and _shape(self.tensors, classifier or "")[:1] == (IMAGENET_CLASSES,):
            return (
                f"this is a network that tells the {IMAGENET_CLASSES} classes of ImageNet apart ({classifier}), no "
                "neck: it was never trained to tell people apart, so its students could not either. Train it on people "
                f"first (`start` of a [teacher]). If it was, on {IMAGENET_CLASSES} identities, name its head "
                "classifier.weight"
            )
        return None


def identity_neck(model: ReIDModel, features: Tensor) -> None:
    """Give `model` a neck, in place, that answers what it is given: with mean m and variance v of `features` (n, D),
    weight √(v + ε) and bias m undo the normalisation.

    Any m and v would do for the teacher; those of people let its narrower students, whose statistics are measured
    afresh, keep a neck that changes little."""
    mean, variance = features.mean(dim=0), features.var(dim=0, correction=0)
    with torch.no_grad():
        model.neck.running_mean.copy_(mean)  # type: ignore[union-attr] # batch norms track them
        model.neck.running_var.copy_(variance)  # type: ignore[union-attr]
        model.neck.weight.copy_((variance + NORM_EPSILON).sqrt())
        model.neck.bias.copy_(mean)


def array(name: str, tensors: State, notes: list[str]) -> NDArray[np.float32]:
    """The tensor as float32. Raises `WeightsRefused` for other numbers than floats, and for NaN and infinity."""
    tensor = tensors[name]
    if not tensor.dtype.is_floating_point or tensor.layout is not torch.strided:
        raise WeightsRefused(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}; weights are floating-point numbers"
        )
    if tensor.dtype != torch.float32:
        note = f"weights of {str(tensor.dtype).removeprefix('torch.')} were converted to float32"
        if note not in notes:
            notes.append(note)
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        where = tuple(torch.nonzero(~torch.isfinite(values))[0].tolist())
        raise WeightsRefused(f"{name}{list(where)} is {values[where].item()}: the weights hold NaN or infinity")
    if name.endswith("running_var") and bool((values < 0).any()):
        raise WeightsRefused(f"{name} is negative somewhere, which no variance can be")
    made: NDArray[np.float32] = values.numpy()
    return made


def is_alike(one: Architecture, other: Architecture, width: Width) -> bool:
    """Whether the two have the same tensors, so that only their functions may differ."""
    try:
        return _shapes(one, width) == _shapes(other, width)
    except WidthError:
        return False


def _names(table: Architecture) -> tuple[str, ...]:
    """Everything a network of this table holds: tensors and statistics."""
    return (*table.axes, *(f"{norm}.{kind}" for norm in table.batch_norms for kind in STATISTICS))


def _shapes(table: Architecture, width: Width) -> dict[str, tuple[int, ...]]:
    statistics = {f"{n}.{kind}": (size,) for n, size in table.statistic_sizes(width).items() for kind in STATISTICS}
    return table.tensor_shapes(width) | statistics


def _is_explained(scheme: Scheme, name: str) -> bool:
    is_examined = any(re.search(pattern, name) for pattern, _ in scheme.examined)
    return is_examined or name in scheme.classifiers or name in PIXELS or scheme.explanation(name) is not None


def _place(name: str) -> str:
    """Which part of a network a name belongs to: its first word without digits, so that layer5 is among the layers."""
    return name.partition(".")[0].rstrip("0123456789")


def _plain_neck(table: Architecture, width: Width) -> Arrays:
    """A neck of the right size: what a file leaves out of its own. Without any, `identity_neck` sets it later on."""
    size = table.embedding_dim(width)
    ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)
    return {"neck.weight": ones, "neck.bias": zeros, "neck.running_mean": zeros, "neck.running_var": ones}


def _identities(table: Architecture, width: Width, beginnings: tuple[str, ...]) -> Arrays:
    """Layers that answer what they are given, as long as that is not negative where a ReLU follows."""
    made = {name: shape for name, shape in _shapes(table, width).items() if beginnings and name.startswith(beginnings)}
    for name, shape in made.items():
        if len(shape) == 2 and shape[0] != shape[1]:
            raise WeightsRefused(
                f"this network ends in {shape[1]} channels, and {table.name} in {shape[0]} behind {name}, which it "
                "lacks: only where both are the same is there a layer that changes nothing"
            )
    return {name: _identity(name, shape) for name, shape in made.items()}


def _identity(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if len(shape) == 2:
        return np.eye(shape[0], dtype=np.float32)
    if name.endswith("running_var"):
        return np.full(shape, 1 - NORM_EPSILON, np.float32)
    is_norm_weight = name.endswith(".weight")
    return np.full(shape, float(is_norm_weight), np.float32)


def _pixels(tensors: State) -> Pixels | None:
    """Mean and std of pixels 0..1, from buffers for pixels 0..255. Raises `WeightsRefused` for senseless ones."""
    if not all(name in tensors for name in PIXELS):
        return None
    mean, std = (array(name, tensors, []).reshape(-1) / 255 for name in PIXELS)
    if len(mean) != 3 or len(std) != 3 or float(std.min()) <= 0:
        raise WeightsRefused(
            f"pixel_mean {tuple(mean * 255)} and pixel_std {tuple(std * 255)} must be three numbers each, std positive"
        )
    red, green, blue = (round(float(value), 6) for value in mean)
    return (red, green, blue), tuple(round(float(value), 6) for value in std)  # type: ignore[return-value]


def _shape(tensors: State, name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape) if name in tensors else ()


def _more(names: tuple[str, ...]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
