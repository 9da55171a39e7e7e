"""How a model was chosen, in words and figures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.services.provision import Model
from chains.budget import Candidate, Choice, Contender, Declined, Reason
from chains.chain import Frontier

Map = Annotated[float | None, Field(description="measured mAP in percent; null: not measured")]


class StudentOut(BaseModel):
    """A student of the chain asked for."""

    width: str
    map: Map

    @classmethod
    def of(cls, student: Candidate) -> StudentOut:
        return cls(width=str(student.width), map=_map(student))


class DeclinedOut(BaseModel):
    """A terminal chain that is offered with the chain asked for and was not taken."""

    chain: str
    embedding_space: str
    map: Map
    reason: Annotated[
        Reason, Field(description="`not-better` than what was chosen; `cannot-be-loaded`: its stored file")
    ]
    limit: Annotated[str | None, Field(description="of one that does not fit: the limit that it breaks most")]
    allowed: Annotated[int | None, Field(description="what that limit allows")]
    needed: Annotated[int | None, Field(description="what the terminal chain needs")]

    @classmethod
    def of(cls, declined: Declined) -> DeclinedOut:
        excess = declined.excess
        return cls(
            chain=declined.chain,
            embedding_space=declined.embedding_space,
            map=declined.map,
            reason=declined.reason,
            limit=excess and excess.limit,
            allowed=excess and excess.allowed,
            needed=excess and excess.needed,
        )


class ChoiceOut(BaseModel):
    """Why a request got this model."""

    chosen: Annotated[
        Literal["student", "terminal"],
        Field(description="a student of the chain asked for, or a terminal chain that is offered with it"),
    ]
    why: str
    student: Annotated[
        StudentOut | None, Field(description="what the chain asked for gives within these limits; null: nothing")
    ]
    declined: Annotated[list[DeclinedOut], Field(description="the other terminal chains offered with it, by name")]

    @classmethod
    def of(cls, model: Model) -> ChoiceOut | None:
        choice = model.choice
        if choice is None:
            return None
        return cls(
            chosen="student" if choice.terminal is None else "terminal",
            why=_why(choice, model.stored.chain.frontier),
            student=StudentOut.of(choice.student) if choice.student else None,
            declined=[DeclinedOut.of(declined) for declined in choice.declined],
        )


def _why(choice: Choice, frontier: Frontier | None) -> str:
    """frontier: of the chosen chain. What is offered was measured on the same as the chain it is offered with."""
    terminal, student, asked = choice.terminal, choice.student, choice.asked.chain
    if terminal is None:
        beside = "; ".join(_why_not(declined) for declined in choice.declined)
        beside = (
            f"Of the terminal chains offered with it, {beside}" if beside else "No terminal chain is offered with it"
        )
        return (
            f"Student {choice.model.width} of chain '{asked}' {_figure(_map(choice.model))}{_on(frontier)}. {beside}."
        )
    beside = (
        f"no student of chain '{asked}' fits"
        if student is None
        else f"student {student.width} of chain '{asked}' {_figure(_map(student))} on the same"
    )
    return (
        f"Terminal chain '{terminal.chain}' {_figure(_map(terminal.model))}{_on(frontier)}; {beside}. "
        f"{_spaces(terminal, choice.asked)}."
    )


def _figure(mean_ap: float | None) -> str:
    return "was not measured" if mean_ap is None else f"measures {mean_ap:g} mAP"


def _on(frontier: Frontier | None) -> str:
    if frontier is None:
        return ""
    return f" on '{frontier.dataset}' ({frontier.queries:,} queries, {frontier.gallery:,} gallery images)"


def _why_not(declined: Declined) -> str:
    name, excess = f"'{declined.chain}'", declined.excess
    if declined.reason == "other-embedding-space":
        return f"{name} has another embedding space, '{declined.embedding_space}'"
    if declined.reason == "cannot-be-loaded":
        return f"the stored file of {name} cannot be loaded"
    if excess is not None:
        return f"{name} does not fit: {excess.limit} allows {excess.allowed:,}, it needs {excess.needed:,}"
    return f"{name} is no better: it {_figure(declined.map)}"


def _spaces(terminal: Contender, asked: Contender) -> str:
    own, other = terminal.embedding_space, asked.embedding_space
    if own == other:
        return f"Both answer in embedding space '{own}'"
    return f"Their embeddings do not compare: its space is '{own}', the chain's '{other}'"


def _map(candidate: Candidate) -> float | None:
    return candidate.accuracy.map if candidate.accuracy else None
