"""ReIDModel: backbone, global average pooling, BNNeck; one embedding per image. Training side: needs torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chains.arch import Architecture
from chains.architectures import architecture
from chains.backbones import backbone
from chains.chain import STATISTICS, Chain, InputSpec
from chains.errors import ChainMismatch, DataError
from chains.expand import student
from chains.width import Width


class ReIDModel(nn.Module):
    """A ReID network of `width`. Forward: normalised images (batch, 3, H, W) → (feature, embedding), both (batch, D):
    the pooled feature in front of the neck, which the triplet loss sees, and behind it, which retrieval and the
    classifier see (BNNeck: Luo et al., CVPRW 2019). The neck's bias is frozen at zero, as there.

    network: an architecture's name, or its table with sizes of its own (`Architecture.fixed`): then it is the module of
    `width` with the leading channels of every layer."""

    def __init__(self, network: str | Architecture, width: Width) -> None:
        super().__init__()
        self.table = architecture(network) if isinstance(network, str) else network
        self.width = width
        self.table.group_sizes(width)  # a width of another kind of network is refused with words
        self.backbone = backbone(self.table.name, width)
        self.neck = nn.BatchNorm1d(self.backbone.channels)
        if isinstance(network, Architecture):
            shrink_layers(self, network)
            self.backbone.channels = network.embedding_dim(width)
        self.neck.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature: Tensor = self.backbone(images)
        if feature.ndim == 4:
            feature = feature.mean(dim=(2, 3))
        return feature, self.neck(feature)

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (batch, D) behind the neck, not normalised."""
        embedding: Tensor = self(images)[1]
        return embedding

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by the axis table's names."""
        parameters = dict(self.named_parameters())
        return {name: parameters[module_name(name)] for name in self.table.axes}


def shrink_layers(model: ReIDModel, table: Architecture) -> None:
    """Cut the tensors of `model` down to the shapes of `table` in place; a layer computes by the shapes of its weights.
    Raises `ChainMismatch` where the model has fewer channels."""
    channels = table.statistic_sizes(model.width)
    shapes: dict[str, tuple[int, ...]] = {
        **table.tensor_shapes(model.width),
        **{f"{norm}.{kind}": (size,) for norm, size in channels.items() for kind in STATISTICS},
    }
    for name, shape in shapes.items():
        layer_name, _, kind = module_name(name).rpartition(".")
        layer = model.get_submodule(layer_name)
        tensor: Tensor = getattr(layer, kind)
        if any(size > full for size, full in zip(shape, tensor.shape, strict=True)):
            raise ChainMismatch(f"{name} is {tuple(tensor.shape)} at {model.width}; it cannot give {shape}")
        if tensor.shape != shape:
            leading = tensor.detach()[tuple(slice(size) for size in shape)].clone()
            setattr(layer, kind, nn.Parameter(leading) if isinstance(tensor, nn.Parameter) else leading)
            _state_size(layer, shape)


def _state_size(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """What a layer says, and some read, of its own size."""
    if isinstance(layer, nn.Conv2d):
        is_depthwise = layer.groups > 1
        layer.out_channels, layer.in_channels = shape[0], shape[0] if is_depthwise else shape[1]
        layer.groups = shape[0] if is_depthwise else 1
    elif isinstance(layer, nn.Linear) and len(shape) > 1:
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.InstanceNorm2d):
        layer.num_features = shape[0]


def module_name(tensor: str) -> str:
    """The name inside `ReIDModel` of a tensor or statistic of the axis table."""
    return tensor if tensor.startswith("neck.") else f"backbone.{tensor}"


def numpy_tensors(model: ReIDModel) -> dict[str, NDArray[np.float32]]:
    """Copies of the parameters as float32 arrays by the axis table's names."""
    return {
        name: tensor.detach().cpu().numpy().astype(np.float32, copy=True) for name, tensor in model.tensors().items()
    }


def model_of(network: str | Architecture, width: Width, tensors: Mapping[str, NDArray[np.float32]]) -> ReIDModel:
    """A model that holds `tensors` (axis table names; statistics too where given), in eval mode. network: as of
    `ReIDModel`. Raises `ChainMismatch` when a tensor is missing, unknown or of another shape."""
    model = ReIDModel(network, width)
    state = {module_name(name): torch.tensor(values) for name, values in tensors.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # torch lists every tensor of another shape; the first says enough
        first = str(error).splitlines()[1].strip()
        raise ChainMismatch(f"tensors do not fit {model.table.name} {width}: {first}") from error
    lacking = [name for name in missing if not name.endswith("num_batches_tracked") and "running_" not in name]
    if lacking or unexpected:
        raise ChainMismatch(
            f"tensors do not fit {model.table.name} {width}: lacking {lacking[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()


def network_of(chain: Chain) -> str | Architecture:
    """What `ReIDModel` makes a student of `chain` from."""
    return of_sizes(chain.architecture, chain.sizes)


def of_sizes(architecture_name: str, sizes: Mapping[str, int] | None) -> str | Architecture:
    """What `ReIDModel` makes a network from whose groups have `sizes`; `None`: those of its width."""
    return architecture_name if sizes is None else architecture(architecture_name).fixed(sizes)


def load_student(chain: Chain, width: Width) -> ReIDModel:
    """The calibrated student of `chain` at `width` as a torch module in eval mode; native embedding, leaf order.

    Raises `NotCalibrated` when the width has no statistics."""
    return model_of(network_of(chain), width, student(chain, width))


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
