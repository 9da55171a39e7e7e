"""The OSKT authors' refined weight chains (kiddo127/OSKT, Apache-2.0): their files, and the students they stand for.

Written from the public repository's names and structure and from Li, Qi, Geng, "One-Shot Knowledge Transfer for
Scalable Person Re-Identification", ICCV 2025. A chain is two files in one folder: a state dict (`resnet50_100.pth`,
`transformer_120.pth`) and `gene_matcher.json`. Below, N is a teacher's and n the chain's number of channels.

ResNet-50. The state dict holds the teacher (`base.…`), and under `base.GeneChain.` the same layers with few rows and
teacher columns: conv weights (n_out, N_in, k, k), batch norms at teacher resolution (copies of the teacher's: students
take the teacher's own), and 1 × 1 convolutions `trans_…` that repeat and average, which the labels say as well. The
blocks are there twice: `base.layer1.0.Gene_Bottleneck.…` is `base.GeneChain.layer1.0.…`. The JSON maps `base.conv1`,
`base.layer1.0.conv1` … `.conv3`, `base.layer1.0.downsample` to one label per teacher row; a stage's conv3 and
downsample share theirs.

ViT. The teacher is PASS with one more projection `dw` behind tokens and positions. The chain's tensors end in
`_weight_gene` (few rows, teacher columns), `_bias_gene`, `norm…_gene.weight` (teacher resolution). The JSON has `o2g`
(one label per teacher row), `g2o` (its inverse; keys are strings) and two objects that are empty when it is written.
Labels of queries, keys and values are alike, and head h uses h n / heads … (h + 1) n / heads - 1.

Everything else in the files is left over from training: the narrowest student's own copies and necks, adders,
averagers. It is here so that an importer meets it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.originals import vits
from tests.originals.residual import Build
from tests.originals.residual import shapes as resnet_shapes
from tests.originals.state import Shapes, State, batch_norm, linear, random_state, under
from tests.originals.vits import Vit, random_tensor

Labels = list[int]
Matcher = dict[str, Any]  # the JSON as parsed
BLOCKS = (3, 4, 6, 3)
EXPANSION = 4
TOKENS = frozenset(
    f"base.{name}"
    for name in (
        "pos_embed",
        "cls_token",
        "cls_pos",
        *(f"part_token{i}" for i in (1, 2, 3)),
        *(f"part{i}_pos" for i in (1, 2, 3)),
    )
)
NARROWEST, ENTIRE = "s1", "entire"  # what the ViT's files call the chain's own student and the teacher


@dataclass(frozen=True)
class ResNetChain:
    """A chain of a ResNet-50, stages 1, 2, 4 and 8 times the stem. teacher, chain: channels of the stem (64 and 8, 16
    or 32 as published)."""

    teacher: int = 8
    chain: int = 2
    identities: int = 5


@dataclass(frozen=True)
class VitChain:
    """A chain of a ViT. vit: the teacher, kind `oskt`; chain: embedding width (120 of 384, 264 of 768 as published)."""

    vit: Vit = field(default_factory=lambda: vits.toy("oskt"))
    chain: int = 8


def chain_checkpoint(chain: ResNetChain | VitChain, seed: int) -> tuple[State, Matcher]:
    """State dict and gene matcher, with clusters of uneven size and chain rows that are no exact means."""
    return _resnet_checkpoint(chain, seed) if isinstance(chain, ResNetChain) else _vit_checkpoint(chain, seed)


def student(
    chain: ResNetChain | VitChain,
    state: State,
    matcher: Matcher,
    width: tuple[int, tuple[int, int, int]] | int,
    *,
    as_coded: bool = False,
) -> State:
    """Weights and norms of the student, under the names of its own checkpoint: stem and multipliers for a ResNet, the
    embedding width for a ViT. Channel order is the authors'. No statistics, no neck: they train those afterwards.

    as_coded: the authors average the bias of a ViT's attention projection from the teacher's, not from the chain's as
    all others (and as the paper says)."""
    if isinstance(chain, ResNetChain):
        assert isinstance(width, tuple)
        return _resnet_student(state, matcher, *width)
    assert isinstance(width, int)
    return _vit_student(chain, state, matcher, width, as_coded=as_coded)


@dataclass(frozen=True)
class Shares:
    """row_of: student channel -> label. parts: student channel -> the teacher channels it stands for, ascending."""

    row_of: Labels
    parts: list[list[int]]


def shared_out(labels: Sequence[int], width: int) -> Shares:
    """The authors' `select_elements`: one student channel per label, in label order; then again and again one more for
    the label with the smallest (student channels / teacher channels), the lowest of equals, appended at the end. A
    label's teacher channels, ascending, are split over its student channels, the first ones one longer where uneven.

    Labels 0 0 0 1 and 3 channels: rows 0 1 0, parts [0 1] [3] [2]."""
    members_of, names = Counter(labels), sorted(set(labels))
    row_of, given = list(names), dict.fromkeys(names, 1)
    while len(row_of) < width:
        chosen = min(names, key=lambda name: given[name] / members_of[name])
        row_of.append(chosen)
        given[chosen] += 1
    parts: list[list[int]] = [[] for _ in row_of]
    for name in names:
        members = [channel for channel, label in enumerate(labels) if label == name]
        places = [channel for channel, label in enumerate(row_of) if label == name]
        small, longer = divmod(len(members), len(places))
        for index, place in enumerate(places):
            length = small + 1 if index < longer else small
            parts[place], members = members[:length], members[length:]
    return Shares(row_of, parts)


def shared_out_by_head(labels: Sequence[int], width: int, heads: int) -> Shares:
    """Each head on its own, with width / heads channels, one head after the other."""
    size, row_of, parts = len(labels) // heads, [], []
    for head in range(heads):
        share = shared_out(labels[head * size : (head + 1) * size], width // heads)
        row_of += share.row_of
        parts += [[head * size + channel for channel in part] for part in share.parts]
    return Shares(row_of, parts)


def three_times(share: Shares, labels: int, channels: int) -> Shares:
    """Queries, keys and values, of `labels` labels and `channels` teacher channels each."""
    rows = [kind * labels + row for kind in range(3) for row in share.row_of]
    parts = [[kind * channels + channel for channel in part] for kind in range(3) for part in share.parts]
    return Shares(rows, parts)


def expanded(chain_weight: Tensor, rows: Shares, columns: Shares | None) -> Tensor:
    """W[i, k] = Σ C[row_of(i), j] over the teacher columns j that student column k stands for. C: (n, N_in, …)."""
    repeated = torch.stack([chain_weight[row] for row in rows.row_of])
    if columns is None:
        return repeated
    return torch.stack([sum_of([repeated[:, j] for j in part]) for part in columns.parts], dim=1)


def averaged(vector: Tensor, rows: Shares) -> Tensor:
    """v'[i] = mean of v[j] over the teacher channels j that student channel i stands for."""
    return torch.stack([sum_of([vector[j] for j in part]) / len(part) for part in rows.parts])


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Left to right."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _resnet_student(state: State, matcher: Matcher, stem: int, multipliers: tuple[int, int, int]) -> State:
    inputs = shared_out(matcher["base.conv1"], stem)
    found = _normed(state, "base.conv1", "base.bn1", inputs, None)
    for stage, inner in enumerate((stem, *(stem * factor for factor in multipliers)), start=1):
        for index in range(BLOCKS[stage - 1]):
            block = f"base.layer{stage}.{index}"
            first, second = (shared_out(matcher[f"{block}.conv{i}"], inner) for i in (1, 2))
            outputs = shared_out(matcher[f"{block}.conv3"], inner * EXPANSION)
            found |= _normed(state, f"{block}.conv1", f"{block}.bn1", first, inputs)
            found |= _normed(state, f"{block}.conv2", f"{block}.bn2", second, first)
            found |= _normed(state, f"{block}.conv3", f"{block}.bn3", outputs, second)
            if index == 0:
                shortcut = shared_out(matcher[f"{block}.downsample"], inner * EXPANSION)
                found |= _normed(state, f"{block}.downsample.0", f"{block}.downsample.1", shortcut, inputs)
            inputs = outputs
    return found


def _normed(state: State, layer: str, norm: str, rows: Shares, columns: Shares | None) -> State:
    """A convolution from the chain, and its norm from the teacher, which is the chain's as well."""
    weight = state[f"{layer.replace('base.', 'base.GeneChain.')}.weight"]
    vectors = {f"{norm}.{kind}": averaged(state[f"{norm}.{kind}"], rows) for kind in ("weight", "bias")}
    return {f"{layer}.weight": expanded(weight, rows, columns), **vectors}


def _vit_student(chain: VitChain, state: State, matcher: Matcher, width: int, *, as_coded: bool) -> State:
    labels, dim = matcher["o2g"], chain.vit.embed_dim
    stream = shared_out(labels["dw_proj_fc2"], width)
    found = {name: state[name] for name in state if name.startswith("base.patch_embed.") or name in TOKENS}
    found["base.dw.weight"] = expanded(state["base.dw_weight_gene"], stream, None)
    for index in range(chain.vit.depth):
        block = f"base.blocks.{index}"
        inner = shared_out_by_head(labels[f"blocks.{index}.attn.q"], width, chain.vit.heads)
        hidden = shared_out(labels[f"blocks.{index}.mlp.fc1"], width * chain.vit.mlp_ratio)
        triple = three_times(inner, chain.chain, dim)
        found |= _from_genes(state, f"{block}.attn.qkv", triple, stream)
        found |= _from_genes(state, f"{block}.attn.proj", stream, inner)
        found |= _from_genes(state, f"{block}.mlp.fc1", hidden, stream)
        found |= _from_genes(state, f"{block}.mlp.fc2", stream, hidden)
        found |= _norm_from_genes(state, f"{block}.norm1", stream) | _norm_from_genes(state, f"{block}.norm2", stream)
        if as_coded:
            found[f"{block}.attn.proj.bias"] = averaged(state[f"{block}.attn.proj.bias"], stream)
    return found | _norm_from_genes(state, "base.norm", stream)


def _from_genes(state: State, layer: str, rows: Shares, columns: Shares) -> State:
    weight, bias = state[f"{layer}_weight_gene"], state[f"{layer}_bias_gene"]
    return {f"{layer}.weight": expanded(weight, rows, columns), f"{layer}.bias": averaged(bias, rows)}


def _norm_from_genes(state: State, norm: str, rows: Shares) -> State:
    return {f"{norm}.{kind}": averaged(state[f"{norm}_gene.{kind}"], rows) for kind in ("weight", "bias")}


def random_labels(channels: int, clusters: int, generator: torch.Generator) -> Labels:
    """One of `clusters` labels per channel, every label at least once, in no order."""
    extra = torch.randint(clusters, (channels - clusters,), generator=generator)
    labels = torch.cat([torch.arange(clusters), extra])
    found: Labels = labels[torch.randperm(channels, generator=generator)].tolist()
    return found


def indicator(labels: Sequence[int], *, averages: bool = False) -> Tensor:
    """(n, N): 1 where the channel has the label; with `averages`, every row sums to 1."""
    found = torch.zeros(max(labels) + 1, len(labels))
    found[list(labels), range(len(labels))] = 1
    return found / found.sum(dim=1, keepdim=True) if averages else found


def _resnet_checkpoint(chain: ResNetChain, seed: int) -> tuple[State, Matcher]:
    generator = torch.Generator().manual_seed(seed)
    matcher = _resnet_matcher(chain, generator)
    backbone = under("base.", resnet_shapes(Build("resnet50", chain.teacher)))
    state = random_state(backbone | _resnet_head("", chain.teacher, chain.identities), seed)
    genes: State = {}
    for name in backbone:
        gene = name.replace("base.", "base.GeneChain.")
        if state[name].ndim == 4:
            labels = matcher[name.removesuffix(".weight").removesuffix(".0")]
            genes[gene] = random_tensor(name, (max(labels) + 1, *state[name].shape[1:]), generator)
            state[name] = genes[gene][labels] + 0.1 * state[name]  # refining pulls them together, not onto each other
        else:
            genes[gene] = state[name] + (0.01 if state[name].is_floating_point() else 0)  # copied before the last step
    genes |= _repeaters(matcher)
    again = {_inside_its_block(name): tensor for name, tensor in genes.items() if ".layer" in name}
    head = random_state(_resnet_head("GeneNet_", chain.chain, chain.identities), seed + 1)
    return state | genes | again | head, matcher


def _resnet_matcher(chain: ResNetChain, generator: torch.Generator) -> Matcher:
    matcher: Matcher = {"base.conv1": random_labels(chain.teacher, chain.chain, generator)}
    for stage, blocks in enumerate(BLOCKS):
        sizes = [chain.teacher * 2**stage, chain.chain * 2**stage]
        outputs = random_labels(sizes[0] * EXPANSION, sizes[1] * EXPANSION, generator)
        for index in range(blocks):
            block = f"base.layer{stage + 1}.{index}"
            matcher |= {f"{block}.conv{i}": random_labels(sizes[0], sizes[1], generator) for i in (1, 2)}
            matcher |= {f"{block}.conv3": outputs} | ({} if index else {f"{block}.downsample": outputs})
    return matcher


def _resnet_head(prefix: str, stem: int, identities: int) -> Shapes:
    size = stem * 8 * EXPANSION
    return batch_norm(f"{prefix}bottleneck", size) | linear(f"{prefix}classifier", identities, size, bias=False)


def _repeaters(matcher: Matcher) -> State:
    """The 1 × 1 convolutions behind each layer: n channels to N, then the average over each cluster."""
    found = {}
    for key, labels in matcher.items():
        place, layer = key.replace("base", "base.GeneChain", 1).rsplit(".", 1)
        names = (f"{layer}0", f"{layer}1") if layer == "downsample" else (layer, layer.replace("conv", "bn"))
        repeat = indicator(labels).T
        average = repeat @ indicator(labels, averages=True)
        for name, matrix in zip(names, (repeat, average), strict=True):
            found[f"{place}.trans_{name}.weight"] = matrix[:, :, None, None]
    return found


def _inside_its_block(name: str) -> str:
    """base.GeneChain.layer1.0.conv1.weight -> base.layer1.0.Gene_Bottleneck.conv1.weight: a module known twice."""
    base, _, layer, index, rest = name.split(".", 4)
    return f"{base}.{layer}.{index}.Gene_Bottleneck.{rest}"


def _vit_checkpoint(chain: VitChain, seed: int) -> tuple[State, Matcher]:
    generator = torch.Generator().manual_seed(seed)
    matcher = _vit_matcher(chain, generator)
    labels, state, genes = matcher["o2g"], vits.checkpoint(chain.vit, seed), {}
    for name in _refined(chain.vit):
        place, kind = name.rsplit(".", 1)
        if state[name].ndim == 2:
            rows = labels[_matcher_key(place)]
            gene = random_tensor("weight", (max(rows) + 1, state[name].shape[1]), generator)
            state[name] = gene[rows] + 0.1 * state[name]
            genes[f"{place}_weight_gene"] = gene
        else:
            near = state[name] + 0.05 * torch.randn(state[name].shape, generator=generator)
            genes[f"{place}_gene.{kind}" if "norm" in place else f"{place}_{kind}_gene"] = near
    left_over = {name: random_tensor(name, shape, generator) for name, shape in _vit_left_over(chain).items()}
    return state | genes | left_over | _adders(chain, labels, generator), matcher


def _refined(vit: Vit) -> list[str]:
    """The teacher's tensors that the chain has its own of: all from `dw` on."""
    layers = ("base.blocks.", "base.norm.", "base.dw.")
    return [name for name in vits.shapes(vit) if name.startswith(layers)]


def _matcher_key(place: str) -> str:
    key = place.removeprefix("base.")
    return "dw_proj_fc2" if key == "dw" else key


def _vit_matcher(chain: VitChain, generator: torch.Generator) -> Matcher:
    vit, n = chain.vit, chain.chain
    stream = random_labels(vit.embed_dim, n, generator)
    labels: dict[str, Labels] = {"dw_proj_fc2": stream}
    for index in range(vit.depth):
        block, per_head = f"blocks.{index}", n // vit.heads
        heads = [random_labels(vit.embed_dim // vit.heads, per_head, generator) for _ in range(vit.heads)]
        inner = [head * per_head + label for head, found in enumerate(heads) for label in found]
        triple = [kind * n + label for kind in range(3) for label in inner]
        labels |= {f"{block}.attn.{kind}": inner for kind in ("q", "k", "v")}
        labels |= {f"{block}.attn.qkv": triple, f"{block}.attn.proj": stream}
        labels[f"{block}.mlp.fc1"] = random_labels(vit.embed_dim * vit.mlp_ratio, n * vit.mlp_ratio, generator)
        labels[f"{block}.mlp.fc2"] = stream
    inverse = {key: _members(found) for key, found in labels.items() if not key.endswith((".q", ".k", ".v"))}
    return {"o2g": labels, "g2o": inverse, f"{NARROWEST}_2_g": {}, f"{ENTIRE}_2_g": {}}


def _members(labels: Labels) -> Mapping[str, list[int]]:
    """Label -> its channels; a number as a key becomes a string in JSON."""
    return {
        str(name): [channel for channel, label in enumerate(labels) if label == name] for name in range(max(labels) + 1)
    }


def _vit_left_over(chain: VitChain) -> Shapes:
    """The two networks that training copies weights into, with their necks and classifiers."""
    vit, found = chain.vit, Shapes()
    for end, size in ((NARROWEST, chain.chain), (ENTIRE, vit.embed_dim)):
        found |= linear(f"base.dws.{end}", size, vit.embed_dim, bias=False) | _vectors(f"base.norms.{end}", size)
        for index in range(vit.depth):
            block, hidden = f"base.blocks.{index}", size * vit.mlp_ratio
            found |= _vectors(f"{block}.norm1s.{end}", size) | _vectors(f"{block}.norm2s.{end}", size)
            found |= linear(f"{block}.attn.qkvs.{end}", 3 * size, size) | linear(
                f"{block}.attn.projs.{end}", size, size
            )
            found |= linear(f"{block}.mlp.fc1s.{end}", hidden, size) | linear(f"{block}.mlp.fc2s.{end}", size, hidden)
        for suffix in ("", "_1", "_2", "_3"):
            found |= batch_norm(f"bottleneck{suffix}s.{end}", size)
        found |= linear(f"classifiers.{end}", vit.identities, 2 * size, bias=False)
    return found


def _vectors(place: str, size: int) -> Shapes:
    return {f"{place}.weight": (size,), f"{place}.bias": (size,)}


def _adders(chain: VitChain, labels: Mapping[str, Labels], generator: torch.Generator) -> State:
    """Matrices that add columns and average vectors for the narrowest student. Those inside a block are layers with a
    bias: a random one, which training adds to that student's weights and expansion does not know."""
    stream = labels["dw_proj_fc2"]
    shared = {"base.colAdders": indicator(stream), "base.rowAveragers": indicator(stream, averages=True)}
    biased = {}
    for index in range(chain.vit.depth):
        block = f"base.blocks.{index}"
        attention, mlp = f"{block}.attn", f"{block}.mlp"
        shared |= {f"{place}_colAdders": indicator(stream) for place in (f"{attention}.qkv", f"{mlp}.fc1")}
        averagers = (f"{block}.rowAveragers", f"{attention}.proj_rowAveragers", f"{mlp}.fc2_rowAveragers")
        shared |= dict.fromkeys(averagers, indicator(stream, averages=True))
        inner, hidden = labels[f"blocks.{index}.attn.qkv"], labels[f"blocks.{index}.mlp.fc1"]
        biased[f"{attention}.proj_colAdders"] = indicator(labels[f"blocks.{index}.attn.v"])
        biased[f"{attention}.qkv_rowAveragers"] = indicator(inner, averages=True)
        biased[f"{mlp}.fc2_colAdders"] = indicator(hidden)
        biased[f"{mlp}.fc1_rowAveragers"] = indicator(hidden, averages=True)
    found = {f"{place}.{NARROWEST}.weight": matrix for place, matrix in (shared | biased).items()}
    for place, matrix in biased.items():
        found[f"{place}.{NARROWEST}.bias"] = 0.2 * torch.randn(len(matrix), generator=generator)
    return found
