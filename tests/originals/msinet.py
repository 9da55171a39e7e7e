"""MSINet (Gu et al., CVPR 2023; vimar-gu/MSINet): the recent lightweight network, 2.3 M parameters.

Why this one: of the lightweight ReID networks since 2021 it is the youngest whose definition and weights are both
public, and its parts are OSNet's (light convolutions, 1×1 convolutions, channel gates, additions) and two small ones.
LightMBN (2021) joins three OSNet tails with seven necks into 3584 numbers; of CDNet (2021) no definition was found.

Names: reid/models/msinet.py, operations.py. A cell has two branches, of one and three light convolutions, that
interact twice; `GENOTYPES['msmt']` is the published choice of interactions.

    conv1.{conv,bn}
    cells.{0,1,3,4,6,7}     conv1a, conv1b.{conv,bn} (1×1, ReLU)   conv2a.{L}, conv2b.{0..2}.{L}   _op2
                            conv3a.{L}, conv3b.{0..2}.{L}   _op3   conv4a, conv4b.{conv,bn}   downsample.{conv,bn}
    cells.{2,5}.0.{conv,bn} 1×1, ReLU, the average of 2×2
    _op2, _op3              none, exc (the branches change places): no tensors, so a file cannot tell the two apart
                            ag: fc1, fc2 with biases, OSNet's gate, the same for both branches
                            cross_att: gamma (1,), which starts at zero
    f_conv.{weight,bias}    1×1 on the output of cells.5, for the upper and the lower half
    fc, head, classifier; f_fc, f_head, f_classifier: training, and tests in other domains

The embedding of its tests in the same domain: the average of cells.7 (512), then f_conv's averages over the upper and
the lower half of the image (128 each), before any neck.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tests.originals import layers
from tests.originals.state import Shapes, State, batch_norm, conv, linear, random_state
from tests.originals.torchreid import gated, light

Operation = Literal["none", "exc", "ag", "cross_att"]
Genotype = tuple[tuple[Operation, Operation], ...]
GENOTYPES: dict[str, Genotype] = {
    "msmt": (
        ("ag", "ag"),
        ("exc", "ag"),
        ("cross_att", "ag"),
        ("ag", "none"),
        ("ag", "cross_att"),
        ("exc", "cross_att"),
    )
}
MSMT = GENOTYPES["msmt"]
CHANNELS = (64, 256, 384, 512)
CELLS = (0, 1, 3, 4, 6, 7)
TRANSITIONS = (2, 5)
PART = 128  # channels of each half
GATE_REDUCTION = 16


def checkpoint(
    *,
    genotype: Genotype = MSMT,
    channels: tuple[int, int, int, int] = CHANNELS,
    identities: int = 751,
    seed: int = 0,
) -> State:
    """genotype: operations of each of the six cells; channels: of the stem and the stages, less for a toy (those of the
    stages a multiple of 64 for the gates)."""
    found = _unit("conv1", channels[0], 3, 7)
    for stage in range(3):
        inputs, outputs = channels[stage], channels[stage + 1]
        found |= _cell(f"cells.{3 * stage}", inputs, outputs, genotype[2 * stage])
        found |= _cell(f"cells.{3 * stage + 1}", outputs, outputs, genotype[2 * stage + 1])
        found |= _unit(f"cells.{3 * stage + 2}.0", outputs, outputs) if stage < 2 else {}
    return random_state(found | _heads(channels[2], channels[3], identities), seed)


def _unit(name: str, rows: int, columns: int, kernel: int = 1) -> Shapes:
    return conv(f"{name}.conv", rows, columns, kernel) | batch_norm(f"{name}.bn", rows)


def _light(name: str, channels: int) -> Shapes:
    pointwise, depthwise = conv(f"{name}.conv1", channels, channels), conv(f"{name}.conv2", channels, 1, 3)
    return pointwise | depthwise | batch_norm(f"{name}.bn", channels)


def _cell(name: str, inputs: int, outputs: int, operations: tuple[Operation, Operation]) -> Shapes:
    middle = outputs // 4
    found = _unit(f"{name}.conv1a", middle, inputs) | _unit(f"{name}.conv1b", middle, inputs)
    for place, operation in zip((2, 3), operations, strict=True):
        found |= _light(f"{name}.conv{place}a", middle)
        for index in range(3):
            found |= _light(f"{name}.conv{place}b.{index}", middle)
        found |= _operation(f"{name}._op{place}", operation, middle)
    found |= _unit(f"{name}.conv4a", outputs, middle) | _unit(f"{name}.conv4b", outputs, middle)
    return found | (_unit(f"{name}.downsample", outputs, inputs) if inputs != outputs else {})


def _operation(name: str, operation: Operation, channels: int) -> Shapes:
    if operation == "cross_att":
        return {f"{name}.gamma": (1,)}
    if operation != "ag":
        return {}
    inner = channels // GATE_REDUCTION
    return conv(f"{name}.fc1", inner, channels, bias=True) | conv(f"{name}.fc2", channels, inner, bias=True)


def _heads(third: int, fourth: int, identities: int) -> Shapes:
    found = batch_norm("head", fourth) | linear("fc", fourth, fourth, bias=False)
    found |= linear("classifier", identities, fourth) | conv("f_conv", PART, third, bias=True)
    found |= batch_norm("f_head", 2 * PART) | linear("f_fc", 2 * PART, 2 * PART, bias=False)
    return found | linear("f_classifier", identities, 2 * PART)


def embed(state: State, images: Tensor, *, genotype: Genotype = MSMT) -> Tensor:
    """Images (batch, 3, H, W) → (batch, 768): global, upper half, lower half."""
    feature, parts = _features(state, images, genotype)
    return torch.cat([feature, parts], dim=1)


def embed_elsewhere(state: State, images: Tensor, *, genotype: Genotype = MSMT) -> Tensor:
    """The embedding of its tests in other domains (batch, 768): after linear layer and neck."""
    feature, parts = _features(state, images, genotype)
    first = layers.batch_norm(state, "head", layers.linear(state, "fc", feature))
    second = layers.batch_norm(state, "f_head", layers.linear(state, "f_fc", parts))
    return torch.cat([first, second], dim=1)


def _features(state: State, images: Tensor, genotype: Genotype) -> tuple[Tensor, Tensor]:
    x = layers.max_pooled(functional.relu(_normed(state, "conv1", images, 2)))
    parts = x
    for index in range(8):
        if index in TRANSITIONS:
            x = layers.halved(functional.relu(_normed(state, f"cells.{index}.0", x)))
        else:
            x = _cell_map(state, f"cells.{index}", x, genotype[CELLS.index(index)])
        if index == 5:
            parts = layers.conv(state, "f_conv", x)
    middle = parts.shape[2] // 2
    halves = (layers.average(parts[:, :, :middle]), layers.average(parts[:, :, middle:]))
    return layers.average(x), torch.cat(halves, dim=1)


def _normed(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    return layers.batch_norm(state, f"{name}.bn", layers.conv(state, f"{name}.conv", x, stride))


def _cell_map(state: State, name: str, x: Tensor, operations: tuple[Operation, Operation]) -> Tensor:
    a, b = (functional.relu(_normed(state, f"{name}.conv1{branch}", x)) for branch in "ab")
    for place, operation in zip((2, 3), operations, strict=True):
        a = light(state, f"{name}.conv{place}a", a)
        for index in range(3):
            b = light(state, f"{name}.conv{place}b.{index}", b)
        a, b = _interact(state, f"{name}._op{place}", operation, a, b)
    out = _normed(state, f"{name}.conv4a", a) + _normed(state, f"{name}.conv4b", b)
    shortcut = _normed(state, f"{name}.downsample", x) if f"{name}.downsample.conv.weight" in state else x
    return functional.relu(out + shortcut)


def _interact(state: State, name: str, operation: Operation, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if operation == "none":
        return a, b
    if operation == "exc":
        return b, a
    if operation == "ag":
        return gated(state, name, a), gated(state, name, b)
    gamma = state[f"{name}.gamma"]
    return a + gamma * _attended(a, b), b + gamma * _attended(b, a)


def _attended(own: Tensor, other: Tensor) -> Tensor:
    """Channels (rows) as mixtures of channels of the same branch, the more of those unlike in the other branch:
    softmax(max E − E) V with E = V Kᵀ over the places of the map, V (batch, C, H·W) this branch and K the other."""
    values, keys = own.flatten(2), other.flatten(2)
    energy = values @ keys.transpose(1, 2)  # (batch, C, C)
    weights = torch.softmax(energy.amax(dim=2, keepdim=True) - energy, dim=2)
    return (weights @ values).reshape(own.shape)
