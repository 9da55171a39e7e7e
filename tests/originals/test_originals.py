"""The references themselves: their sizes against the published ones, their layers against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.originals import bot, fastreid, imagenet, layers, msinet, residual, torchreid
from tests.originals.state import State, data_parallel, parameters

TORCHREID_PARAMETERS = {  # its model zoo's counts, to the last one; without the classifier
    "osnet_x1_0": 2_193_616,
    "osnet_x0_75": 1_299_224,
    "osnet_x0_5": 636_520,
    "osnet_x0_25": 203_568,
    "osnet_ibn_x1_0": 2_194_640,
    "osnet_ain_x1_0": 2_193_616,
    "osnet_ain_x0_75": 1_299_224,
    "osnet_ain_x0_5": 636_520,
    "osnet_ain_x0_25": 203_568,
    "mobilenetv2_x1_0": 2_224_960,
    "mobilenetv2_x1_4": 4_291_604,
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet50_ibn_a": 23_508_032,
}
IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
}


def some_images(height: int = 64, width: int = 32) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(5))


def differ(first: Tensor, second: Tensor, by: float = 1e-3) -> bool:
    return bool((first - second).abs().max() > by)


@pytest.mark.parametrize(("name", "published"), TORCHREID_PARAMETERS.items())
def test_torchreid_networks_have_the_published_parameters(name: str, published: int) -> None:
    """Its counter meets the gate of a block once for each of the four streams, and counts it as often."""
    state = torchreid.checkpoint(name)
    gates = sum(tensor.numel() for key, tensor in state.items() if ".gate." in key)
    assert parameters(state, ["classifier"]) + 3 * gates == published


@pytest.mark.parametrize(("name", "published"), IMAGENET_PARAMETERS.items())
def test_imagenet_networks_have_the_published_parameters_with_and_without_ibn(name: str, published: int) -> None:
    assert parameters(imagenet.checkpoint(name)) == published
    assert parameters(imagenet.checkpoint(f"{name}_ibn_a")) == published


def test_msinet_has_the_parameters_that_its_definition_counts_without_classifiers() -> None:
    assert parameters(msinet.checkpoint(), ["classifier", "f_classifier"]) == 2_328_035


@pytest.mark.parametrize("name", torchreid.NAMES)
def test_a_torchreid_network_answers_with_finite_embeddings_that_tell_images_apart(name: str) -> None:
    state = torchreid.checkpoint(name, identities=5)
    embeddings = torchreid.embed(state, some_images())
    assert embeddings.shape == (2, state["classifier.weight"].shape[1])
    assert bool(embeddings.isfinite().all())
    assert differ(embeddings[0], embeddings[1])


def test_a_seed_gives_the_same_weights_again_and_another_seed_others() -> None:
    first, again, other = (torchreid.checkpoint("osnet_x0_25", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.conv.weight"], other["conv1.conv.weight"])


EXACT: list[tuple[Callable[[], State], dict[str, tuple[int, ...]]]] = [
    (lambda: torchreid.checkpoint("osnet_x0_25"), {"conv2.0.conv2a.conv1.weight": (16, 16, 1, 1)}),
    (lambda: torchreid.checkpoint("osnet_x0_25"), {"conv2.2.0.conv.weight": (64, 64, 1, 1), "fc.0.bias": (512,)}),
    (lambda: torchreid.checkpoint("osnet_x0_25"), {"conv3.1.conv2d.3.conv2.weight": (24, 1, 3, 3)}),
    (lambda: torchreid.checkpoint("osnet_x0_25"), {"conv4.0.gate.fc1.weight": (2, 32, 1, 1)}),
    (lambda: torchreid.checkpoint("osnet_ain_x0_25"), {"conv4.0.conv2.3.layers.3.bn.running_var": (32,)}),
    (lambda: torchreid.checkpoint("osnet_ain_x0_25"), {"pool3.0.bn.bias": (96,), "conv3.1.IN.weight": (96,)}),
    (lambda: torchreid.checkpoint("mobilenetv2_x1_0"), {"conv2.0.conv1.conv.weight": (32, 32, 1, 1)}),
    (lambda: torchreid.checkpoint("mobilenetv2_x1_4"), {"conv5.3.dwconv2.conv.weight": (534, 1, 3, 3)}),
    (lambda: torchreid.checkpoint("resnet50_fc512"), {"fc.0.weight": (512, 2048), "fc.1.running_mean": (512,)}),
    (lambda: imagenet.checkpoint("resnet50_ibn_a"), {"layer3.5.bn1.IN.weight": (128,), "layer4.0.bn1.weight": (512,)}),
    (lambda: bot.checkpoint("resnet50_ibn_a"), {"base.fc.weight": (1000, 2048), "bottleneck.bias": (2048,)}),
    (lambda: fastreid.checkpoint(non_local=True), {"backbone.NL_3.2.theta.weight": (512, 1024, 1, 1)}),
    (lambda: fastreid.checkpoint(non_local=True, non_local_inner=1), {"backbone.NL_2.0.W.0.weight": (512, 1, 1, 1)}),
    (lambda: fastreid.checkpoint("18x", gem=True), {"heads.pool_layer.p": (1,), "heads.bottleneck.0.bias": (512,)}),
    (lambda: fastreid.checkpoint("18x", pixels=True), {"pixel_mean": (1, 3, 1, 1), "heads.weight": (751, 512)}),
    (lambda: fastreid.checkpoint("18x", reduced_to=256), {"heads.bottleneck.0.weight": (256, 512, 1, 1)}),
    (lambda: fastreid.checkpoint("18x", se=True), {"backbone.layer1.0.se.fc.0.weight": (4, 64)}),
    (msinet.checkpoint, {"cells.3._op2.gamma": (1,), "cells.7.conv3b.2.conv2.weight": (128, 1, 3, 3)}),
]


@pytest.mark.parametrize(("make", "names"), EXACT)
def test_names_and_shapes_are_those_of_the_public_definitions(
    make: Callable[[], State], names: dict[str, tuple[int, ...]]
) -> None:
    state = make()
    assert {name: tuple(state[name].shape) for name in names} == names


def test_instance_norms_come_without_statistics_and_inside_ain_residuals_without_batch_norm() -> None:
    state = torchreid.checkpoint("osnet_ain_x1_0")
    assert "conv1.bn.running_mean" not in state
    normalised = {name.removesuffix(".IN.weight") for name in state if name.endswith(".IN.weight")}
    assert normalised == {"conv2.0", "conv2.1", "conv3.1", "conv4.0"}
    assert not any(f"{block}.conv3.bn.weight" in state for block in normalised)
    assert "conv3.0.conv3.bn.weight" in state


def test_batch_norm_is_torchs_in_eval_mode() -> None:
    module, x = nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(4) + 0.5 + len(name) / 100)
        torch.testing.assert_close(layers.batch_norm(_named("n", module), "n", x), module(x))


def test_instance_norm_is_torchs_in_eval_mode() -> None:
    module, x = nn.InstanceNorm2d(4, affine=True).eval(), 3 * torch.randn(2, 4, 3, 5) + 1
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    with torch.no_grad():
        torch.testing.assert_close(layers.instance_norm(_named("n", module), "n", x), module(x))


def _named(name: str, module: nn.Module) -> State:
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}


def test_the_split_norm_takes_the_first_half_per_image_and_the_second_from_statistics() -> None:
    state = {
        name: tensor for name, tensor in imagenet.checkpoint("resnet18_ibn_a", stem=8).items() if "layer1.0" in name
    }
    x = torch.randn(2, 8, 4, 4)
    split = layers.half_instance_norm(state, "layer1.0.bn1", x)
    brighter = layers.half_instance_norm(state, "layer1.0.bn1", x + 3)
    torch.testing.assert_close(split[:, :4], brighter[:, :4], atol=1e-4, rtol=1e-4)
    assert differ(split[:, 4:], brighter[:, 4:], by=1)


def test_the_gate_of_a_block_is_one_for_its_four_streams() -> None:
    state = torchreid.checkpoint("osnet_x0_25")
    assert len([name for name in state if name.startswith("conv2.0.gate.")]) == 4


def test_the_osnet_embedding_is_after_a_relu_and_a_resnets_without_fc_is_the_pooled_feature() -> None:
    osnet = torchreid.embed(torchreid.checkpoint("osnet_x0_25"), some_images())
    assert float(osnet.min()) == 0 < float(osnet.max())
    state = torchreid.checkpoint("resnet18", stem=16)
    feature_map = residual.feature_map(state, some_images(), last_stride=2)
    assert feature_map.shape == (2, 128, 2, 1)
    torch.testing.assert_close(torchreid.embed(state, some_images()), feature_map.mean(dim=(2, 3)))


def test_only_the_resnet_with_fc512_has_last_stride_one() -> None:
    state = torchreid.checkpoint("resnet50_fc512", stem=16)
    pooled = layers.average(residual.feature_map(state, some_images(), last_stride=1))
    reduced = layers.batch_norm(state, "fc.1", functional.linear(pooled, state["fc.0.weight"], state["fc.0.bias"]))
    torch.testing.assert_close(torchreid.embed(state, some_images()), reduced.relu())


def test_without_pixels_in_the_file_fastreid_takes_imagenets() -> None:
    state = fastreid.checkpoint("18x", stem=16, pixels=True)
    without = {name: tensor for name, tensor in state.items() if not name.startswith("pixel_")}
    images = 255 * some_images()
    assert torch.equal(fastreid.embed(state, images), fastreid.embed(without, images))


def test_the_three_generations_of_fastreids_head_are_one_network_under_other_names() -> None:
    newest = fastreid.checkpoint("18x", stem=16)
    between = _renamed(newest, {"heads.weight": "heads.classifier.weight"})
    oldest = _renamed(between, {"heads.bottleneck.0.": "heads.bnneck."})
    assert between.keys() == fastreid.checkpoint("18x", stem=16, head="classifier").keys()
    assert oldest.keys() == fastreid.checkpoint("18x", stem=16, head="bnneck").keys()
    images = 255 * some_images()
    for older in (between, oldest):
        assert torch.equal(fastreid.embed(older, images), fastreid.embed(newest, images))


def _renamed(state: State, beginnings: dict[str, str]) -> State:
    old, new = next(iter(beginnings.items()))
    return {new + name.removeprefix(old) if name.startswith(old) else name: state[name] for name in state}


def test_the_oldest_head_has_no_reference_with_a_reduction() -> None:
    with pytest.raises(ValueError, match="reduction to 64"):
        fastreid.checkpoint("18x", stem=16, head="bnneck", reduced_to=64)


def test_fastreids_pooling_windows_start_one_row_later_than_torchvisions() -> None:
    """For even maps: padding at the end instead of at the beginning."""
    x = torch.randn(1, 2, 8, 6)
    padded_at_the_end = functional.pad(x, (0, 1, 0, 1), value=-torch.inf)
    torch.testing.assert_close(
        functional.max_pool2d(x, 3, 2, ceil_mode=True), functional.max_pool2d(padded_at_the_end, 3, 2)
    )
    state = fastreid.checkpoint("18x", stem=16)
    images = 255 * some_images()
    assert differ(fastreid.embed(state, images), fastreid.embed(state, images, padded_pool=True), by=0.01)


def test_generalised_mean_pooling_with_power_one_is_the_average() -> None:
    state = fastreid.checkpoint("18x", stem=16, gem=True)
    images = 255 * some_images()
    learned = fastreid.embed(state, images)
    linear = fastreid.embed(state | {"heads.pool_layer.p": torch.ones(1)}, images)
    plain = {name: tensor for name, tensor in state.items() if name != "heads.pool_layer.p"}
    torch.testing.assert_close(linear, fastreid.embed(plain, images), atol=1e-4, rtol=1e-4)
    assert differ(learned, linear, by=0.1)


def test_non_local_blocks_change_the_embedding_unless_their_last_norm_is_zero() -> None:
    state = fastreid.checkpoint("50x", stem=16, non_local=True)
    zeros = {name: torch.zeros_like(state[name]) for name in state if name.endswith((".W.1.weight", ".W.1.bias"))}
    without = {name: tensor for name, tensor in state.items() if ".NL_" not in name}
    images = 255 * some_images()
    assert torch.equal(fastreid.embed(state | zeros, images), fastreid.embed(without, images))
    no_theta = {name: torch.zeros_like(state[name]) for name in state if ".theta." in name}
    assert differ(fastreid.embed(state, images), fastreid.embed(state | no_theta, images))


def test_squeeze_and_excitation_changes_the_embedding() -> None:
    state = fastreid.checkpoint("18x", stem=16, se=True)
    without = {name: tensor for name, tensor in state.items() if ".se." not in name}
    images = 255 * some_images()
    assert differ(fastreid.embed(state, images), fastreid.embed(without, images), by=0.1)


@pytest.mark.parametrize(("name", "has_relu"), [("resnet50", False), ("resnet50_ibn_a", True)])
def test_the_stem_of_bot_lacks_its_relu_but_in_the_ibn_network(name: str, has_relu: bool) -> None:
    state = bot.checkpoint(name, neck="no", stem=16, identities=5)
    base = {key.removeprefix("base."): tensor for key, tensor in state.items() if key.startswith("base.")}
    expected, other = (
        layers.average(residual.feature_map(base, some_images(), last_stride=1, stem_relu=relu))
        for relu in (has_relu, not has_relu)
    )
    torch.testing.assert_close(bot.embed(state, some_images()), expected)
    assert differ(bot.embed(state, some_images()), other, by=0.01)


def test_bots_neck_normalises_the_pooled_feature_and_its_bias_is_zero() -> None:
    state = bot.checkpoint("resnet18", stem=16)
    assert not state["bottleneck.bias"].any()
    without = {name: tensor for name, tensor in state.items() if not name.startswith("bottleneck.")}
    neck = layers.batch_norm(state, "bottleneck", bot.embed(without, some_images()))
    torch.testing.assert_close(bot.embed(state, some_images()), neck)


def test_imagenet_logits_read_the_pooled_feature() -> None:
    state = imagenet.checkpoint("resnet18", stem=16, classes=10)
    feature = imagenet.embed(state, some_images())
    logits = functional.linear(feature, state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(imagenet.classify(state, some_images()), logits)


TOY = (16, 64, 64, 64)


def test_msinet_answers_with_a_global_and_two_half_image_parts() -> None:
    state, images = msinet.checkpoint(channels=TOY, identities=5), some_images()
    embedding = msinet.embed(state, images)
    assert embedding.shape == (2, 64 + 128 + 128)
    lower_changed = images.clone()
    lower_changed[:, :, -4:] = 0
    changed = (msinet.embed(state, lower_changed) - embedding).abs().mean(dim=0)
    assert float(changed[192:].mean()) > float(changed[64:192].mean())


def test_cross_attention_with_gamma_zero_is_no_interaction() -> None:
    genotype = tuple(("none" if a == "cross_att" else a, "none" if b == "cross_att" else b) for a, b in msinet.MSMT)
    state, images = msinet.checkpoint(channels=TOY, identities=5), some_images()
    still = state | {name: torch.zeros(1) for name in state if name.endswith(".gamma")}
    assert torch.equal(msinet.embed(still, images), msinet.embed(still, images, genotype=genotype))
    assert differ(msinet.embed(state, images), msinet.embed(still, images))


def test_msinets_embedding_elsewhere_is_after_its_necks() -> None:
    state, images = msinet.checkpoint(channels=TOY, identities=5), some_images()
    feature = msinet.embed(state, images)[:, :64]
    neck = layers.batch_norm(state, "head", functional.linear(feature, state["fc.weight"]))
    torch.testing.assert_close(msinet.embed_elsewhere(state, images)[:, :64], neck)


def test_training_files_hold_the_weights_beside_other_things() -> None:
    state = torchreid.checkpoint("osnet_x0_25")
    assert torchreid.training_file(data_parallel(state))["state_dict"].keys() == {f"module.{name}" for name in state}
    assert fastreid.training_file(state)["model"] is state
