"""What other projects' ViT checkpoints hold and what their models answer: names, shapes, and a literal forward pass.

Written from the public descriptions and repositories of TransReID (He et al., ICCV 2021; damo-cv/TransReID),
TransReID-SSL (Luo et al., 2021; damo-cv/TransReID-SSL), PASS (Zhu et al., ECCV 2022; CASIA-IVA-Lab/PASS-reID), OSKT
(kiddo127/OSKT: PASS with one more projection), fast-reid (JDAI-CV/fast-reid), and DeiT / timm (ImageNet). It shares no
line with the library: importers are checked against it.

SOLIDER (tinyvision/SOLIDER-REID) publishes Swin transformers only; `swin_shapes` has their names, for refusals. The ViT
file of that repository is TransReID-SSL's, so "SOLIDER-style ViT names" are kind `transreid-ssl`.

A file tells neither heads nor stride nor attention scale, nor on which side of the neck the embedding is: `Vit` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tests.originals import layers
from tests.originals.state import Shapes, State, batch_norm, conv, instance_norm, linear

Kind = Literal["transreid", "transreid-ssl", "pass", "oskt", "fast-reid", "timm", "deit-distilled"]

LAYER_NORM_EPSILON = 1e-6
HEAD_CLASSES = 1000  # of `fc` and `head`: the default of the code they all start from, also where it is never used
STEM_CHANNELS = 64
STEM_STRIDE = 2
SHIFT, SHUFFLE_GROUPS, QUARTERS = 5, 2, 4  # JPM: the values of every published configuration
PARTS = 3  # PASS
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Vit:
    """A checkpoint's project and sizes. Defaults: ViT-S, 256 × 128, as the projects publish it.

    input: (height, width) in pixels. attention_scale: None is head_dim ** -0.5. cameras, views: side information (SIE),
    0: none. stem: the convolutional patch embedding of TransReID-SSL (ICS). jpm: TransReID's jigsaw branches.
    multi_neck, fusion: PASS. neck_feat: which side of the neck is the embedding; every published configuration of the
    TransReID family says `before`.
    """

    kind: Kind
    embed_dim: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    stride: int = 16
    input: tuple[int, int] = (256, 128)
    mlp_ratio: int = 4
    qkv_bias: bool = True
    attention_scale: float | None = None
    cameras: int = 0
    views: int = 0
    sie_coefficient: float = 3.0
    stem: bool = False
    jpm: bool = False
    multi_neck: bool = True
    fusion: Literal["cat", "mean"] = "cat"
    neck_feat: Literal["before", "after"] = "before"
    identities: int = 751

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; no padding."""
        height, width = ((size - self.patch) // self.stride + 1 for size in self.input)
        return height, width

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> str:
        """What stands before the backbone's names."""
        return {"fast-reid": "backbone.", "timm": "", "deit-distilled": ""}.get(self.kind, "base.")

    @property
    def has_parts(self) -> bool:
        return self.kind in {"pass", "oskt"}

    @property
    def scale(self) -> float:
        return self.attention_scale or float((self.embed_dim // self.heads) ** -0.5)

    @property
    def pixel_mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of pixels in 0..1. fast-reid states the same numbers for 0..255 (127.5)."""
        return IMAGENET if self.kind == "deit-distilled" else HALF


def toy(kind: Kind, **changes: object) -> Vit:
    """A small one: 3 blocks of 2 heads, 24 channels, 4 × 2 patches of 8 × 8 pixels."""
    sizes = {"embed_dim": 24, "depth": 3, "heads": 2, "patch": 8, "stride": 8, "input": (32, 16), "identities": 5}
    return Vit(kind, **{**sizes, **changes})  # type: ignore[arg-type] # a table of sizes


def as_base(vit: Vit) -> Vit:
    """The same as ViT-B."""
    return replace(vit, embed_dim=768, heads=12)


def old_small(kind: Literal["transreid", "fast-reid"]) -> Vit:
    """What TransReID calls `vit_small_patch16_224_TransReID` and fast-reid `DEPTH: small`: not ViT-S. No bias in qkv,
    and a scale that is not that of its heads (96 channels)."""
    return Vit(kind, 768, 8, 8, mlp_ratio=3, qkv_bias=False, attention_scale=768**-0.5)


def shapes(vit: Vit) -> Shapes:
    """Name -> shape of every tensor, in the order of the file."""
    backbone = {f"{vit.prefix}{name}": shape for name, shape in _backbone_shapes(vit).items()}
    return backbone | _head_shapes(vit)


def _backbone_shapes(vit: Vit) -> Shapes:
    found = _token_shapes(vit) | _patch_shapes(vit)
    for index in range(vit.depth):
        found |= _block_shapes(vit, f"blocks.{index}")
    found |= _layer_norm("norm", vit.embed_dim)
    if vit.kind in {"timm", "deit-distilled"}:
        found |= linear("head", HEAD_CLASSES, vit.embed_dim)
    elif vit.kind != "fast-reid":
        found |= linear("fc", HEAD_CLASSES, vit.embed_dim)
    if vit.kind == "deit-distilled":
        found |= linear("head_dist", HEAD_CLASSES, vit.embed_dim)
    if vit.kind == "oskt":
        found["dw.weight"] = (vit.embed_dim, vit.embed_dim)
    return found


def _token_shapes(vit: Vit) -> Shapes:
    one = (1, 1, vit.embed_dim)
    if vit.has_parts:
        names = ("cls_token", *(f"part_token{i}" for i in _parts()), "cls_pos", *(f"part{i}_pos" for i in _parts()))
        return {**dict.fromkeys(names, one), "pos_embed": (1, vit.patches, vit.embed_dim)}
    distilled: Shapes = {"dist_token": one} if vit.kind == "deit-distilled" else {}
    found: Shapes = {"cls_token": one, "pos_embed": (1, 1 + len(distilled) + vit.patches, vit.embed_dim)} | distilled
    sides = max(vit.cameras, 1) * max(vit.views, 1)
    return found | ({"sie_embed": (sides, 1, vit.embed_dim)} if sides > 1 else {})


def _patch_shapes(vit: Vit) -> Shapes:
    place, side, channels = "patch_embed", vit.patch, 3
    found: Shapes = {}
    if vit.stem:
        channels, side = STEM_CHANNELS, side // STEM_STRIDE
        found |= conv(f"{place}.conv.0", channels, 3, 7) | _half_norms(f"{place}.conv.1")
        found |= conv(f"{place}.conv.3", channels, channels, 3) | _half_norms(f"{place}.conv.4")
        found |= conv(f"{place}.conv.6", channels, channels, 3) | batch_norm(f"{place}.conv.7", channels)
    return found | conv(f"{place}.proj", vit.embed_dim, channels, side, bias=True)


def _half_norms(place: str) -> Shapes:
    """IBN: instance norm over the first half, batch norm over the second."""
    half = STEM_CHANNELS // 2
    return instance_norm(f"{place}.IN", half) | batch_norm(f"{place}.BN", half)


def _block_shapes(vit: Vit, place: str) -> Shapes:
    dim, hidden = vit.embed_dim, vit.embed_dim * vit.mlp_ratio
    qkv = linear(f"{place}.attn.qkv", 3 * dim, dim, bias=vit.qkv_bias)
    first = _layer_norm(f"{place}.norm1", dim) | qkv | linear(f"{place}.attn.proj", dim, dim)
    second = _layer_norm(f"{place}.norm2", dim) | linear(f"{place}.mlp.fc1", hidden, dim)
    return first | second | linear(f"{place}.mlp.fc2", dim, hidden)


def _head_shapes(vit: Vit) -> Shapes:
    """Classifiers and necks."""
    dim, pids = vit.embed_dim, vit.identities
    if vit.kind in {"timm", "deit-distilled"}:
        return {}
    if vit.kind == "fast-reid":
        return {"heads.weight": (pids, dim), **batch_norm("heads.bottleneck.0", dim)}
    if vit.has_parts:
        wide = dim * 2 if vit.fusion == "cat" else dim
        necks = [("bottleneck", wide)]
        if vit.multi_neck:
            necks = [("bottleneck", dim), *((f"bottleneck_{i}", dim) for i in _parts())]
        return {"classifier.weight": (pids, wide)} | _all_necks(necks)
    if not vit.jpm:
        return {"classifier.weight": (pids, dim)} | _all_necks([("bottleneck", dim)])
    branches: Shapes = {}
    for branch in ("b1", "b2"):
        branches |= _block_shapes(vit, f"{branch}.0") | _layer_norm(f"{branch}.1", dim)
    suffixes = ("", *(f"_{i}" for i in _quarters()))
    branches |= {f"classifier{suffix}.weight": (pids, dim) for suffix in suffixes}
    return branches | _all_necks([(f"bottleneck{suffix}", dim) for suffix in suffixes])


def _all_necks(necks: list[tuple[str, int]]) -> Shapes:
    return {name: shape for place, size in necks for name, shape in batch_norm(place, size).items()}


def _layer_norm(place: str, size: int) -> Shapes:
    return {f"{place}.weight": (size,), f"{place}.bias": (size,)}


def _parts() -> range:
    return range(1, PARTS + 1)


def _quarters() -> range:
    return range(1, QUARTERS + 1)


def swin_shapes(embed_dim: int = 96, depths: tuple[int, ...] = (2, 2, 6, 2), window: int = 7) -> Shapes:
    """SOLIDER-REID's Swin-T: names and shapes of its backbone and neck; head size 32."""
    found = conv("base.patch_embed.projection", embed_dim, 3, 4, bias=True)
    found |= _layer_norm("base.patch_embed.norm", embed_dim)
    for stage, depth in enumerate(depths):
        dim = embed_dim * 2**stage
        for index in range(depth):
            found |= _swin_block_shapes(f"base.stages.{stage}.blocks.{index}", dim, window)
        if stage + 1 < len(depths):
            found |= _layer_norm(f"base.stages.{stage}.downsample.norm", 4 * dim)
            found[f"base.stages.{stage}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
    for stage in range(len(depths)):
        found |= _layer_norm(f"base.norm{stage}", embed_dim * 2**stage)
    for kind in ("w", "b"):
        for stage in range(len(depths)):
            wide = embed_dim * 2 ** min(stage + 1, len(depths) - 1)
            found |= linear(f"base.semantic_embed_{kind}.{stage}", wide, 2)
    return found | batch_norm("bottleneck", embed_dim * 2 ** (len(depths) - 1))


def _swin_block_shapes(place: str, dim: int, window: int) -> Shapes:
    attention = f"{place}.attn.w_msa"
    found = _layer_norm(f"{place}.norm1", dim)
    found[f"{attention}.relative_position_bias_table"] = ((2 * window - 1) ** 2, dim // 32)
    found[f"{attention}.relative_position_index"] = (window**2, window**2)
    found |= linear(f"{attention}.qkv", 3 * dim, dim) | linear(f"{attention}.proj", dim, dim)
    found |= _layer_norm(f"{place}.norm2", dim) | linear(f"{place}.ffn.layers.0.0", 4 * dim, dim)
    return found | linear(f"{place}.ffn.layers.1", dim, 4 * dim)


def checkpoint(vit: Vit, seed: int) -> State:
    """A state dict of random numbers, none of them at its starting value: norms and statistics differ per channel, and
    so do tokens and positions. Only the frozen bias of a neck is zero, as in the projects."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, shape, generator) for name, shape in shapes(vit).items()}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers that suit a tensor of this name: norms around 1, weights scaled by what they read."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    values: Tensor = torch.randn(shape, generator=generator)
    if name.endswith("running_var"):
        return 0.5 + values.square()
    if "bottleneck" in name and name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return 1 + 0.2 * values if name.endswith(".weight") else 0.2 * values
    if name.endswith("dw.weight"):
        return torch.eye(shape[0]) + 0.2 * values / math.sqrt(shape[0])  # starts as the identity, and is trained
    if len(shape) == 3:
        return 0.5 * values  # tokens, positions, side information
    return values / math.sqrt(math.prod(shape[1:]))


def saved(vit: Vit, state: State) -> dict[str, object]:
    """What the project hands to `torch.save`."""
    if vit.kind in {"fast-reid", "deit-distilled"}:
        return {"model": state}
    return dict(state)


def embed(
    vit: Vit,
    state: State,
    images: Tensor,
    camera: int = 0,
    view: int = 0,
    branches: Literal["all", "global"] = "all",
) -> Tensor:
    """The project's test feature of normalised images (batch, 3, H, W), before the evaluator's L2 normalisation.

    Shape: (batch, D); JPM (batch, 5 D); PASS with `cat` (batch, 2 D). `global`: its first D numbers, from the class
    token alone. ImageNet models answer the class token in front of their head."""
    x = _tokens(vit, state, images)
    x = x + _positions(vit, state, camera, view)
    if vit.kind == "oskt":
        x = x @ state["base.dw.weight"].T
    if vit.jpm:
        return _jigsaw(vit, state, x, branches)
    for index in range(vit.depth):
        x = _block(vit, state, f"{vit.prefix}blocks.{index}", x)
    x = layer_norm(state, f"{vit.prefix}norm", x)
    if vit.has_parts:
        return _parts_feature(vit, state, x, branches)
    if vit.kind in {"timm", "deit-distilled"}:
        return x[:, 0]
    if vit.kind == "fast-reid":
        return layers.batch_norm(state, "heads.bottleneck.0", x[:, 0])  # the side that NECK_FEAT names is for training
    return _necked(vit, state, "bottleneck", x[:, 0])


def _tokens(vit: Vit, state: State, images: Tensor) -> Tensor:
    """Extra tokens, then patches row by row: (batch, tokens, D)."""
    place = f"{vit.prefix}patch_embed"
    patch, stride = vit.patch, vit.stride
    if vit.stem:
        images = _stem(state, f"{place}.conv", images)
        patch = stride = vit.patch // STEM_STRIDE  # the stem takes no other stride
    weight, bias = state[f"{place}.proj.weight"], state[f"{place}.proj.bias"]
    found = [
        images[:, :, top : top + patch, left : left + patch].flatten(1) @ weight.flatten(1).T + bias
        for top in range(0, images.shape[2] - patch + 1, stride)
        for left in range(0, images.shape[3] - patch + 1, stride)
    ]
    names = ["cls_token", *(f"part_token{i}" for i in _parts() if vit.has_parts)]
    names += ["dist_token"] if vit.kind == "deit-distilled" else []
    extra = [state[f"{vit.prefix}{name}"][0, 0].expand(len(images), -1) for name in names]
    return torch.stack([*extra, *found], dim=1)


def _stem(state: State, place: str, images: Tensor) -> Tensor:
    """Three convolutions, the first of stride 2: (batch, 64, H / 2, W / 2)."""
    x = layers.conv(state, f"{place}.0", images, STEM_STRIDE)
    x = layers.half_instance_norm(state, f"{place}.1", x).clamp(min=0)
    x = layers.conv(state, f"{place}.3", x)
    x = layers.half_instance_norm(state, f"{place}.4", x).clamp(min=0)
    x = layers.conv(state, f"{place}.6", x)
    return layers.batch_norm(state, f"{place}.7", x).clamp(min=0)


def _positions(vit: Vit, state: State, camera: int, view: int) -> Tensor:
    """What is added to every token: (1, tokens, D)."""
    names = ["cls_pos", *(f"part{i}_pos" for i in _parts()), "pos_embed"] if vit.has_parts else ["pos_embed"]
    positions = torch.cat([state[f"{vit.prefix}{name}"] for name in names], dim=1)
    side = state.get(f"{vit.prefix}sie_embed")
    if side is None:
        return positions
    return positions + vit.sie_coefficient * side[camera * max(vit.views, 1) + view]


def _block(vit: Vit, state: State, place: str, x: Tensor) -> Tensor:
    """Pre-norm: x + attention, then x + MLP. (batch, tokens, D) → the same."""
    x = x + _attention(vit, state, f"{place}.attn", layer_norm(state, f"{place}.norm1", x))
    hidden = layers.linear(state, f"{place}.mlp.fc1", layer_norm(state, f"{place}.norm2", x))
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + layers.linear(state, f"{place}.mlp.fc2", hidden)


def _attention(vit: Vit, state: State, place: str, x: Tensor) -> Tensor:
    """One head after the other. Rows of qkv: all queries, all keys, all values; inside each, head by head."""
    queries, keys, values = layers.linear(state, f"{place}.qkv", x).chunk(3, dim=-1)
    size, outputs = vit.embed_dim // vit.heads, []
    for head in range(vit.heads):
        span = slice(head * size, (head + 1) * size)
        scores = vit.scale * torch.einsum("bqd,bkd->bqk", queries[..., span], keys[..., span])
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        outputs.append(torch.einsum("bqk,bkd->bqd", weights, values[..., span]))
    return layers.linear(state, f"{place}.proj", torch.cat(outputs, dim=-1))


def _jigsaw(vit: Vit, state: State, x: Tensor, branches: str) -> Tensor:
    """JPM: the last block and the norm exist three times, and the backbone's own two are not used."""
    for index in range(vit.depth - 1):
        x = _block(vit, state, f"base.blocks.{index}", x)
    whole = _necked(vit, state, "bottleneck", _branch(vit, state, "b1", x))
    if branches == "global":
        return whole
    token, patches = x[:, :1], _shuffled(x[:, 1:])
    length = (x.shape[1] - 1) // QUARTERS
    found = [whole]
    for index in _quarters():
        quarter = patches[:, (index - 1) * length : index * length]
        feature = _branch(vit, state, "b2", torch.cat([token, quarter], dim=1))
        found.append(_necked(vit, state, f"bottleneck_{index}", feature) / QUARTERS)
    return torch.cat(found, dim=1)


def _branch(vit: Vit, state: State, name: str, x: Tensor) -> Tensor:
    return layer_norm(state, f"{name}.1", _block(vit, state, f"{name}.0", x))[:, 0]


def _shuffled(patches: Tensor) -> Tensor:
    """Shifted, then the two halves interleaved. The shift of 5 counts the class token, so 4 patches go to the end; an
    odd number of patches gets the last but one again.

    Eight patches 0..7: shifted 4 5 6 7 0 1 2 3, interleaved 4 0 5 1 6 2 7 3."""
    shifted = torch.cat([patches[:, SHIFT - 1 :], patches[:, : SHIFT - 1]], dim=1)
    if shifted.shape[1] % SHUFFLE_GROUPS:
        shifted = torch.cat([shifted, shifted[:, -2:-1]], dim=1)
    return torch.stack(shifted.chunk(SHUFFLE_GROUPS, dim=1), dim=2).flatten(1, 2)


def _parts_feature(vit: Vit, state: State, x: Tensor, branches: str) -> Tensor:
    """PASS: the class token with the mean of the three part tokens."""
    necks = ["bottleneck", *(f"bottleneck_{i}" for i in _parts())]
    if vit.multi_neck:
        whole, *parts = (_necked(vit, state, neck, x[:, index]) for index, neck in enumerate(necks))
    else:
        whole, *parts = (x[:, index] for index in range(1 + PARTS))
    mean = parts[0] / PARTS + parts[1] / PARTS + parts[2] / PARTS
    fused = torch.cat([whole, mean], dim=1) if vit.fusion == "cat" else (whole + mean) / 2
    if not vit.multi_neck:
        fused = _necked(vit, state, "bottleneck", fused)
    return fused[:, : vit.embed_dim] if branches == "global" and vit.fusion == "cat" else fused


def _necked(vit: Vit, state: State, neck: str, feature: Tensor) -> Tensor:
    return layers.batch_norm(state, neck, feature) if vit.neck_feat == "after" else feature


def layer_norm(state: State, place: str, x: Tensor) -> Tensor:
    """Over the last axis."""
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + LAYER_NORM_EPSILON).sqrt()
    return scaled * state[f"{place}.weight"] + state[f"{place}.bias"]


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], extra: int = 1) -> Tensor:
    """pos_embed (1, extra + rows · columns, D) for another grid, as the projects resize ImageNet's 14 × 14: the first
    `extra` rows stay, the grid is interpolated bilinearly between the centres of its cells, edges held, no smoothing.
    """
    kept, grid = positions[:, :extra], positions[0, extra:].reshape(*old, -1)
    rows = torch.stack([_between(grid, index, old[0], new[0]) for index in range(new[0])])
    columns = [_between(rows.transpose(0, 1), index, old[1], new[1]) for index in range(new[1])]
    return torch.cat([kept, torch.stack(columns, dim=1).flatten(0, 1)[None]], dim=1)


def _between(lines: Tensor, index: int, old: int, new: int) -> Tensor:
    """The line at the centre of new cell `index`, from `old` lines along axis 0."""
    place = max((index + 0.5) * old / new - 0.5, 0.0)
    lower = min(int(place), old - 1)
    upper, share = min(lower + 1, old - 1), place - lower
    return lines[lower] * (1 - share) + lines[upper] * share
