"""What requests and answers look like. Unknown fields are refused and types are strict: a limit is never guessed."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from app.api.choices import ChoiceOut
from app.db.tables import ChainRow, WidthRow
from app.services.limits import LimitsIn
from app.services.names import PATTERN
from app.services.provision import Model, ModelRequest
from app.services.registry import STABLE, Page
from app.terms import ConsentBasis, Terms
from chains.chain import WidthAccuracy
from chains.cost import Costs
from chains.onnxfile import EmitOptions

ONE_LINE = r"^[^\x00-\x1f\x7f]+$"  # of printable text
NewName = Annotated[str, Field(pattern=PATTERN, description="lower-case letters, digits, `.`, `_`, `-`")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
License = Annotated[str, Field(max_length=200, pattern=ONE_LINE, description="the licence in its maker's words")]


class RequestSchema(BaseModel):
    """Base of request bodies. What is not finite is no number: neither PostgreSQL's JSON nor ours can hold it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelIn(RequestSchema):
    """A device asks for a model."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"limits": {"max_macs": 10_000_000}},
                {
                    "chain": "stable",
                    "limits": {"max_artifact_bytes": 500_000, "max_memory_bytes": 4_000_000},
                    "opset": 13,
                    "embedding": "native",
                    "preprocess": "in-graph",
                },
            ]
        }
    )

    limits: LimitsIn
    chain: Annotated[str, Field(max_length=63, description="name of a chain, or an alias")] = STABLE
    embedding_space: Annotated[
        Literal["chain", "any"],
        Field(
            description="of terminal chains that may answer in the chain's place where they are better: `chain`: the "
            "chain's own; `any`: also others, whose embeddings do not compare with the chain's"
        ),
    ] = "chain"
    opset: Annotated[int, Field(description="ONNX opset, 11 to 18")] = EmitOptions().opset
    embedding: Annotated[
        Literal["common", "native"],
        Field(
            description="`common`: one space for all widths of the chain; `native`: the student's own, shorter vector"
        ),
    ] = "common"
    normalize: Annotated[bool, Field(description="L2-normalise the embedding in the graph")] = True
    preprocess: Annotated[
        Literal["none", "in-graph"],
        Field(description="`in-graph`: takes uint8 RGB, NHWC, already resized; `none`: normalised float32, NCHW"),
    ] = "none"

    def parse(self) -> ModelRequest:
        """Raises `LatencyNotMeasurable`, `LimitsError` and `UnsupportedOption`."""
        options = EmitOptions(self.opset, self.embedding, self.normalize, self.preprocess)
        return ModelRequest(self.limits.parse(), options, self.chain, self.embedding_space)


class CostsOut(BaseModel):
    """Costs of one image (batch 1). All but the memory bound are exact."""

    macs: int
    flops: Annotated[int, Field(description="2 × macs")]
    params: int
    artifact_bytes: int
    weight_bytes: int
    peak_activation_bytes: int
    memory_bytes_bound: Annotated[
        int, Field(description="2.7 × weights (the load peak) plus activations; the runtime's arenas come on top")
    ]

    @classmethod
    def of(cls, costs: Costs) -> CostsOut:
        return cls.model_validate({name: getattr(costs, name) for name in cls.model_fields})


class AccuracyOut(BaseModel):
    """Measured retrieval accuracy in percent, with no training after expansion unless `measured` says so."""

    map: float
    map_ci95: Annotated[list[float], Field(description="95 % interval, bootstrapped over queries")]
    rank1: float
    rank5: float
    rank10: float
    minp: Annotated[
        float | None, Field(description="mean of correct matches / rank of the last one; null: measured before it was")
    ]

    @classmethod
    def of(cls, accuracy: WidthAccuracy) -> AccuracyOut:
        return cls.model_validate({name: getattr(accuracy, name) for name in cls.model_fields}, from_attributes=True)


class ImageOut(BaseModel):
    """The image a model wants: RGB person crops, resized to this size."""

    height: int
    width: int
    mean: Annotated[list[float], Field(description="per RGB channel, of pixels in 0..1")]
    std: list[float]


class TensorOut(BaseModel):
    """A tensor of the graph; `batch` is free."""

    name: str
    dtype: str
    shape: list[str | int]


class InputOut(TensorOut):
    """The graph's input and what to do to pixels before it."""

    layout: Literal["NCHW", "NHWC"]
    colour: Literal["RGB"] = "RGB"
    preprocess: Annotated[str, Field(description="what the client does to 8-bit pixels")]


class LiftOut(BaseModel):
    """How embeddings of this width enter the common space, where all widths of the chain compare.

    `common = native[channels]`, then L2-normalise. To compare two embeddings of one width nothing need be lifted: scale
    native coordinate `i` by the root of `part_sizes[i]` and take the cosine.
    """

    space: Annotated[
        str, Field(description="the common space; embeddings lifted into it compare with all others in it")
    ]
    common_dim: int
    native_dim: int
    channels: Annotated[
        list[int], Field(description="for each common channel, the native coordinate that stands for it")
    ]
    part_sizes: Annotated[
        list[int], Field(description="for each native coordinate, how many common channels it stands for")
    ]


class ThresholdOut(BaseModel):
    """A cut-off for queries of this model against a gallery of one width, at one false-accept rate."""

    gallery_width: str
    false_accept_rate: Annotated[
        float, Field(description="share of pairs of different people that the cut-off accepts, at most")
    ]
    cosine: Annotated[float, Field(description="taken for one person from this cosine up")]
    true_accept: Annotated[float, Field(description="percent of pairs of one person, of two cameras, that it accepts")]


class ThresholdsOut(BaseModel):
    """Same person or not, by cosine in the common space; native embeddings must be lifted first."""

    space: Annotated[str, Field(description="the common space; cosines of native embeddings are others")]
    cut_offs: Annotated[
        list[ThresholdOut],
        Field(description="by false-accept rate, then gallery width from narrow to wide; those that are known"),
    ]

    @classmethod
    def of(cls, model: Model) -> ThresholdsOut | None:
        chain = model.stored.chain
        if chain.frontier is None or not chain.frontier.thresholds:
            return None
        cut_offs = [
            ThresholdOut(
                gallery_width=str(gallery),
                false_accept_rate=at_rate.false_accept_rate,
                cosine=found.cosine,
                true_accept=found.true_accept,
            )
            for at_rate, gallery, found in chain.frontier.thresholds_of(model.width)
        ]
        return cls(space=chain.embedding_space, cut_offs=cut_offs)


class Manifest(BaseModel):
    """Everything to know about a model without its bytes."""

    id: Annotated[str, Field(description="sha256 of the recipe's canonical JSON")]
    chain: str
    chain_digest: str
    architecture: str
    width: str
    license: str
    file_name: str
    artifact: Annotated[str, Field(description="where the bytes are")]
    artifact_sha256: Annotated[str | None, Field(description="null until the bytes were streamed in full once")]
    costs: CostsOut
    accuracy: AccuracyOut | None
    image: ImageOut
    input: InputOut
    output: TensorOut
    distance: Literal["cosine"] = "cosine"
    l2_normalized: bool
    embedding: Literal["common", "native"]
    embedding_space: Annotated[str, Field(description="embeddings compare as they are when this is equal")]
    lift: LiftOut
    thresholds: Annotated[
        ThresholdsOut | None, Field(description="same-or-different cut-offs; null where the chain has none")
    ]
    recipe: Annotated[dict[str, Any], Field(description="what makes the bytes: equal recipes give equal bytes")]
    choice: Annotated[
        ChoiceOut | None, Field(description="why the request got this model; null where there was no request by limits")
    ]

    @classmethod
    def of(cls, model: Model) -> Manifest:
        chain = model.stored.chain
        lift = _lift(model)
        return cls(
            id=model.id,
            chain=chain.name,
            chain_digest=model.stored.digest,
            architecture=chain.architecture,
            width=str(model.width),
            license=chain.license,
            file_name=model.plan.file_name,
            artifact=f"/models/{model.id}/artifact",
            artifact_sha256=model.artifact_sha256,
            costs=CostsOut.of(model.costs),
            accuracy=AccuracyOut.of(model.accuracy) if model.accuracy else None,
            image=ImageOut.model_validate(chain.input, from_attributes=True),
            input=_input(model),
            output=_output(model, lift),
            l2_normalized=model.options.normalize,
            embedding=model.options.embedding,
            embedding_space=_space(model, lift),
            lift=lift,
            thresholds=ThresholdsOut.of(model),
            recipe=model.plan.recipe,
            choice=ChoiceOut.of(model),
        )


_NOT_COLUMNS = {"widths", "image", "aliases", "offered_with", "terminals"}


class ChainOut(BaseModel):
    """A published chain."""

    name: str
    digest: Annotated[str, Field(description="sha256 of the chain file")]
    size_bytes: int
    architecture: str
    mode: str
    teacher_width: str
    widths: Annotated[list[str], Field(description="narrow to wide")]
    embedding_space: str
    embedding_dim: int
    image: ImageOut
    license: str
    terms: Annotated[Terms, Field(description="what it may be used for: the strictest of what it was made from")]
    consent_basis: Annotated[
        ConsentBasis, Field(description="why the images of people it was made from may be used; the weakest of them")
    ]
    job: Annotated[str | None, Field(description="the job that made it; null: it was published as a file")]
    aliases: list[str]
    is_terminal: Annotated[bool, Field(description="it is one model, compressed for one target")]
    offered_with: Annotated[
        str | None, Field(description="of a terminal chain: the chain beside which it answers; null: none")
    ]
    terminals: Annotated[list[str], Field(description="the terminal chains that are offered with this one")]
    provenance: Annotated[dict[str, Any], Field(description="how the chain came to be, in its maker's words")]
    published_at: datetime

    @classmethod
    def of(cls, row: ChainRow) -> ChainOut:
        return cls(
            **{name: getattr(row, name) for name in cls.model_fields.keys() - _NOT_COLUMNS},
            widths=[width.width for width in row.widths],
            image=ImageOut(**row.input),
            aliases=[alias.alias for alias in row.aliases],
            offered_with=row.offer.chain if row.offer else None,
            terminals=[offer.terminal for offer in row.terminals],
        )


class ChainsOut(BaseModel):
    """A page of chains, by name. `next_page_token` is null on the last page."""

    chains: list[ChainOut]
    next_page_token: str | None

    @classmethod
    def of(cls, page: Page, next_page_token: str | None) -> ChainsOut:
        return cls(chains=[ChainOut.of(row) for row in page.chains], next_page_token=next_page_token)


class FrontierWidth(BaseModel):
    """One width: what it costs as a default model, and how well it retrieves (null: not measured)."""

    width: str
    costs: CostsOut
    accuracy: AccuracyOut | None

    @classmethod
    def of(cls, row: WidthRow) -> FrontierWidth:
        costs = Costs(row.macs, row.params, row.peak_activation_bytes, row.artifact_bytes)
        return cls(width=row.width, costs=CostsOut.of(costs), accuracy=_accuracy(row))


class Measured(BaseModel):
    """How the accuracies were measured."""

    dataset: str
    protocol: str
    seed: int
    queries: int
    gallery: int
    trained_after_expansion: bool


class CrossThresholds(BaseModel):
    """Cut-offs at one false-accept rate, rows and columns as in `map`; null where the images could not tell."""

    false_accept_rate: Annotated[
        float, Field(description="share of pairs of different people that a cut-off accepts, at most")
    ]
    cosine: Annotated[list[list[float | None]], Field(description="taken for one person from this cosine up")]
    true_accept: Annotated[
        list[list[float | None]], Field(description="percent of pairs of one person, of two cameras, that it accepts")
    ]


class CrossWidth(BaseModel):
    """Queries embedded at one width (rows) against a gallery embedded at another (columns), in the common space."""

    widths: list[str]
    map: Annotated[list[list[float]], Field(description="mAP in percent")]
    thresholds: Annotated[
        list[CrossThresholds], Field(description="same person or not; empty for chains measured before there were any")
    ]

    @classmethod
    def of(cls, how: dict[str, Any]) -> CrossWidth:
        thresholds = how.get("thresholds", ())  # chains published by an older release have none
        return cls(
            widths=how["widths"],
            map=how["cross_map"],
            thresholds=[CrossThresholds(**at_rate) for at_rate in thresholds],
        )


class FrontierOut(BaseModel):
    """What each width of a chain costs and is worth."""

    chain: str
    embedding_space: str
    widths: Annotated[list[FrontierWidth], Field(description="narrow to wide")]
    measured: Measured | None
    cross_width: CrossWidth | None

    @classmethod
    def of(cls, row: ChainRow) -> FrontierOut:
        how = row.measurement
        return cls(
            chain=row.name,
            embedding_space=row.embedding_space,
            widths=[FrontierWidth.of(width) for width in row.widths],
            measured=Measured(**how) if how else None,
            cross_width=CrossWidth.of(how) if how else None,
        )


class Live(BaseModel):
    """The process answers."""

    status: Literal["live"] = "live"
    version: str


class Ready(BaseModel):
    """The service can answer with models."""

    status: Literal["ready"] = "ready"


def _accuracy(row: WidthRow) -> AccuracyOut | None:
    if row.mean_ap is None:
        return None
    return AccuracyOut.model_validate(
        {
            "map": row.mean_ap,
            "map_ci95": [row.mean_ap_low, row.mean_ap_high],
            "rank1": row.rank1,
            "rank5": row.rank5,
            "rank10": row.rank10,
            "minp": row.minp,
        }
    )


def _input(model: Model) -> InputOut:
    image = model.stored.chain.input
    if model.options.preprocess == "in-graph":
        return InputOut(
            name="images",
            dtype="uint8",
            shape=["batch", image.height, image.width, 3],
            layout="NHWC",
            preprocess="resize to height × width; the graph does the rest",
        )
    return InputOut(
        name="images",
        dtype="float32",
        shape=["batch", 3, image.height, image.width],
        layout="NCHW",
        preprocess="resize to height × width, divide by 255, subtract mean, divide by std, per RGB channel",
    )


def _output(model: Model, lift: LiftOut) -> TensorOut:
    length = lift.common_dim if model.options.embedding == "common" else lift.native_dim
    return TensorOut(name="embedding", dtype="float32", shape=["batch", length])


def _space(model: Model, lift: LiftOut) -> str:
    is_common = model.options.embedding == "common" or lift.native_dim == lift.common_dim
    return lift.space if is_common else model.stored.chain.native_space(model.width)


def _lift(model: Model) -> LiftOut:
    chain = model.stored.chain
    channels = chain.lift(model.width)
    part_sizes = np.bincount(channels)
    if len(part_sizes) == len(channels):
        channels = np.arange(len(channels))  # at full width the writer puts native embeddings into the common order too
    return LiftOut(
        space=chain.embedding_space,
        common_dim=len(channels),
        native_dim=len(part_sizes),
        channels=channels.tolist(),
        part_sizes=part_sizes.tolist(),
    )
