"""The ViT originals and the OSKT authors' chains, against what is known of them without the library."""

import json
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.originals import oskt, vits
from tests.originals.oskt import ResNetChain, VitChain, shared_out
from tests.originals.residual import feature_map
from tests.originals.state import State, parameters
from tests.originals.vits import Kind, Vit, as_base, embed, shapes, toy

KINDS: tuple[Kind, ...] = ("transreid", "transreid-ssl", "pass", "oskt", "fast-reid", "timm", "deit-distilled")
WIDTHS = ((2, (2, 4, 8)), (3, (2, 3, 5)), (4, (2, 3, 4)), (8, (2, 4, 8)))


def images(vit: Vit, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *vit.input, generator=torch.Generator().manual_seed(1))


def doubles(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}


def backbone_parameters(vit: Vit) -> int:
    """Without classifiers and necks."""
    named = {name: torch.empty(shape, device="meta") for name, shape in shapes(vit).items()}
    heads = ("base.fc", "head", "classifier", "bottleneck")
    return parameters(named, without=heads)


@pytest.mark.parametrize(
    ("vit", "millions"),
    [
        (Vit("timm", input=(224, 224)), 21.665664),  # timm's and DeiT's 22,050,664 and 86,567,656 without their heads
        (as_base(Vit("timm", input=(224, 224))), 85.798656),
        (Vit("transreid"), 21.639552),
        (as_base(Vit("transreid")), 85.746432),
        (as_base(Vit("fast-reid")), 85.746432),
    ],
)
def test_real_sizes_have_the_published_number_of_parameters(vit: Vit, millions: float) -> None:
    assert backbone_parameters(vit) == round(millions * 1e6)


def test_with_their_heads_the_imagenet_models_have_the_numbers_everybody_quotes() -> None:
    sizes = {Vit("timm", input=(224, 224)): 22_050_664, as_base(Vit("timm", input=(224, 224))): 86_567_656}
    for vit, expected in sizes.items():
        assert sum(torch.Size(shape).numel() for shape in shapes(vit).values()) == expected
    distilled = Vit("deit-distilled", input=(224, 224))  # and one token, one position, one more head
    assert sum(torch.Size(shape).numel() for shape in shapes(distilled).values()) == 22_436_432


@pytest.mark.parametrize(
    ("stride", "input", "tokens"), [(16, (256, 128), 129), (12, (256, 128), 211), (16, (384, 128), 193)]
)
def test_positions_are_as_many_as_overlapping_patches_and_a_class_token(
    stride: int, input: tuple[int, int], tokens: int
) -> None:
    assert shapes(Vit("transreid", stride=stride, input=input))["base.pos_embed"] == (1, tokens, 384)
    assert shapes(Vit("pass", stride=stride, input=input))["base.pos_embed"] == (1, tokens - 1, 384)


def test_the_old_small_vit_is_three_times_as_wide_inside_its_eight_blocks_and_has_no_bias_on_its_queries() -> None:
    found = shapes(vits.old_small("transreid"))
    assert found["base.blocks.7.mlp.fc1.weight"] == (2304, 768)
    assert "base.blocks.8.norm1.weight" not in found
    assert "base.blocks.0.attn.qkv.bias" not in found
    assert vits.old_small("fast-reid").scale == pytest.approx(0.0361, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_the_shapes_it_states_and_the_same_seed_gives_it_again(kind: Kind) -> None:
    vit = toy(kind)
    first, again, other = (vits.checkpoint(vit, seed) for seed in (3, 3, 4))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == shapes(vit)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[f"{vit.prefix}cls_token"], other[f"{vit.prefix}cls_token"])


@pytest.mark.parametrize(
    ("vit", "numbers"),
    [
        *((toy(kind), 24) for kind in ("transreid", "transreid-ssl", "fast-reid", "timm", "deit-distilled")),
        (toy("transreid", stride=6), 24),
        (toy("transreid", jpm=True, input=(48, 24)), 120),
        (toy("transreid-ssl", stem=True), 24),
        (toy("pass"), 48),
        (toy("pass", fusion="mean"), 24),
        (toy("pass", multi_neck=False), 48),
        (toy("oskt"), 48),
    ],
)
def test_an_embedding_is_finite_differs_between_images_and_is_the_same_twice(vit: Vit, numbers: int) -> None:
    state, pixels = vits.checkpoint(vit, 0), images(vit)
    found = embed(vit, state, pixels)
    assert found.shape == (2, numbers)
    assert found.isfinite().all()
    assert (found[0] - found[1]).abs().max() > 0.01
    assert torch.equal(found, embed(vit, state, pixels))
    torch.testing.assert_close(found[:1], embed(vit, state, pixels[:1]))  # no image sees another


def by_torch(vit: Vit, state: State, pixels: Tensor) -> Tensor:
    """The class token behind the last norm, by torch's own layers: an encoder of pre-norm layers."""
    base = {name.removeprefix(vit.prefix): tensor for name, tensor in state.items()}
    patches = functional.conv2d(pixels, base["patch_embed.proj.weight"], base["patch_embed.proj.bias"], vit.stride)
    tokens = [base["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)]
    x = torch.cat(tokens, dim=1) + base["pos_embed"]
    for index in range(vit.depth):
        layer = nn.TransformerEncoderLayer(
            vit.embed_dim,
            vit.heads,
            vit.embed_dim * vit.mlp_ratio,
            0.0,
            "gelu",
            1e-6,
            batch_first=True,
            norm_first=True,
        ).double()
        block = {
            name.removeprefix(f"blocks.{index}."): base[name] for name in base if name.startswith(f"blocks.{index}.")
        }
        layer.load_state_dict(
            {THEIRS[name.rsplit(".", 1)[0]].format(name.rsplit(".", 1)[1]): block[name] for name in block}
        )
        x = layer(x)
    return functional.layer_norm(x, (vit.embed_dim,), base["norm.weight"], base["norm.bias"], 1e-6)[:, 0]


THEIRS = {
    "norm1": "norm1.{}",
    "norm2": "norm2.{}",
    "attn.qkv": "self_attn.in_proj_{}",
    "attn.proj": "self_attn.out_proj.{}",
    "mlp.fc1": "linear1.{}",
    "mlp.fc2": "linear2.{}",
}


@pytest.mark.parametrize("vit", [toy("transreid"), toy("transreid", stride=6), toy("timm", embed_dim=32, heads=4)])
def test_the_forward_pass_agrees_with_torch_s_own_encoder_layers(vit: Vit) -> None:
    state, pixels = doubles(vits.checkpoint(vit, 0)), images(vit).double()
    torch.testing.assert_close(embed(vit, state, pixels), by_torch(vit, state, pixels), rtol=1e-10, atol=1e-10)


def test_the_attention_scale_is_the_stated_one() -> None:
    vit = toy("transreid")
    state, pixels = vits.checkpoint(vit, 0), images(vit)
    same = replace(vit, attention_scale=12**-0.5)
    torch.testing.assert_close(embed(vit, state, pixels), embed(same, state, pixels))
    other = replace(vit, attention_scale=24**-0.5)
    assert not torch.allclose(embed(vit, state, pixels), embed(other, state, pixels), atol=1e-3)


@pytest.mark.parametrize("kind", ["transreid", "transreid-ssl", "pass", "oskt"])
def test_the_embedding_behind_the_neck_is_another(kind: Kind) -> None:
    before, after = toy(kind), toy(kind, neck_feat="after")
    state, pixels = vits.checkpoint(before, 0), images(before)
    feature, necked = embed(before, state, pixels), embed(after, state, pixels)
    torch.testing.assert_close(necked[:, :24], by_neck(state, "bottleneck", feature[:, :24]))
    assert not torch.allclose(feature, necked, atol=0.01)


def test_side_information_can_be_folded_into_the_positions_of_one_camera_and_view() -> None:
    vit, without = toy("transreid", cameras=3, views=2), toy("transreid")
    state, pixels = vits.checkpoint(vit, 0), images(vit)
    assert state["base.sie_embed"].shape == (6, 1, 24)
    folded = dict(state)
    folded["base.pos_embed"] = state["base.pos_embed"] + 3.0 * folded.pop("base.sie_embed")[1 * 2 + 1]
    expected = embed(without, folded, pixels)
    torch.testing.assert_close(embed(vit, state, pixels, camera=1, view=1), expected)
    assert not torch.allclose(embed(vit, state, pixels), expected, atol=0.01)


@pytest.mark.parametrize(("cameras", "views", "rows"), [(6, 0, 6), (0, 8, 8), (20, 8, 160), (1, 1, None), (1, 4, 4)])
def test_side_information_has_a_row_for_every_camera_and_view(cameras: int, views: int, rows: int | None) -> None:
    found = shapes(toy("transreid", cameras=cameras, views=views)).get("base.sie_embed")
    assert found == (None if rows is None else (rows, 1, 24))


@pytest.mark.parametrize("neck_feat", ["before", "after"])
def test_the_global_branch_of_a_jigsaw_model_is_a_plain_vit_with_its_last_block_in_b1(
    neck_feat: Literal["before", "after"],
) -> None:
    vit, plain = (toy("transreid", jpm=jpm, input=(48, 24), neck_feat=neck_feat) for jpm in (True, False))
    state, pixels = vits.checkpoint(vit, 0), images(vit)
    moved = {name: state[name] for name in shapes(plain)}
    moved |= {name.replace("b1.0.", "base.blocks.2."): state[name] for name in state if name.startswith("b1.0.")}
    moved |= {name.replace("b1.1.", "base.norm."): state[name] for name in state if name.startswith("b1.1.")}
    whole, alone = embed(vit, state, pixels), embed(plain, moved, pixels)
    torch.testing.assert_close(whole[:, :24], alone)
    torch.testing.assert_close(embed(vit, state, pixels, branches="global"), alone)
    untouched = embed(plain, {name: state[name] for name in shapes(plain)}, pixels)
    assert not torch.allclose(untouched, alone, atol=0.01)  # the backbone's own last block is not the one in use


def test_jigsaw_patches_are_shifted_by_four_and_interleaved() -> None:
    numbers = torch.arange(8.0).reshape(1, 8, 1)
    assert vits._shuffled(numbers).flatten().tolist() == [4, 0, 5, 1, 6, 2, 7, 3]
    assert vits._shuffled(numbers[:, :7]).flatten().tolist() == [4, 1, 5, 2, 6, 3, 0, 2]


def test_a_patch_reaches_the_global_feature_and_one_quarter_and_quarters_weigh_a_quarter() -> None:
    """Without blocks in front of the branches: patch 5 of eight is in the second quarter of 4 0, 5 1, 6 2, 7 3."""
    vit = toy("transreid", jpm=True, depth=1)
    state, pixels = vits.checkpoint(vit, 0), images(vit)
    other = pixels.clone()
    other[:, :, 16:24, 8:16] += 1
    changed = (embed(vit, state, pixels) != embed(vit, state, other)).reshape(2, 5, 24).any(dim=2)
    assert changed.tolist() == [[True, False, True, False, False]] * 2
    state["b2.1.weight"] = torch.zeros(24)
    quarters = embed(vit, state, pixels)[:, 24:].reshape(2, 4, 24)
    torch.testing.assert_close(quarters, (state["b2.1.bias"] / 4).expand(2, 4, 24))


@pytest.mark.parametrize("neck_feat", ["before", "after"])
def test_pass_fuses_the_class_token_with_the_mean_of_its_parts_each_behind_its_own_neck(
    neck_feat: Literal["before", "after"],
) -> None:
    """Without blocks, a token is its own position away from the norm."""
    vit = toy("pass", depth=0, neck_feat=neck_feat)
    state = vits.checkpoint(vit, 0)
    pairs = [("cls_token", "cls_pos"), *((f"part_token{i}", f"part{i}_pos") for i in (1, 2, 3))]
    norm = (state["base.norm.weight"], state["base.norm.bias"])
    tokens = [
        functional.layer_norm(state[f"base.{token}"][0] + state[f"base.{position}"][0], (24,), *norm, 1e-6)
        for token, position in pairs
    ]
    if neck_feat == "after":
        tokens = [
            by_neck(state, f"bottleneck{suffix}", x) for suffix, x in zip(("", "_1", "_2", "_3"), tokens, strict=True)
        ]
    whole, mean = tokens[0], torch.stack(tokens[1:]).mean(dim=0)
    torch.testing.assert_close(embed(vit, state, images(vit))[:1], torch.cat([whole, mean], dim=1))
    torch.testing.assert_close(embed(replace(vit, fusion="mean"), state, images(vit))[:1], (whole + mean) / 2)


def test_pass_with_a_single_neck_normalises_what_it_has_fused() -> None:
    before, after = (toy("pass", multi_neck=False, neck_feat=side) for side in ("before", "after"))
    state, pixels = vits.checkpoint(before, 0), images(before)
    expected = by_neck(state, "bottleneck", embed(before, state, pixels))
    torch.testing.assert_close(embed(after, state, pixels), expected)


def by_neck(state: State, name: str, feature: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        state[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return functional.batch_norm(feature, mean, variance, weight, bias)


def test_part_tokens_change_what_the_class_token_says() -> None:
    vit = toy("pass")
    state, pixels = vits.checkpoint(vit, 0), images(vit)
    other = state | {"base.part_token2": -state["base.part_token2"]}
    first = embed(vit, state, pixels, branches="global")
    assert first.shape == (2, 24)
    assert not torch.allclose(first, embed(vit, other, pixels, branches="global"), atol=0.01)


def test_the_projection_of_an_oskt_teacher_folds_into_patches_tokens_and_positions() -> None:
    vit = toy("oskt")
    state, pixels = doubles(vits.checkpoint(vit, 0)), images(vit).double()
    projection, folded = state["base.dw.weight"], dict(state)
    for name in (*oskt.TOKENS, "base.patch_embed.proj.bias"):
        folded[name] = state[name] @ projection.T
    folded["base.patch_embed.proj.weight"] = torch.einsum(
        "ij,jchw->ichw", projection, state["base.patch_embed.proj.weight"]
    )
    plain = embed(toy("pass"), folded, pixels)
    torch.testing.assert_close(plain, embed(vit, state, pixels), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(plain, embed(toy("pass"), state, pixels), atol=0.01)


class HalfNorm(nn.Module):
    """IBN by torch's own norms, under the names of the files."""

    def __init__(self) -> None:
        super().__init__()
        self.IN, self.BN = nn.InstanceNorm2d(32, affine=True), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.IN(x[:, :32]), self.BN(x[:, 32:])], dim=1)


def test_a_convolutional_stem_is_torch_s_layers_under_the_same_names() -> None:
    vit = toy("transreid-ssl", stem=True)
    state, pixels = doubles(vits.checkpoint(vit, 0)), images(vit).double()
    first, second, third = (
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        *(nn.Conv2d(64, 64, 3, 1, 1, bias=False) for _ in "ab"),
    )
    stem = nn.Sequential(
        first, HalfNorm(), nn.ReLU(), second, HalfNorm(), nn.ReLU(), third, nn.BatchNorm2d(64), nn.ReLU()
    )
    place = "base.patch_embed.conv."
    stem.double().load_state_dict({name.removeprefix(place): state[name] for name in state if name.startswith(place)})
    expected = stem.eval()(pixels)
    torch.testing.assert_close(vits._stem(state, place.removesuffix("."), pixels), expected, rtol=1e-10, atol=1e-10)
    assert shapes(Vit("transreid-ssl", stem=True))["base.patch_embed.proj.weight"] == (384, 64, 8, 8)


def test_fast_reid_answers_behind_its_neck_and_saves_under_model() -> None:
    before, after = toy("fast-reid"), toy("fast-reid", neck_feat="after")
    state = vits.checkpoint(before, 0)
    assert torch.equal(embed(before, state, images(before)), embed(after, state, images(before)))
    assert list(vits.saved(before, state)) == ["model"]
    assert vits.saved(toy("pass"), state) == state


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (16, 8)), ((14, 14), (21, 10)), ((16, 8), (21, 10)), ((3, 5), (3, 5))]
)
def test_positions_are_resized_as_torch_does_it(old: tuple[int, int], new: tuple[int, int]) -> None:
    positions = torch.randn(1, 1 + old[0] * old[1], 6, generator=torch.Generator().manual_seed(0)).double()
    grid = positions[:, 1:].reshape(1, *old, 6).permute(0, 3, 1, 2)
    expected = functional.interpolate(grid, size=new, mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    found = vits.resized_positions(positions, old, new)
    torch.testing.assert_close(found, torch.cat([positions[:, :1], expected], dim=1), rtol=1e-12, atol=1e-12)


def test_solider_s_names_are_a_swin_s() -> None:
    found = vits.swin_shapes()
    assert found["base.stages.3.blocks.1.attn.w_msa.qkv.weight"] == (2304, 768)
    assert found["base.stages.0.blocks.0.attn.w_msa.relative_position_bias_table"] == (169, 3)
    assert found["base.semantic_embed_w.3.weight"] == (768, 2)
    assert not {name for name in found if "cls_token" in name or "pos_embed" in name}


@pytest.mark.parametrize(
    ("labels", "width", "rows", "parts"),
    [
        ([0, 0, 0, 1], 3, [0, 1, 0], [[0, 1], [3], [2]]),
        ([1, 0, 1, 0, 1, 1], 4, [0, 1, 1, 0], [[1], [0, 2], [4, 5], [3]]),
        ([2, 0, 1, 0], 3, [0, 1, 2], [[1, 3], [2], [0]]),
        ([1, 0, 1], 3, [0, 1, 1], [[1], [0], [2]]),
    ],
)
def test_rows_are_shared_out_as_worked_by_hand(
    labels: list[int], width: int, rows: list[int], parts: list[list[int]]
) -> None:
    found = shared_out(labels, width)
    assert (found.row_of, found.parts) == (rows, parts)


@pytest.mark.parametrize("width", range(5, 21))
def test_every_teacher_channel_lands_in_one_part_of_its_own_cluster(width: int) -> None:
    labels = oskt.random_labels(20, 5, torch.Generator().manual_seed(0))
    found = shared_out(labels, width)
    assert len(found.row_of) == width
    assert sorted(channel for part in found.parts for channel in part) == list(range(20))
    assert all(
        {labels[channel] for channel in part} == {row} for row, part in zip(found.row_of, found.parts, strict=True)
    )


def test_a_resnet_chain_has_few_rows_teacher_columns_and_every_block_twice() -> None:
    state, matcher = oskt.chain_checkpoint(ResNetChain(teacher=8, chain=2), 0)
    assert state["base.GeneChain.conv1.weight"].shape == (2, 3, 7, 7)
    assert state["base.GeneChain.layer2.0.downsample.0.weight"].shape == (16, 32, 1, 1)
    assert state["base.GeneChain.layer4.2.conv2.weight"].shape == (16, 64, 3, 3)
    assert state["base.GeneChain.layer4.2.bn2.weight"].shape == (64,)
    assert state["base.GeneChain.layer4.2.trans_bn3.weight"].shape == (256, 256, 1, 1)
    assert state["base.GeneChain.layer1.0.trans_downsample0.weight"].shape == (32, 8, 1, 1)
    assert state["GeneNet_classifier.weight"].shape == (5, 64)
    assert state["base.layer4.2.Gene_Bottleneck.conv2.weight"] is state["base.GeneChain.layer4.2.conv2.weight"]
    assert matcher["base.layer3.5.conv3"] == matcher["base.layer3.0.downsample"]
    assert set(matcher["base.layer3.5.conv1"]) == set(range(8))
    assert len(matcher) == 1 + 16 * 3 + 4


def test_the_1x1_convolutions_of_a_resnet_chain_say_what_its_labels_say() -> None:
    state, matcher = oskt.chain_checkpoint(ResNetChain(), 0)
    labels = matcher["base.layer2.1.conv1"]
    few = torch.randn(3, 4, 1, 1)
    repeated = functional.conv2d(few, state["base.GeneChain.layer2.1.trans_conv1.weight"])
    assert torch.equal(repeated, few[:, labels])
    torch.testing.assert_close(functional.conv2d(repeated, state["base.GeneChain.layer2.1.trans_bn1.weight"]), repeated)


def test_a_vit_chain_clusters_each_head_alone_and_its_json_is_json() -> None:
    chain = VitChain()
    state, matcher = oskt.chain_checkpoint(chain, 0)
    assert json.loads(json.dumps(matcher)) == matcher
    assert list(matcher) == ["o2g", "g2o", "s1_2_g", "entire_2_g"]
    inner = matcher["o2g"]["blocks.1.attn.q"]
    assert set(inner[:12]) == {0, 1, 2, 3}
    assert set(inner[12:]) == {4, 5, 6, 7}
    assert matcher["o2g"]["blocks.1.attn.qkv"] == [kind * 8 + label for kind in range(3) for label in inner]
    assert matcher["g2o"]["dw_proj_fc2"]["0"] == [
        c for c, label in enumerate(matcher["o2g"]["dw_proj_fc2"]) if label == 0
    ]
    assert state["base.blocks.2.attn.qkv_weight_gene"].shape == (24, 24)
    assert state["base.blocks.2.mlp.fc2_weight_gene"].shape == (8, 96)
    assert state["base.dw_weight_gene"].shape == (8, 24)
    assert state["base.blocks.0.attn.qkv_bias_gene"].shape == (72,)
    assert state["base.norm_gene.weight"].shape == (24,)


def test_published_widths_divide_by_their_heads() -> None:
    published = {VitChain(Vit("oskt", depth=1), 120): 120, VitChain(as_base(Vit("oskt", depth=1)), 264): 264}
    for chain, rows in published.items():
        state, matcher = oskt.chain_checkpoint(chain, 0)
        assert state["base.dw_weight_gene"].shape == (rows, chain.vit.embed_dim)
        assert set(matcher["o2g"]["blocks.0.attn.qkv"]) == set(range(3 * rows))


@pytest.mark.parametrize(
    ("width", "millions"), [((8, (2, 4, 8)), 0.37), ((16, (2, 3, 4)), 0.61), ((16, (2, 4, 8)), 1.48)]
)
def test_students_of_a_resnet_50_have_the_paper_s_numbers_of_parameters(
    width: tuple[int, tuple[int, int, int]], millions: float
) -> None:
    chain = ResNetChain(teacher=64, chain=8)
    found = oskt.student(chain, *oskt.chain_checkpoint(chain, 0), width)
    assert round(parameters(found) / 1e6, 2) == millions


@pytest.mark.parametrize("width", WIDTHS)
def test_a_resnet_student_reads_merged_channels_as_the_chain_reads_repeated_ones(
    width: tuple[int, tuple[int, int, int]],
) -> None:
    """For inputs that are alike inside every part, a student's convolution gives the chain's rows."""
    chain = ResNetChain()
    state, matcher = oskt.chain_checkpoint(chain, 0)
    found = doubles(oskt.student(chain, state, matcher, width))
    stem, (second, _, _) = width
    outputs = shared_out(matcher["base.layer2.0.conv3"], stem * second * 4)
    inputs = shared_out(matcher["base.layer2.0.conv2"], stem * second)
    student_x = torch.randn(1, len(inputs.parts), 3, 3, generator=torch.Generator().manual_seed(0)).double()
    teacher_x = torch.empty(1, 16, 3, 3).double()
    for index, part in enumerate(inputs.parts):
        teacher_x[:, part] = student_x[:, [index]]
    rows = functional.conv2d(teacher_x, state["base.GeneChain.layer2.0.conv3.weight"].double())
    mine = functional.conv2d(student_x, found["base.layer2.0.conv3.weight"])
    torch.testing.assert_close(mine, rows[:, outputs.row_of], rtol=1e-5, atol=1e-5)
    bias = state["base.layer2.0.bn3.bias"].double()
    for index, part in enumerate(outputs.parts):
        torch.testing.assert_close(found["base.layer2.0.bn3.bias"][index], bias[part].mean(), rtol=1e-5, atol=1e-6)


def tied_resnet(chain: ResNetChain) -> tuple[State, oskt.Matcher]:
    """A chain whose teacher has its clusters' rows, and norms and statistics that are alike inside each cluster."""
    state, matcher = oskt.chain_checkpoint(chain, 0)
    for key, labels in matcher.items():
        layer = f"{key}.0" if key.endswith("downsample") else key
        norm = f"{key}.1" if key.endswith("downsample") else key.replace("conv", "bn")
        state[f"{layer}.weight"] = state[f"{layer.replace('base.', 'base.GeneChain.')}.weight"][labels]
        for kind in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{kind}"] = oskt.indicator(labels, averages=True).mv(state[f"{norm}.{kind}"])[labels]
    return doubles(state), matcher


@pytest.mark.parametrize("width", WIDTHS)
def test_students_of_a_tied_resnet_compute_its_function(width: tuple[int, tuple[int, int, int]]) -> None:
    chain = ResNetChain()
    state, matcher = tied_resnet(chain)
    found = oskt.student(chain, state, matcher, width)
    for key, labels in matcher.items():
        norm = f"{key}.1" if key.endswith("downsample") else key.replace("conv", "bn")
        share = shared_out(labels, len(found[f"{norm}.weight"]))
        for kind in ("running_mean", "running_var"):
            found[f"{norm}.{kind}"] = oskt.averaged(state[f"{norm}.{kind}"], share)
    pixels = torch.randn(1, 3, 32, 16, generator=torch.Generator().manual_seed(1)).double()
    teacher, mine = (
        feature_map({name.removeprefix("base."): tensor for name, tensor in weights.items()}, pixels, last_stride=1)
        for weights in (state, found)
    )
    parts = shared_out(matcher["base.layer4.0.downsample"], mine.shape[1]).parts
    torch.testing.assert_close(mine, teacher[:, [part[0] for part in parts]], rtol=1e-8, atol=1e-8)
    assert mine.abs().max() > 0


def even_labels(matcher: oskt.Matcher, heads: int) -> None:
    """Gives every cluster three channels, in place; channels of a head stay in its clusters."""
    generator, labels = torch.Generator().manual_seed(5), matcher["o2g"]

    def shuffled(channels: int, first: int) -> list[int]:
        order = torch.randperm(channels, generator=generator).tolist()
        return [first + channel // 3 for channel in order]

    stream = shuffled(len(labels["dw_proj_fc2"]), 0)
    size, clusters = len(stream) // heads, len(stream) // 3
    for key in labels:
        if key.endswith((".proj", ".fc2")) or key == "dw_proj_fc2":
            labels[key] = stream
        elif key.endswith(".fc1"):
            labels[key] = shuffled(len(labels[key]), 0)
        elif key.endswith(".q"):
            inner = [label for head in range(heads) for label in shuffled(size, head * size // 3)]
            block = key.removesuffix(".q")
            labels |= {f"{block}.{kind}": inner for kind in ("q", "k", "v")}
            labels[f"{block}.qkv"] = [kind * clusters + label for kind in range(3) for label in inner]


def tied_vit(chain: VitChain) -> tuple[State, oskt.Matcher]:
    """As `tied_resnet`, with clusters of three channels each: a mean over channels is then one over clusters."""
    state, matcher = oskt.chain_checkpoint(chain, 0)
    even_labels(matcher, chain.vit.heads)
    labels = matcher["o2g"]
    for key, rows in labels.items():
        layer = "base.dw" if key == "dw_proj_fc2" else f"base.{key}"
        if f"{layer}_weight_gene" in state:
            state[f"{layer}.weight"] = state[f"{layer}_weight_gene"][rows]
    for name in [name for name in state if name.endswith("_bias_gene") or "_gene." in name]:
        rows = labels.get(name.removeprefix("base.").removesuffix("_bias_gene"), labels["dw_proj_fc2"])
        state[name] = oskt.indicator(rows, averages=True).mv(state[name])[rows]
        state[name.replace("_bias_gene", ".bias").replace("_gene.", ".")] = state[name]
    return doubles(state), matcher


def test_a_vit_student_of_a_tied_teacher_computes_its_function_at_the_teacher_s_sums_of_queries() -> None:
    """Averaged queries of s channels each give scores that are s times too small, so the scale is s / √d, not the
    student's own. Everything else is as in its files."""
    chain = VitChain()
    state, matcher = tied_vit(chain)
    found = oskt.student(chain, state, matcher, 8)
    narrow = replace(chain.vit, embed_dim=8, attention_scale=3 * chain.vit.scale)
    pixels = images(chain.vit).double()
    teacher, mine = embed(chain.vit, state, pixels), embed(narrow, found, pixels)
    firsts = torch.tensor([part[0] for part in shared_out(matcher["o2g"]["dw_proj_fc2"], 8).parts])
    torch.testing.assert_close(mine, teacher[:, torch.cat([firsts, 24 + firsts])], rtol=1e-9, atol=1e-9)
    own = embed(replace(narrow, attention_scale=None), found, pixels)
    assert not torch.allclose(own, mine, atol=1e-3)


@pytest.mark.parametrize("width", [8, 10, 16, 24])
def test_a_vit_student_keeps_tokens_and_as_many_channels_in_every_head(width: int) -> None:
    chain = VitChain()
    state, matcher = oskt.chain_checkpoint(chain, 0)
    found = oskt.student(chain, state, matcher, width)
    assert found["base.pos_embed"].shape == (1, 8, 24)
    assert found["base.dw.weight"].shape == (width, 24)
    assert found["base.blocks.1.attn.qkv.weight"].shape == (3 * width, width)
    assert found["base.blocks.1.mlp.fc1.weight"].shape == (4 * width, width)
    assert len(oskt.TOKENS & set(found)) == 9
    half = width // 2
    inner = matcher["o2g"]["blocks.1.attn.q"]
    rows = oskt.shared_out_by_head(inner, width, 2).row_of
    assert set(rows[:half]) == {0, 1, 2, 3}
    assert set(rows[half:]) == {4, 5, 6, 7}
    embedded = embed(replace(chain.vit, embed_dim=width), found, images(chain.vit))
    assert embedded.shape == (2, 2 * width)
    assert embedded.isfinite().all()


def test_at_teacher_width_a_vit_student_is_the_chain_s_rows_by_label() -> None:
    chain = VitChain()
    state, matcher = oskt.chain_checkpoint(chain, 0)
    found = oskt.student(chain, state, matcher, 24)
    share = shared_out(matcher["o2g"]["dw_proj_fc2"], 24)
    order = [part[0] for part in share.parts]
    labels = torch.tensor(matcher["o2g"]["dw_proj_fc2"])
    assert torch.equal(found["base.dw.weight"], state["base.dw_weight_gene"][labels[order]])
    assert torch.equal(found["base.norm.weight"], state["base.norm_gene.weight"][order])


def test_as_coded_differs_in_the_bias_of_the_attention_projection_alone() -> None:
    chain = VitChain()
    state, matcher = oskt.chain_checkpoint(chain, 0)
    paper, coded = (oskt.student(chain, state, matcher, 10, as_coded=flag) for flag in (False, True))
    differing = {name for name in paper if not torch.equal(paper[name], coded[name])}
    assert differing == {f"base.blocks.{index}.attn.proj.bias" for index in range(3)}
