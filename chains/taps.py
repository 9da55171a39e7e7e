"""What the blocks of a ResNet answer while it runs, for losses on feature maps. Training side: needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True, eq=False)
class Trace:
    """What a ResNet makes of a batch. blocks: stage -> the outputs of its blocks in front of their last ReLU."""

    blocks: Mapping[str, Sequence[Tensor]]
    feature: Tensor
    embedding: Tensor

    def every_block(self) -> list[Tensor]:
        return [maps for stage in STAGES for maps in self.blocks[stage]]

    def output(self, stage: str) -> Tensor:
        """What the stage hands on."""
        return functional.relu(self.blocks[stage][-1])


def traced(model: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> Trace:
    """`run()`, which is (feature, embedding) of the ResNet `model`, and what its blocks answered on the way."""
    with _Taps(model) as taps:
        feature, embedding = run()
    blocks = {stage: [sum(parts[1:], parts[0]) for parts in found] for stage, found in taps.parts.items()}
    return Trace(blocks, feature, embedding)


class _Taps(AbstractContextManager["_Taps"]):
    """Notes the two sides of every block's last sum while a ResNet runs."""

    def __init__(self, model: nn.Module) -> None:
        self.parts: dict[str, list[list[Tensor]]] = {}
        self.hooks: list[RemovableHandle] = []
        for stage in STAGES:
            blocks = list(model.get_submodule(f"backbone.{stage}").children())
            self.parts[stage] = [[] for _ in blocks]
            for block, found in zip(blocks, self.parts[stage], strict=True):
                last = "bn3" if hasattr(block, "bn3") else "bn2"
                for side in (block.get_submodule(last), block.get_submodule("downsample")):
                    self.hooks.append(side.register_forward_hook(_noting(found)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()


def _noting(found: list[Tensor]) -> Any:
    def note(_: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001 - a hook's signature
        found.append(output)

    return note
