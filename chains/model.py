"""ReIDModel: backbone, global average pooling, BNNeck; one embedding per image. Training side: needs torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chains.arch import RESNETS, architecture
from chains.backbones.resnet import BLOCKS, ResNet
from chains.chain import Chain, InputSpec
from chains.errors import ChainMismatch, DataError
from chains.expand import student
from chains.width import Width


class ReIDModel(nn.Module):
    """A ReID network of `width`. Forward: normalised images (batch, 3, H, W) → (feature, embedding), both (batch, D):
    the pooled feature in front of the neck, which the triplet loss sees, and behind it, which retrieval and the
    classifier see (BNNeck: Luo et al., CVPRW 2019). The neck's bias is frozen at zero, as there."""

    def __init__(self, architecture_name: str, width: Width) -> None:
        super().__init__()
        self.table = architecture(architecture_name)
        self.width = width
        self.backbone = ResNet(BLOCKS[architecture_name], RESNETS[architecture_name][1], width)
        self.neck = nn.BatchNorm1d(self.backbone.channels)
        self.neck.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.backbone(images).mean(dim=(2, 3))
        return feature, self.neck(feature)

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (batch, D) behind the neck, not normalised."""
        embedding: Tensor = self(images)[1]
        return embedding

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by the axis table's names."""
        parameters = dict(self.named_parameters())
        return {name: parameters[module_name(name)] for name in self.table.axes}


def module_name(tensor: str) -> str:
    """The name inside `ReIDModel` of a tensor or statistic of the axis table."""
    return tensor if tensor.startswith("neck.") else f"backbone.{tensor}"


def numpy_tensors(model: ReIDModel) -> dict[str, NDArray[np.float32]]:
    """Copies of the parameters as float32 arrays by the axis table's names."""
    return {
        name: tensor.detach().cpu().numpy().astype(np.float32, copy=True) for name, tensor in model.tensors().items()
    }


def model_of(architecture_name: str, width: Width, tensors: Mapping[str, NDArray[np.float32]]) -> ReIDModel:
    """A model that holds `tensors` (axis table names; statistics too where given), in eval mode. Raises `ChainMismatch`
    when a tensor is missing, unknown or of another shape."""
    model = ReIDModel(architecture_name, width)
    state = {module_name(name): torch.tensor(values) for name, values in tensors.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # torch lists every tensor of another shape; the first says enough
        first = str(error).splitlines()[1].strip()
        raise ChainMismatch(f"tensors do not fit {architecture_name} {width}: {first}") from error
    lacking = [name for name in missing if not name.endswith("num_batches_tracked") and "running_" not in name]
    if lacking or unexpected:
        raise ChainMismatch(
            f"tensors do not fit {architecture_name} {width}: lacking {lacking[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()


def load_student(chain: Chain, width: Width) -> ReIDModel:
    """The calibrated student of `chain` at `width` as a torch module in eval mode; native embedding, leaf order.

    Raises `NotCalibrated` when the width has no statistics."""
    return model_of(chain.architecture, width, student(chain, width))


def normalise(images: NDArray[np.uint8], input: InputSpec, device: torch.device | str = "cpu") -> Tensor:
    """uint8 RGB (n, H, W, 3) → float32 (n, 3, H, W) on `device`, `(pixel / 255 - mean) / std`. Raises `DataError` for
    images of another size than `input`."""
    if images.shape[1:3] != (input.height, input.width):
        raise DataError(
            f"images are {images.shape[1]}x{images.shape[2]} pixels (height x width); the model wants "
            f"{input.height}x{input.width}: read them at that size"
        )
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (input.mean, input.std))
    return (pixels - mean) / std
