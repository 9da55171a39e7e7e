"""torchreid (KaiyangZhou/deep-person-reid): OSNet and its kin, MobileNetV2, ResNets.

Names: torchreid/models/osnet.py, osnet_ain.py, mobilenetv2.py, resnet.py, resnet_ibn_a.py; files:
torchreid/utils/torchtools.py. Papers: Zhou et al., ICCV 2019 and TPAMI 2021; Sandler et al., CVPR 2018.

    OSNet, conv{2,3,4}.{0,1}   conv1.{conv,bn}
                               conv2a.{L}, conv2b.{0,1}.{L}, conv2c.{0..2}.{L}, conv2d.{0..3}.{L}
                               gate.fc1, gate.fc2 (with biases)   conv3.{conv,bn}   downsample.{conv,bn}   IN
    OSNet-AIN                  the streams are conv2.{t}.layers.{k}.{L}, t = 0..3, k = 0..t
    L, a light convolution     conv1.weight (1×1), conv2.weight (3×3, depthwise), bn.*
    transitions                conv2.2.0, conv3.2.0; in AIN pool2.0, pool3.0: a 1×1 convolution, then the average of 2×2
    heads                      fc.0 (linear, with bias), fc.1 (BatchNorm1d), ReLU; classifier.weight, classifier.bias

What no name shows: one gate weighs all four streams of a block; the embedding of OSNet is after a ReLU; a ResNet has
last stride 2, unless it has `fc` (resnet50_fc512). InstanceNorm has no statistics: with IBN conv1.bn and the IN after
the addition in conv2, with AIN conv1.bn and the IN inside the residual, where conv3 then has no norm of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.originals import layers, residual
from tests.originals.state import Shapes, State, batch_norm, conv, instance_norm, linear, random_state

Channels = tuple[int, int, int, int]
OSNET: dict[str, Channels] = {
    "x1_0": (64, 256, 384, 512),
    "x0_75": (48, 192, 288, 384),
    "x0_5": (32, 128, 192, 256),
    "x0_25": (16, 64, 96, 128),
}
EMBEDDING = 512
STREAMS = "abcd"
GATE_REDUCTION = 16
NORMALISED_INSIDE = (
    "conv2.0",
    "conv2.1",
    "conv3.1",
    "conv4.0",
)  # the blocks of AIN with an IN, as the search left them
MOBILENET = (  # stage, expansion, channels at x1.0, blocks, stride of the first
    ("conv2", 1, 16, 1, 1),
    ("conv3", 6, 24, 2, 2),
    ("conv4", 6, 32, 3, 2),
    ("conv5", 6, 64, 4, 2),
    ("conv6", 6, 96, 3, 1),
    ("conv7", 6, 160, 3, 2),
    ("conv8", 6, 320, 1, 1),
)
RESNETS = (*residual.DEPTHS, "resnet50_fc512", "resnet50_ibn_a")
NAMES = (
    *(f"osnet_{size}" for size in OSNET),
    "osnet_ibn_x1_0",
    *(f"osnet_ain_{size}" for size in OSNET),
    "mobilenetv2_x1_0",
    "mobilenetv2_x1_4",
    *RESNETS,
)


def checkpoint(name: str = "osnet_x1_0", *, identities: int = 751, seed: int = 0, stem: int = 64) -> State:
    """One of `NAMES`; stem: of a ResNet, 64 as published, less for a toy."""
    if name in RESNETS:
        return random_state(_resnet(name, stem, identities), seed)
    family, _, size = name.partition("_x")
    if family == "mobilenetv2":
        return random_state(_mobilenet(float(size.replace("_", ".")), identities), seed)
    build = {"osnet": _osnet, "osnet_ibn": _osnet_ibn, "osnet_ain": _osnet_ain}[family]
    return random_state(build(OSNET[f"x{size}"]) | linear("classifier", identities, EMBEDDING), seed)


def osnet_checkpoint(channels: Channels, *, ain: bool = False, identities: int = 7, seed: int = 0) -> State:
    """An OSNet of any width: `channels` of the stem and of the three stages, those a multiple of 64 for the gates."""
    return random_state((_osnet_ain if ain else _osnet)(channels) | linear("classifier", identities, EMBEDDING), seed)


def training_file(state: State) -> dict[str, Any]:
    """What its engine saves after an epoch, as model.pth.tar-60."""
    return {"state_dict": state, "epoch": 60, "rank1": 0.94, "optimizer": {"state": {}, "param_groups": []}}


def embed(state: State, images: Tensor) -> Tensor:
    """The feature of eval mode (batch, D): 512 of an OSNet, 1280 (1792) of MobileNetV2, 512 or 2048 of a ResNet."""
    if "conv9.conv.weight" in state:
        return layers.average(_mobilenet_map(state, images))
    if "conv1.conv.weight" in state:
        return _reduced(state, layers.average(_osnet_map(state, images)))
    if "fc.0.weight" in state:
        return _reduced(state, layers.average(residual.feature_map(state, images, last_stride=1)))
    return layers.average(residual.feature_map(state, images, last_stride=2))


def _unit(name: str, rows: int, columns: int, kernel: int = 1) -> Shapes:
    """Convolution and batch norm."""
    return conv(f"{name}.conv", rows, columns, kernel) | batch_norm(f"{name}.bn", rows)


def _light(name: str, channels: int) -> Shapes:
    pointwise, depthwise = conv(f"{name}.conv1", channels, channels), conv(f"{name}.conv2", channels, 1, 3)
    return pointwise | depthwise | batch_norm(f"{name}.bn", channels)


def _gate(name: str, channels: int) -> Shapes:
    inner = channels // GATE_REDUCTION
    return conv(f"{name}.fc1", inner, channels, bias=True) | conv(f"{name}.fc2", channels, inner, bias=True)


def _reduction(features: int) -> Shapes:
    return linear("fc.0", EMBEDDING, features) | batch_norm("fc.1", EMBEDDING)


def _stream_names(block: str, *, ain: bool) -> list[list[str]]:
    """The light convolutions of each of the four streams of a block."""
    if ain:
        return [[f"{block}.conv2.{t}.layers.{k}" for k in range(t + 1)] for t in range(len(STREAMS))]
    first = [f"{block}.conv2a"]
    return [first, *([f"{block}.conv2{s}.{k}" for k in range(t + 1)] for t, s in enumerate(STREAMS) if t)]


def _osblock(block: str, inputs: int, outputs: int, *, ain: bool = False) -> Shapes:
    middle = outputs // 4
    found = _unit(f"{block}.conv1", middle, inputs)
    for stream in _stream_names(block, ain=ain):
        for name in stream:
            found |= _light(name, middle)
    found |= _gate(f"{block}.gate", middle)
    found |= conv(f"{block}.conv3.conv", outputs, middle)
    is_normalised_inside = ain and block in NORMALISED_INSIDE
    found |= {} if is_normalised_inside else batch_norm(f"{block}.conv3.bn", outputs)
    found |= _unit(f"{block}.downsample", outputs, inputs) if inputs != outputs else {}
    return found | (instance_norm(f"{block}.IN", outputs) if is_normalised_inside else {})


def _osnet(channels: Channels) -> Shapes:
    stem, second, third, fourth = channels
    found = _unit("conv1", stem, 3, 7)
    for stage, inputs, outputs in (("conv2", stem, second), ("conv3", second, third), ("conv4", third, fourth)):
        found |= _osblock(f"{stage}.0", inputs, outputs) | _osblock(f"{stage}.1", outputs, outputs)
        found |= _unit(f"{stage}.2.0", outputs, outputs) if stage != "conv4" else {}
    return found | _unit("conv5", fourth, fourth) | _reduction(fourth)


def _osnet_ibn(channels: Channels) -> Shapes:
    plain = {name: shape for name, shape in _osnet(channels).items() if not name.startswith("conv1.bn.")}
    added = instance_norm("conv2.0.IN", channels[1]) | instance_norm("conv2.1.IN", channels[1])
    return plain | instance_norm("conv1.bn", channels[0]) | added


def _osnet_ain(channels: Channels) -> Shapes:
    stem, second, third, fourth = channels
    found = conv("conv1.conv", stem, 3, 7) | instance_norm("conv1.bn", stem)
    for stage, inputs, outputs in (("conv2", stem, second), ("conv3", second, third), ("conv4", third, fourth)):
        found |= _osblock(f"{stage}.0", inputs, outputs, ain=True) | _osblock(f"{stage}.1", outputs, outputs, ain=True)
        found |= _unit(f"pool{stage[-1]}.0", outputs, outputs) if stage != "conv4" else {}
    return found | _unit("conv5", fourth, fourth) | _reduction(fourth)


def _mobilenet(width: float, identities: int) -> Shapes:
    inputs = int(32 * width)
    found = _unit("conv1", inputs, 3, 3)
    for stage, expansion, base, blocks, _ in MOBILENET:
        for index in range(blocks):
            block, middle, outputs = f"{stage}.{index}", inputs * expansion, int(base * width)
            found |= _unit(f"{block}.conv1", middle, inputs) | _unit(f"{block}.dwconv2", middle, 1, 3)
            found |= conv(f"{block}.conv3.0", outputs, middle) | batch_norm(f"{block}.conv3.1", outputs)
            inputs = outputs
    features = int(1280 * width) if width > 1 else 1280
    return found | _unit("conv9", features, inputs) | linear("classifier", identities, features)


def _resnet(name: str, stem: int, identities: int) -> Shapes:
    build = residual.Build(name.partition("_")[0], stem, ibn=name.endswith("_ibn_a"))
    found = residual.shapes(build)
    is_reduced = name.endswith("_fc512")
    found |= _reduction(build.features) if is_reduced else {}
    return found | linear("classifier", identities, EMBEDDING if is_reduced else build.features)


def _reduced(state: State, feature: Tensor) -> Tensor:
    return functional.relu(layers.batch_norm(state, "fc.1", layers.linear(state, "fc.0", feature)))


def _norm_unit(state: State, name: str, x: Tensor, stride: int = 1, *, depthwise: bool = False) -> Tensor:
    out = layers.conv(state, f"{name}.conv", x, stride, depthwise=depthwise)
    return layers.any_norm(state, f"{name}.bn", out) if f"{name}.bn.weight" in state else out


def light(state: State, name: str, x: Tensor) -> Tensor:
    """Pointwise without norm or activation, depthwise, norm, ReLU."""
    x = layers.conv(state, f"{name}.conv2", layers.conv(state, f"{name}.conv1", x), depthwise=True)
    return functional.relu(layers.batch_norm(state, f"{name}.bn", x))


def gated(state: State, name: str, x: Tensor) -> Tensor:
    """x times the sigmoid of what two 1×1 convolutions make of its average."""
    hidden = functional.relu(layers.conv(state, f"{name}.fc1", x.mean(dim=(2, 3), keepdim=True)))
    return x * torch.sigmoid(layers.conv(state, f"{name}.fc2", hidden))


def _osblock_map(state: State, block: str, x: Tensor) -> Tensor:
    ain = f"{block}.conv2.0.layers.0.conv1.weight" in state
    inner = functional.relu(_norm_unit(state, f"{block}.conv1", x))
    total = torch.zeros_like(inner)
    for stream in _stream_names(block, ain=ain):
        out = inner
        for name in stream:
            out = light(state, name, out)
        total = total + gated(state, f"{block}.gate", out)
    out = _norm_unit(state, f"{block}.conv3", total)
    has_instance_norm = f"{block}.IN.weight" in state
    if has_instance_norm and ain:
        out = layers.instance_norm(state, f"{block}.IN", out)
    out = out + (_norm_unit(state, f"{block}.downsample", x) if f"{block}.downsample.conv.weight" in state else x)
    if has_instance_norm and not ain:
        out = layers.instance_norm(state, f"{block}.IN", out)
    return functional.relu(out)


def _osnet_map(state: State, images: Tensor) -> Tensor:
    x = layers.max_pooled(functional.relu(_norm_unit(state, "conv1", images, 2)))
    for stage in ("conv2", "conv3", "conv4"):
        for index in (0, 1):
            x = _osblock_map(state, f"{stage}.{index}", x)
        for transition in (f"{stage}.2.0", f"pool{stage[-1]}.0"):
            if f"{transition}.conv.weight" in state:
                x = layers.halved(functional.relu(_norm_unit(state, transition, x)))
    return functional.relu(_norm_unit(state, "conv5", x))


def _mobilenet_map(state: State, images: Tensor) -> Tensor:
    x = functional.relu6(_norm_unit(state, "conv1", images, 2))
    for stage, _, _, blocks, stride in MOBILENET:
        for index in range(blocks):
            x = _inverted(state, f"{stage}.{index}", x, stride if index == 0 else 1)
    return functional.relu6(_norm_unit(state, "conv9", x))


def _inverted(state: State, block: str, x: Tensor, stride: int) -> Tensor:
    """Widened, filtered and narrowed again; with a shortcut where the shape stays."""
    out = functional.relu6(_norm_unit(state, f"{block}.conv1", x))
    out = functional.relu6(_norm_unit(state, f"{block}.dwconv2", out, stride, depthwise=True))
    out = layers.batch_norm(state, f"{block}.conv3.1", layers.conv(state, f"{block}.conv3.0", out))
    return out + x if stride == 1 and out.shape[1] == x.shape[1] else out
