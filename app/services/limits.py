"""Limits as requests state them: of a device that asks for a model, and of a job that makes one."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.errors import LatencyNotMeasurable
from chains.budget import Limits

MAX_LIMIT = 2**63 - 1  # what databases and most clients can hold
Limit = Annotated[int | None, Field(ge=1, le=MAX_LIMIT)]


class LimitsIn(BaseModel):
    """What the device can bear for one image; state at least one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    max_macs: Annotated[Limit, Field(description="multiply-adds")] = None
    max_flops: Annotated[Limit, Field(description="two per multiply-add")] = None
    max_params: Annotated[Limit, Field(description="float elements of the ONNX graph's initialisers")] = None
    max_artifact_bytes: Annotated[Limit, Field(description="size of the ONNX file")] = None
    max_peak_activation_bytes: Annotated[Limit, Field(description="largest sum of float32 values alive at once")] = None
    max_memory_bytes: Annotated[
        Limit,
        Field(description="held against 2.7 × weights (load peak) plus activations; the runtime's arenas come on top"),
    ] = None
    max_latency_ms: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="refused (latency-not-measurable-yet) until devices can report"),
    ] = None
    device_class: Annotated[str | None, Field(max_length=64, description="goes with max_latency_ms")] = None

    def parse(self) -> Limits:
        """Raises `LatencyNotMeasurable`, and `LimitsError` when nothing is limited."""
        if self.max_latency_ms is not None or self.device_class is not None:
            raise LatencyNotMeasurable
        return Limits(**self.model_dump(exclude={"max_latency_ms", "device_class"}))
