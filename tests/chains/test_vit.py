"""ViTs: their names, their sizes, and that they compute what the projects' own do."""

from collections.abc import Mapping
from math import prod

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from chains.arch import Architecture
from chains.architectures import architecture, architecture_names
from chains.architectures.vit import SIZES, VITS, Settings, with_projection
from chains.artifact import StoredChain
from chains.chain import Chain, InputSpec, Mode
from chains.cut import Partition
from chains.errors import ArchitectureError, ChainMismatch, WidthError
from chains.expand import expand
from chains.model import ReIDModel, load_student, module_name
from chains.onnxfile import write
from chains.oskt import cluster
from chains.testing import pico_chain, random_tensors, unclustered_chain
from chains.tree import grow_trees
from chains.width import Width
from tests.originals import oskt, vits
from tests.originals.oskt import Shares
from tests.originals.state import State
from tests.originals.vits import Vit

HALF = (0.5, 0.5, 0.5)
LETTERS = ("q", "k", "v")


# --- names


@pytest.mark.parametrize(
    ("name", "image", "stride", "tokens"),
    [
        ("vit_tiny", (64, 32), 8, 1 + 8 * 4),
        ("vit_small", (256, 128), 16, 1 + 16 * 8),
        ("vit_base_s12", (256, 128), 12, 1 + 21 * 10),
        ("vit_small_pass", (256, 128), 16, 4 + 16 * 8),
        ("vit_small@384x128", (384, 128), 16, 1 + 24 * 8),
        ("vit_base_s12_pass_dw@224x224", (224, 224), 12, 4 + 18 * 18),
        ("vit_tiny@20x9", (20, 9), 8, 1 + 2 * 1),
    ],
)
def test_a_name_says_all_of_a_network(name: str, image: tuple[int, int], stride: int, tokens: int) -> None:
    settings = Settings.parse(name)
    assert (settings.image, settings.stride, settings.token_count) == (image, stride, tokens)
    assert settings.name == name
    assert architecture(name).input_size == image
    assert architecture(name).tensor_shapes(Width(48, ()))["positions"][1] == tokens


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_large", "'vit_large' is no ViT; write vit_tiny, vit_small, vit_base, then"),
        ("vit_small_dw_pass", "is no ViT"),
        ("vit_small@384", "is no ViT"),
        ("vit_small@0384x128", "is no ViT"),
        ("vit_small@15x128", "images of 15x128 pixels .* each side must have between 16, one patch, and 4096"),
        ("vit_small@256x9999", "images of 256x9999 pixels"),
        ("vit_tiny_s12", "patches of 8 pixels do not overlap at stride 12"),
        ("vit_small@256x128", "'vit_small@256x128' is vit_small, which is its only name"),
    ],
)
def test_other_names_are_refused_with_words(name: str, reason: str) -> None:
    with pytest.raises(ArchitectureError, match=reason):
        architecture(name)


def test_the_listed_names_are_known_and_each_size_is_among_them() -> None:
    assert set(SIZES) < set(VITS) < set(architecture_names())
    for name in VITS:
        assert architecture(name).name == Settings.parse(name).name == name


def test_a_name_is_given_the_projection_once() -> None:
    assert with_projection("vit_small_pass@384x128") == "vit_small_pass_dw@384x128"
    assert with_projection("vit_small_dw") == "vit_small_dw"


# --- sizes


def parameters(table: Architecture, width: Width) -> int:
    shapes = table.tensor_shapes(width)
    return sum(prod(shape) for name, shape in shapes.items() if not name.startswith("neck."))


@pytest.mark.parametrize(
    ("name", "channels", "published"), [("vit_small", 384, 21_639_552), ("vit_base", 768, 85_746_432)]
)
def test_at_their_own_width_they_have_the_published_number_of_parameters(
    name: str, channels: int, published: int
) -> None:
    """But for the class token, which is folded into its position: `channels` numbers fewer."""
    width = Width(channels, ())
    assert Settings.parse(name).size.width == channels
    assert parameters(architecture(name), width) == published - channels
    assert parameters(architecture(f"{name}_pass"), width) == published - channels + 3 * channels
    assert parameters(architecture(f"{name}_dw"), width) == published - channels + channels**2


def test_a_width_that_is_no_multiple_of_the_heads_is_refused_with_words() -> None:
    for name, heads in (("vit_tiny", 3), ("vit_small", 6), ("vit_base", 12)):
        table = architecture(name)
        assert table.step == heads
        with pytest.raises(WidthError, match=f"there it must be a multiple of {heads}"):
            table.group_sizes(Width(5 * heads + 1, ()))
    with pytest.raises(WidthError, match=r"width w50 gives 16\.67 channels in group 'blocks.0.attn.0'"):
        ReIDModel("vit_tiny", Width(50, ()))
    with pytest.raises(WidthError, match="16x2-4-8 is no width of vit_small"):
        ReIDModel("vit_small", Width(16))


def test_a_chain_for_images_of_another_size_is_refused() -> None:
    with pytest.raises(ChainMismatch, match="position embeddings of vit_tiny are for 64x32"):
        pico_chain(architecture_name="vit_tiny", stem=12, narrowest=3, rungs=2, height=128, width=64)


# --- against the projects' own


def fold(vit: Vit, state: State) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names: tokens are added to their positions, and q, k and v taken apart."""
    prefix = vit.prefix
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    found = {"positions": folded_positions(vit, inside).T}
    for name, tensor in inside.items():
        if "attn.qkv." in name:
            thirds = zip(LETTERS, tensor.chunk(3), strict=True)
            found |= {name.replace("qkv", letter): third for letter, third in thirds}
        elif name.startswith(("patch_embed.", "blocks.", "norm.", "dw.")):
            found[name] = tensor
    return found


def folded_positions(vit: Vit, inside: Mapping[str, Tensor]) -> Tensor:
    """(tokens, channels): positions, with class and part tokens, and three times what the one camera adds."""
    if vit.has_parts:
        parts = [inside[f"part_token{i}"] + inside[f"part{i}_pos"] for i in (1, 2, 3)]
        return torch.cat([inside["cls_token"] + inside["cls_pos"], *parts, inside["pos_embed"]], dim=1)[0]
    positions = inside["pos_embed"][0].clone()
    positions[0] += inside["cls_token"][0, 0]
    return positions + vit.sie_coefficient * inside["sie_embed"][1, 0] if vit.cameras else positions


@pytest.mark.parametrize(
    ("name", "vit"),
    [
        ("vit_tiny", Vit("transreid", 48, 4, 3, patch=8, stride=8, input=(64, 32))),
        ("vit_tiny", Vit("transreid", 48, 4, 3, patch=8, stride=8, input=(64, 32), cameras=3)),
        ("vit_tiny@40x24", Vit("transreid", 24, 4, 3, patch=8, stride=8, input=(40, 24))),
        ("vit_small_s12@64x40", Vit("transreid", 24, input=(64, 40), stride=12)),
        ("vit_base@48x32", Vit("transreid", 24, heads=12, input=(48, 32))),
        ("vit_tiny_pass", Vit("pass", 48, 4, 3, patch=8, stride=8, input=(64, 32))),
        ("vit_tiny_pass_dw", Vit("oskt", 96, 4, 3, patch=8, stride=8, input=(64, 32))),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_the_module_computes_what_the_projects_own_does(name: str, vit: Vit) -> None:
    state = vits.checkpoint(vit, seed=0)
    model = ReIDModel(name, Width(vit.embed_dim, ())).eval()
    missing, unexpected = model.backbone.load_state_dict(fold(vit, state))
    assert not missing
    assert not unexpected
    images = torch.randn(2, 3, *vit.input, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        feature, _ = model(images)
    torch.testing.assert_close(feature, vits.embed(vit, state, images, camera=1), atol=1e-4, rtol=1e-4)


# --- cutting


@pytest.mark.parametrize("mode", ["nested", "oskt"])
def test_every_head_keeps_the_same_number_of_channels_all_of_its_own(mode: str) -> None:
    table, full, narrowest = architecture("vit_tiny"), Width(48, ()), Width(12, ())
    tensors = random_tensors(table, full)
    partitions: Mapping[str, Partition]
    partitions = grow_trees(table, tensors) if mode == "nested" else cluster(table, tensors, narrowest)
    for stem in (12, 24, 36):
        sizes = table.group_sizes(Width(stem, ()))
        for block in range(4):
            heads = [f"blocks.{block}.attn.{head}" for head in range(3)]
            assert table.axes[f"blocks.{block}.attn.q.weight"].rows == tuple(heads)
            for head in heads:
                cut = partitions[head].cut(sizes[head])
                assert len(cut) == stem // 3
                assert cut.parts.of == 16


def test_q_k_and_v_of_a_head_are_cut_alike_and_clustered_together() -> None:
    table = architecture("vit_tiny")
    letters = [table.axes[f"blocks.2.attn.{letter}.weight"] for letter in LETTERS]
    assert {axes.rows for axes in letters} == {tuple(f"blocks.2.attn.{head}" for head in range(3))}
    assert [axes.sums_rows for axes in letters] == [True, False, False]
    assert table.axes["blocks.2.attn.proj.weight"].columns == letters[0].rows
    assert table.writers("blocks.2.attn.1") == tuple(f"blocks.2.attn.{letter}.weight" for letter in LETTERS)


def test_the_residual_stream_is_written_by_patches_attention_and_mlp_or_by_the_projection_instead_of_patches() -> None:
    layers = [f"blocks.{block}.{layer}.weight" for block in range(4) for layer in ("attn.proj", "mlp.fc2")]
    assert architecture("vit_tiny").writers("residual") == ("patch_embed.proj.weight", *layers)
    assert architecture("vit_tiny_dw").writers("residual") == ("dw.weight", *layers)


@pytest.mark.parametrize("stem", [12, 24, 48, 96])
def test_behind_a_projection_tokens_keep_the_teacher_s_width(stem: int) -> None:
    shapes = architecture("vit_tiny_dw").tensor_shapes(Width(stem, ()))
    assert shapes["patch_embed.proj.weight"] == (96, 3, 8, 8)
    assert shapes["positions"] == (96, 33)
    assert shapes["dw.weight"] == (stem, 96)


def test_the_embedding_of_part_tokens_is_two_vectors_of_the_residual_stream() -> None:
    chain = toy_chain("vit_tiny_pass")
    assert chain.table.embedding_channels == ("residual", "residual")
    assert chain.embedding_dim == 2 * 48
    lift, size = chain.lift(chain.ladder[0]), chain.ladder[0].stem
    np.testing.assert_array_equal(lift[48:], lift[:48] + size)


@pytest.mark.parametrize("name", ["vit_tiny", "vit_tiny_pass_dw"])
def test_an_oskt_student_is_the_authors_expansion(name: str) -> None:
    """Clusters in leaf order are what the authors call labels; their student channels come in another order."""
    chain = toy_chain(name, "oskt")
    tensors = {tensor: torch.tensor(values) for tensor, values in chain.tensors.items()}
    for width in chain.ladder[1:3]:
        made = expand(chain.tensors, chain.axes, chain.cuts(width))
        for tensor, axes in chain.axes.items():
            rows = joined([shares_of(chain, group, width) for group in axes.rows])
            if tensors[tensor].ndim == 1:
                expected = oskt.averaged(tensors[tensor], rows)
            else:
                cut = axes.columns is not None
                columns = joined([shares_of(chain, group, width) for group in axes.columns or ()]) if cut else None
                expected = oskt.expanded(tensors[tensor], rows, columns)
            np.testing.assert_allclose(made[tensor], expected.numpy(), rtol=1e-5, atol=1e-6)


def toy_chain(name: str, mode: Mode = "nested") -> Chain:
    """Of widths w12, w24, w36 and w48."""
    return pico_chain(architecture_name=name, mode=mode, stem=48, narrowest=12)


def shares_of(chain: Chain, group: str, width: Width) -> Shares:
    """Of one group, with student channels by label, those of one label in the order they were given out."""
    size = chain.table.groups[group].size(width)
    narrowest = chain.partitions[group].cut(chain.partitions[group].narrowest)
    found = oskt.shared_out(narrowest.part_of().tolist(), size)
    order = sorted(range(size), key=lambda channel: found.row_of[channel])
    return Shares([found.row_of[channel] for channel in order], [found.parts[channel] for channel in order])


def joined(shares: list[Shares]) -> Shares:
    """Of an axis that consists of several groups."""
    row_of: list[int] = []
    parts: list[list[int]] = []
    rows = channels = 0
    for share in shares:
        row_of += [rows + row for row in share.row_of]
        parts += [[channels + channel for channel in part] for part in share.parts]
        rows += 1 + max(share.row_of)
        channels += sum(map(len, share.parts))
    return Shares(row_of, parts)


# --- real widths


def chain_of_real_width(name: str, ladder: tuple[Width, ...]) -> Chain:
    table = architecture(name)
    assert table.input_size is not None
    return unclustered_chain(table, ladder, InputSpec(*table.input_size, HALF, HALF))


@pytest.mark.parametrize(("name", "stems"), [("vit_small", (120, 168, 384)), ("vit_base", (264, 336, 768))])
def test_the_reference_widths_are_written_and_run(name: str, stems: tuple[int, ...]) -> None:
    chain = chain_of_real_width(name, tuple(Width(stem, ()) for stem in stems))
    stored = StoredChain(chain, "0" * 64, 1)  # nobody asks for the file
    images = np.random.default_rng(0).standard_normal((1, 3, 256, 128), dtype=np.float32)
    for width in chain.ladder[:2]:
        model = write(stored, width)
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            native = load_student(chain, width).embed(torch.from_numpy(images)).numpy()
        expected = native[:, chain.lift(width)]
        (made,) = session.run(["embedding"], {"images": images})
        assert np.abs(made - expected / np.linalg.norm(expected)).max() <= 1e-4


# --- learning


def test_one_learns_from_scratch() -> None:
    """Two colours, told apart in a few steps: gradients reach every tensor, and the loss falls."""
    torch.manual_seed(0)
    model = ReIDModel("vit_tiny_pass_dw@16x16", Width(24, ()))
    labels = torch.arange(2).repeat(8)
    images = labels.view(-1, 1, 1, 1) + 0.3 * torch.randn(16, 3, 16, 16)
    classifier = torch.nn.Linear(48, 2, bias=False)
    optimiser = torch.optim.AdamW([*model.parameters(), *classifier.parameters()], lr=1e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(classifier(model(images)[1]), labels)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(loss.item())
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {module_name("neck.bias")}
    assert losses[-1] < 0.1 < losses[0]
