"""From a device's limits to a model: the widest width that fits, or a terminal chain that is better; its recipe, its
bytes.

A model is never stored. Its recipe is, and the bytes are made again from chain and recipe whenever they are asked for;
they are the same every time, on every machine. What is learnt from the first full stream is their sha256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import structlog
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from app.db.repositories import Models
from app.db.session import Database
from app.db.tables import ModelRow
from app.errors import AppError, NotReproducible, UnknownChain, UnknownModel
from app.metrics import Metrics
from app.services.registry import STABLE, Offered, Registry
from app.tracing import span, traced_chunks
from chains.artifact import StoredChain
from chains.budget import Candidate, Choice, Contender, Limits, choose
from chains.chain import WidthAccuracy
from chains.cost import Costs
from chains.errors import BudgetTooSmall, ChainsError
from chains.onnxfile import EmitOptions, OnnxPlan, plan
from chains.width import Width

_ID = re.compile(r"[0-9a-f]{64}")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ModelRequest:
    """What a device asks for. chain: name or alias, by default the alias `stable`. embedding_space: of the terminal
    chains that may answer in its place, the chain's own or any."""

    limits: Limits
    options: EmitOptions
    chain: str = STABLE
    embedding_space: Literal["chain", "any"] = "chain"


@dataclass(frozen=True, eq=False)
class Model:
    """A model that can be served. artifact_sha256: `None` until its bytes were streamed in full once. choice: why it is
    this one; `None` of a model that was asked for by its id."""

    stored: StoredChain
    width: Width
    options: EmitOptions
    plan: OnnxPlan
    artifact_sha256: str | None
    is_new: bool = False
    choice: Choice | None = None

    @property
    def id(self) -> str:
        return self.plan.model_id

    @property
    def costs(self) -> Costs:
        return self.plan.costs

    @property
    def accuracy(self) -> WidthAccuracy | None:
        frontier = self.stored.chain.frontier
        return frontier.of(self.width) if frontier else None


class Provision:
    """Answers limits with models."""

    def __init__(self, database: Database, registry: Registry, metrics: Metrics) -> None:
        self._database = database
        self._registry = registry
        self._metrics = metrics

    def provide(self, request: ModelRequest) -> Model:
        """The model for these limits, recorded so that it can be fetched by id.

        A terminal chain that cannot be loaded is left out, and the choice says so. Raises `UnknownChain`,
        `BudgetTooSmall`, `UnsupportedOption`, `DatabaseUnavailable`, and `StorageError` or `ChainFileError` where the
        chain itself cannot be loaded, or where nothing fits and a terminal chain that cannot be loaded might have.
        """
        offered = self._registry.load_offered(request.chain, any_space=request.embedding_space == "any")
        self._tell(offered)
        with span("provision.choose", chain=offered.asked.chain.name):
            choice = self._choose(request, offered)
        stored = next(one for one in (offered.asked, *offered.terminals) if one.chain.name == choice.chain)
        width = choice.model.width
        with span("provision.plan", chain=stored.chain.name, width=str(width)):
            made = plan(stored, width, request.options)
        is_new, sha256 = self._record(made, stored, width)
        return Model(stored, width, request.options, made, sha256, is_new, choice)

    def recorded(self, model_id: str) -> ModelRow:
        """The stored recipe of that id. Raises `UnknownModel`."""
        if _ID.fullmatch(model_id) is None:
            raise UnknownModel(model_id)
        with self._database.transaction() as session:
            found = Models(session).find(model_id)
        if found is None:
            raise UnknownModel(model_id)
        return found

    def rebuild(self, recorded: ModelRow) -> Model:
        """The model of a stored recipe. Raises `NotReproducible` when this version has other bytes for it, or none."""
        stored = self._registry.load(str(recorded.recipe["chain_digest"]))
        gone = f"model {recorded.id[:12]}… was written by another version of the emitter; ask POST /models again"
        try:
            width, options = Width.parse(recorded.width), _options(recorded.recipe)
            made = plan(stored, width, options)
        except ChainsError as error:
            raise NotReproducible(gone) from error
        if made.model_id != recorded.id:
            raise NotReproducible(gone)
        return Model(stored, width, options, made, recorded.artifact_sha256)

    def stream(self, model: Model, start: int = 0, stop: int | None = None) -> Iterator[bytes | memoryview]:
        """The bytes `[start:stop]` of the model's file, in slices of at most 256 KiB."""
        whole = start == 0 and stop in (None, model.plan.total_bytes)
        self._metrics.models.add(1, {"chain": model.stored.chain.name, "width": str(model.width)})
        is_hashed = whole and model.artifact_sha256 is None
        chunks = self._hashed(model) if is_hashed else iter(model.plan.chunks(start, stop))
        return traced_chunks("provision.stream", chunks, chain=model.stored.chain.name, width=str(model.width))

    def _tell(self, offered: Offered) -> None:
        """Log and count what could not be loaded."""
        if offered.failures:
            errors = {name: str(error) for name, error in offered.failures.items()}
            _log.warning("terminal chains not loaded", chain=offered.asked.chain.name, errors=errors)
        for name in offered.failures:
            self._metrics.not_loaded.add(1, {"chain": name})

    def _choose(self, request: ModelRequest, offered: Offered) -> Choice:
        own, *others = (_contender(stored, request.options) for stored in (offered.asked, *offered.terminals))
        try:
            return choose(request.limits, own, others, offered.left_out)
        except BudgetTooSmall as error:
            if offered.failures:
                raise next(iter(offered.failures.values())) from error  # what could not be loaded might have fitted
            self._metrics.refusals.add(1, {"limit": error.limit})
            raise

    def _hashed(self, model: Model) -> Iterator[bytes | memoryview]:
        """All chunks; the digest is recorded before the last one leaves: who has the whole file finds it recorded."""
        digest, held = hashlib.sha256(), None
        for chunk in model.plan.chunks():
            digest.update(chunk)
            if held is not None:
                yield held
            held = chunk
        self._learn_digest(model.id, digest.hexdigest())
        if held is not None:
            yield held

    def _learn_digest(self, model_id: str, sha256: str) -> None:
        """A database that fails here must not cost the client its download; the next full stream learns it again."""
        try:
            with self._database.transaction() as session:
                Models(session).set_artifact_digest(model_id, sha256)
        except (AppError, SQLAlchemyError):
            _log.warning("digest not recorded", model=model_id, exc_info=True)

    def _record(self, made: OnnxPlan, stored: StoredChain, width: Width) -> tuple[bool, str | None]:
        """(first time, sha256 of the bytes if known). Reads first: most requests repeat an earlier one."""
        with self._database.transaction() as session:
            known = Models(session).find(made.model_id)
        if known is not None:
            return False, known.artifact_sha256
        try:
            with self._database.transaction() as session:
                return Models(session).add_if_absent(_row(made, stored, width)), None
        except IntegrityError as error:  # the chain was deleted since it was looked up
            raise UnknownChain(stored.chain.name) from error


def candidates(stored: StoredChain, options: EmitOptions) -> list[Candidate]:
    """Every width of the chain, narrow to wide, with the exact costs of the file these options give."""
    frontier = stored.chain.frontier
    return [
        Candidate(width, plan(stored, width, options).costs, frontier.of(width) if frontier else None)
        for width in stored.chain.ladder
    ]


def _contender(stored: StoredChain, options: EmitOptions) -> Contender:
    return Contender(stored.chain.name, stored.chain.embedding_space, tuple(candidates(stored, options)))


def _options(recipe: dict[str, Any]) -> EmitOptions:
    return EmitOptions(
        opset=recipe["opset"],
        embedding=recipe["embedding"],
        normalize=recipe["normalize"],
        preprocess=recipe["preprocess"],
    )


def _row(made: OnnxPlan, stored: StoredChain, width: Width) -> ModelRow:
    return ModelRow(
        id=made.model_id,
        chain=stored.chain.name,
        width=str(width),
        recipe=made.recipe,
        artifact_bytes=made.total_bytes,
        artifact_sha256=None,
        created_at=datetime.now(UTC),
    )
