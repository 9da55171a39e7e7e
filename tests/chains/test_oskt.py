"""The paper's objective against slow, literal transcriptions of its own form."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from chains.architectures import architecture
from chains.calibrate import calibrate
from chains.cut import SharedClusters
from chains.errors import ChainMismatch, WidthError
from chains.expand import expand
from chains.losses import PAPER_LOSS, center_loss, reid_loss
from chains.model import ReIDModel, load_student, model_of, numpy_tensors
from chains.oskt import OneShot, cluster, projected
from chains.refine import refine
from chains.testing import random_statistics, random_tensors
from chains.train import Trained, train_alone
from chains.tree import shared_clusters
from chains.width import Width
from tests.chains.toys import INPUT, RECIPE, a_teacher, flat_people

IMAGES = torch.randn(8, 3, 32, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4).repeat(2)
NARROWEST = Width(2)


def one_shot() -> OneShot:
    """An objective whose norms and neck are no longer all alike."""
    teacher = a_teacher()
    objective = OneShot(teacher, cluster(teacher.model.table, numpy_tensors(teacher.model), NARROWEST), NARROWEST, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*objective.teacher.parameters(), objective.neck):
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return objective


def labels_of(objective: OneShot, group: str) -> Tensor:
    """Cluster of every teacher channel, in leaf order."""
    return torch.from_numpy(objective.cuts[group].part_of())


class LiteralStudent:
    """The S-student as the authors build it: every convolution has the chain's few rows and reads all teacher channels;
    its output is repeated to teacher resolution, normalised there, and averaged inside each cluster."""

    def __init__(self, objective: OneShot) -> None:
        self.objective, self.tensors = objective, objective.teacher.tensors()

    def layer(self, x: Tensor, conv: str, norm: str, group: str, stride: int, padding: int) -> Tensor:
        labels = labels_of(self.objective, group)
        few = functional.conv2d(x, self.objective.rows[f"{conv}/weight".replace(".", "/")], None, stride, padding)
        repeated = few[:, labels]
        gamma, beta = (self.tensors[f"{norm}.{kind}"] for kind in ("weight", "bias"))
        normed = functional.batch_norm(repeated, None, None, gamma, beta, training=True)
        averaged = torch.empty_like(normed)
        for label in range(int(labels.max()) + 1):
            members = labels == label
            averaged[:, members] = normed[:, members].mean(dim=1, keepdim=True)
        return averaged

    def __call__(self, images: Tensor) -> Tensor:
        """Pooled feature (batch, n): one channel of every cluster."""
        x = functional.relu(self.layer(images, "conv1", "bn1", "stem", 2, 3))
        x, group = functional.max_pool2d(x, 3, 2, padding=1), "stem"
        for stage, stride in ((1, 1), (2, 2), (3, 2), (4, 1)):
            for index in range(2):
                block, step = f"layer{stage}.{index}", stride if index == 0 else 1
                out = "stem" if stage == 1 else f"layer{stage}"
                inner = functional.relu(self.layer(x, f"{block}.conv1", f"{block}.bn1", f"{block}.a", step, 1))
                inner = self.layer(inner, f"{block}.conv2", f"{block}.bn2", out, 1, 1)
                if group != out:
                    x = self.layer(x, f"{block}.downsample.0", f"{block}.downsample.1", out, step, 0)
                x, group = functional.relu(inner + x), out
        labels = labels_of(self.objective, group)
        firsts = torch.tensor([int((labels == label).nonzero()[0]) for label in range(int(labels.max()) + 1)])
        return x.mean(dim=(2, 3))[:, firsts]


def test_the_s_student_is_the_authors_form_of_it() -> None:
    objective = one_shot()
    feature, embedding = objective.narrowest(IMAGES)
    expected = LiteralStudent(objective)(IMAGES)
    torch.testing.assert_close(feature, expected, atol=1e-4, rtol=1e-4)
    necked = functional.batch_norm(expected, None, None, objective.neck, None, training=True)
    torch.testing.assert_close(embedding, necked, atol=1e-3, rtol=1e-3)


def test_the_chain_expanded_at_its_narrowest_width_is_the_s_student() -> None:
    objective = one_shot()
    tensors = expand(objective.tensors(), objective.table.axes, objective.cuts)
    model = model_of("resnet18", NARROWEST, tensors).train()
    for mine, expanded in zip(objective.narrowest(IMAGES), model(IMAGES), strict=True):
        torch.testing.assert_close(mine, expanded, atol=1e-4, rtol=1e-4)


def test_chain_rows_start_as_the_means_of_the_clusters_they_stand_for() -> None:
    objective = one_shot()
    weight = objective.teacher.tensors()["layer2.0.conv1.weight"]
    labels = labels_of(objective, "layer2.0.a")
    rows = objective.rows["layer2/0/conv1/weight"]
    assert rows.shape == (4, 4, 3, 3)  # half the rows of a teacher that is twice as wide, and all of its columns
    for label in range(len(rows)):
        torch.testing.assert_close(rows[label], weight[labels == label].mean(dim=0))


def test_the_refining_loss_by_its_definition() -> None:
    objective = one_shot()
    by_hand = 0.0
    for name, weight in objective.teacher.tensors().items():
        if weight.ndim > 1:
            labels = labels_of(objective, *objective.table.axes[name].rows)
            rows = objective.rows[name.replace(".", "/")]
            for row, label in enumerate(labels.tolist()):
                by_hand += (weight[row] - rows[label]).square().sum().item()
    assert by_hand > 0
    assert objective.refining_loss().item() == pytest.approx(by_hand, rel=1e-4)


def test_the_refining_loss_pulls_teacher_and_chain_towards_each_other() -> None:
    """d/dW = 2 (W - C[labels]) and d/dC = 2 Σ over the cluster (C - W); away from the means, neither is zero."""
    objective = one_shot()
    with torch.no_grad():
        objective.rows["conv1/weight"].add_(0.1)
    torch.autograd.backward(objective.refining_loss())
    rows, weight = objective.rows["conv1/weight"], objective.teacher.tensors()["conv1.weight"]
    labels = labels_of(objective, "stem")
    torch.testing.assert_close(weight.grad, 2 * (weight - rows[labels]))
    sizes = torch.bincount(labels).view(-1, 1, 1, 1)
    torch.testing.assert_close(rows.grad, (2 * 0.1 * sizes).expand_as(rows), atol=1e-5, rtol=1e-4)


def test_the_student_s_loss_reaches_chain_rows_norms_neck_and_its_classifier_but_not_the_teacher_s_rows() -> None:
    objective = one_shot()
    objective(IMAGES, LABELS, 0)["student"].backward()
    reached = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    convs = {name for name, parameter in objective.teacher.named_parameters(prefix="teacher") if parameter.ndim > 1}
    norms = {name for name, parameter in objective.teacher.named_parameters(prefix="teacher") if "bn" in name}
    assert not reached & convs
    assert norms <= reached
    assert {f"rows.{key}" for key in objective.rows} <= reached
    assert {"neck", "chain_classifier", "chain_loss.centers"} <= reached
    assert not reached & {"classifier", "loss.centers", "teacher.neck.weight"}


def test_every_trained_tensor_gets_a_gradient_and_the_neck_s_bias_none() -> None:
    objective = one_shot()
    sum(objective(IMAGES, LABELS, 0).values()).backward()
    without = [name for name, parameter in objective.named_parameters() if parameter.grad is None]
    assert without == ["teacher.neck.bias"]


def test_the_three_losses_weigh_one_each_and_have_centers_and_the_hard_factor() -> None:
    objective = one_shot()
    losses = objective(IMAGES, LABELS, 0)
    feature, embedding = objective.narrowest(IMAGES)
    assert objective.chain_loss.centers is not None
    student = reid_loss(feature, embedding @ objective.chain_classifier.T, LABELS, hard_factor=0.2)
    student = student + 5e-4 * center_loss(feature, objective.chain_loss.centers, LABELS)
    assert losses.keys() == {"teacher", "student", "refining"}
    assert losses["student"].item() == pytest.approx(student.item(), rel=1e-5)
    assert losses["refining"].item() == pytest.approx(objective.refining_loss().item())
    assert objective.loss.recipe == PAPER_LOSS


def test_before_any_step_the_teacher_s_pass_is_the_teacher_handed_in() -> None:
    teacher = a_teacher()
    clusters = cluster(teacher.model.table, numpy_tensors(teacher.model), NARROWEST)
    objective = OneShot(teacher, clusters, NARROWEST, 0)
    order = torch.from_numpy(clusters["layer4"].order)
    for mine, original in zip(objective.teacher(IMAGES), teacher.model.train()(IMAGES), strict=True):
        torch.testing.assert_close(mine, original[:, order], atol=1e-4, rtol=1e-4)


def test_the_chain_s_tensors_have_few_rows_all_columns_and_teacher_norms() -> None:
    tensors = one_shot().tensors()
    assert tensors["layer4.0.conv1.weight"].shape == (16, 16, 3, 3)
    assert tensors["layer4.0.bn1.weight"].shape == tensors["neck.weight"].shape == (32,)
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())


def test_clusters_are_as_many_as_the_narrowest_student_has_channels() -> None:
    model = a_teacher().model
    clusters = cluster(model.table, numpy_tensors(model), NARROWEST)
    assert {group: len(clusters[group].sizes) for group in clusters} == model.table.group_sizes(NARROWEST)
    assert all(isinstance(found, SharedClusters) for found in clusters.values())
    with pytest.raises(ChainMismatch, match="group 'stem' has 4 channels, which make no 5 clusters"):
        cluster(model.table, numpy_tensors(model), Width(5))


# --- ViTs

VIT, VIT_FULL, VIT_NARROWEST = "vit_tiny_pass@24x16", Width(96, ()), Width(24, ())
VIT_IMAGES = torch.randn(8, 3, 24, 16, generator=torch.Generator().manual_seed(0))
HEADS, BLOCKS = 3, 4


def a_vit_teacher(name: str = VIT, width: Width = VIT_FULL) -> Trained:
    table = architecture(name)
    tensors = random_tensors(table, width)
    tensors["neck.bias"][:] = 0
    model = model_of(name, width, tensors | random_statistics(table, width))
    classifier = torch.randn(4, table.embedding_dim(width), generator=torch.Generator().manual_seed(2))
    return Trained(model, classifier)


def vit_one_shot() -> OneShot:
    """An objective whose chain is no longer the teacher's means and copies."""
    teacher = projected(a_vit_teacher())
    clusters = cluster(teacher.model.table, numpy_tensors(teacher.model), VIT_NARROWEST)
    objective = OneShot(teacher, clusters, VIT_NARROWEST, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*objective.rows.parameters(), *objective.vectors.parameters(), objective.neck):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return objective


class LiteralViTStudent:
    """The S-student of a ViT as its formulas say: a row of the chain per label, columns added up and vectors averaged
    by label, then the network by hand, head by head. Tokens come from the teacher's own patches."""

    def __init__(self, objective: OneShot) -> None:
        self.objective, self.teacher = objective, objective.teacher.tensors()

    def labels(self, groups: tuple[str, ...]) -> list[list[int]]:
        """Label -> its channels, of an axis of several groups: those of a later group come behind."""
        found: list[list[int]] = []
        start = 0
        for group in groups:
            labels = labels_of(self.objective, group).tolist()
            members = [[start + c for c, own in enumerate(labels) if own == label] for label in range(max(labels) + 1)]
            found, start = found + members, start + len(labels)
        return found

    def vector(self, name: str) -> Tensor:
        own = self.objective.vectors[name.replace(".", "/")]
        return torch.stack([own[members].mean() for members in self.labels(self.objective.table.axes[name].rows)])

    def weight(self, name: str) -> Tensor:
        own = self.objective.rows[name.replace(".", "/")]
        columns = self.labels(self.objective.table.axes[name].columns or ())
        return torch.stack([own[:, members].sum(dim=1) for members in columns], dim=1)

    def linear(self, name: str, x: Tensor) -> Tensor:
        product: Tensor = x @ self.weight(f"{name}.weight").T
        return product + self.vector(f"{name}.bias")

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.vector(f"{name}.weight") + self.vector(f"{name}.bias")

    def tokens(self, images: Tensor) -> Tensor:
        """(batch, 4 + patches, n): at the teacher's width up to `dw`, which has a row per label and is not summed."""
        weight, bias = (self.teacher[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        patches = functional.conv2d(images, weight, bias, stride=8).flatten(2).transpose(1, 2)
        x = torch.cat([torch.zeros(len(images), 4, patches.shape[2]), patches], dim=1) + self.teacher["positions"].T
        projected_tokens: Tensor = x @ self.objective.rows["dw/weight"].T
        return projected_tokens

    def attention(self, block: str, x: Tensor) -> Tensor:
        q, k, v = (self.linear(f"{block}.attn.{letter}", x) for letter in "qkv")
        size, heads = q.shape[2] // HEADS, []
        for head in range(HEADS):
            span = slice(head * size, (head + 1) * size)
            products = q[:, :, span] @ k[:, :, span].transpose(1, 2) * size**-0.5  # the student's scale
            heads.append(products.softmax(dim=-1) @ v[:, :, span])
        return self.linear(f"{block}.attn.proj", torch.cat(heads, dim=2))

    def __call__(self, images: Tensor) -> Tensor:
        """Feature (batch, 2 n): the class token, and the mean of three part tokens."""
        x = self.tokens(images)
        for index in range(BLOCKS):
            block = f"blocks.{index}"
            x = x + self.attention(block, self.norm(f"{block}.norm1", x))
            hidden = functional.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        x = self.norm("norm", x)
        return torch.cat([x[:, 0], (x[:, 1] + x[:, 2] + x[:, 3]) / 3], dim=1)


def test_a_vit_s_s_student_is_the_authors_form_of_it() -> None:
    objective = vit_one_shot()
    feature, embedding = objective.narrowest(VIT_IMAGES)
    assert feature.shape == (8, 48)
    expected = LiteralViTStudent(objective)(VIT_IMAGES)
    torch.testing.assert_close(feature, expected, atol=1e-4, rtol=1e-4)
    necked = functional.batch_norm(expected, None, None, objective.neck, None, training=True)
    torch.testing.assert_close(embedding, necked, atol=1e-3, rtol=1e-3)


def test_a_vit_s_chain_expanded_at_its_narrowest_width_is_the_s_student() -> None:
    objective = vit_one_shot()
    tensors = expand(objective.tensors(), objective.table.averaged_axes, objective.cuts)
    model = model_of(objective.table.name, VIT_NARROWEST, tensors).train()
    for mine, expanded in zip(objective.narrowest(VIT_IMAGES), model(VIT_IMAGES), strict=True):
        torch.testing.assert_close(mine, expanded, atol=1e-4, rtol=1e-4)


def test_a_vit_s_chain_has_rows_and_vectors_of_its_own_from_the_projection_on() -> None:
    teacher = projected(a_vit_teacher())
    clusters = cluster(teacher.model.table, numpy_tensors(teacher.model), VIT_NARROWEST)
    objective = OneShot(teacher, clusters, VIT_NARROWEST, 0)
    tensors = objective.teacher.tensors()
    shared = {"patch_embed.proj.weight", "patch_embed.proj.bias", "positions", "neck.weight", "neck.bias"}
    own = {key.replace("/", ".") for key in (*objective.rows, *objective.vectors)}
    assert own == set(tensors) - shared
    for key, vector in objective.vectors.items():
        torch.testing.assert_close(vector, tensors[key.replace("/", ".")], atol=0, rtol=0)
    labels = labels_of(objective, "blocks.1.attn.2")
    rows, weight = objective.rows["blocks/1/attn/k/weight"][16:], tensors["blocks.1.attn.k.weight"][64:]  # third head
    assert rows.shape == (8, 96)
    for label in range(8):
        torch.testing.assert_close(rows[label], weight[labels == label].mean(dim=0))
    assert objective.rows["dw/weight"].shape == (24, 96)


def test_a_vit_s_refining_loss_ties_rows_biases_and_norms_all_entries_alike() -> None:
    objective = vit_one_shot()
    by_hand = {1: 0.0, 2: 0.0}
    for name, tensor in objective.teacher.tensors().items():
        key = name.replace(".", "/")
        if key in objective.vectors:
            by_hand[1] += (tensor - objective.vectors[key]).square().sum().item()
        elif key in objective.rows:
            label_of: list[int] = []
            start = 0
            for group in objective.table.axes[name].rows:
                labels = labels_of(objective, group) + start
                label_of, start = label_of + labels.tolist(), int(labels.max()) + 1
            for row, label in enumerate(label_of):
                by_hand[2] += (tensor[row] - objective.rows[key][label]).square().sum().item()
    assert min(by_hand.values()) > 0
    assert objective.refining_loss().item() == pytest.approx(sum(by_hand.values()), rel=1e-4)


def test_a_vit_s_student_loss_reaches_the_chain_and_of_the_teacher_what_stands_in_front_of_the_projection() -> None:
    objective = vit_one_shot()
    objective(VIT_IMAGES, LABELS, 0)["student"].backward()
    reached = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    own = {f"{kind}.{key}" for kind in ("rows", "vectors") for key in getattr(objective, kind)}
    front = {f"teacher.backbone.{name}" for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "positions")}
    assert reached == own | front | {"neck", "chain_classifier", "chain_loss.centers"}


def test_every_trained_tensor_of_a_vit_gets_a_gradient_and_the_neck_s_bias_none() -> None:
    objective = vit_one_shot()
    sum(objective(VIT_IMAGES, LABELS, 0).values()).backward()
    without = [name for name, parameter in objective.named_parameters() if parameter.grad is None]
    assert without == ["teacher.neck.bias"]


def test_a_vit_s_rows_are_clustered_at_unit_length_each_matrix_by_itself() -> None:
    """The residual stream's on `dw`, all attention projections and all fc2 side by side; a head's on its q, k and v."""
    model = projected(a_vit_teacher()).model
    tensors = numpy_tensors(model)
    found = cluster(model.table, tensors, VIT_NARROWEST)
    written = {
        "residual": [f"blocks.{block}.{layer}" for block in range(BLOCKS) for layer in ("attn.proj", "mlp.fc2")],
        "blocks.3.attn.1": [f"blocks.3.attn.{letter}" for letter in "qkv"],
        "blocks.0.mlp": ["blocks.0.mlp.fc1"],
    }
    written["residual"].insert(0, "dw")
    for group, layers in written.items():
        rows = [tensors[f"{layer}.weight"].astype(np.float64) for layer in layers]
        if group == "blocks.3.attn.1":
            rows = [matrix[32:64] for matrix in rows]
        unit = [matrix / np.sqrt((matrix**2).sum(axis=1, keepdims=True)) for matrix in rows]
        expected = shared_clusters(np.concatenate(unit, axis=1), len(found[group].sizes))
        plain = shared_clusters(np.concatenate(rows, axis=1), len(found[group].sizes))
        assert found[group].order.tolist() == expected.order.tolist()
        assert found[group].sizes.tolist() == expected.sizes.tolist()
        assert found[group].order.tolist() != plain.order.tolist()


def test_a_row_of_zeros_does_not_keep_a_vit_from_being_clustered() -> None:
    model = projected(a_vit_teacher()).model
    tensors = numpy_tensors(model)
    tensors["blocks.0.mlp.fc1.weight"][5] = 0
    assert len(cluster(model.table, tensors, VIT_NARROWEST)["blocks.0.mlp"].sizes) == 96


def test_a_vit_with_the_projection_is_the_same_function() -> None:
    teacher = a_vit_teacher()
    made = projected(teacher)
    assert made.model.table.name == "vit_tiny_pass_dw@24x16"
    assert made.model.training is teacher.model.training is False
    for mine, original in zip(made.model(VIT_IMAGES), teacher.model(VIT_IMAGES), strict=True):
        torch.testing.assert_close(mine, original, atol=1e-6, rtol=1e-6)
    assert made.classifier is teacher.classifier


def test_what_has_a_projection_or_is_no_vit_is_left_alone() -> None:
    made = projected(a_vit_teacher())
    assert projected(made) is made
    teacher = a_teacher()
    assert projected(teacher) is teacher


def test_a_vit_of_another_width_than_its_name_s_gets_no_projection() -> None:
    teacher = Trained(ReIDModel("vit_tiny", Width(24, ())), torch.zeros(4, 24))
    with pytest.raises(WidthError, match=r"vit_tiny vit_tiny_dw, whose tokens have 96 channels; a teacher of w24 is"):
        projected(teacher)


def test_a_vit_is_refined_in_mode_oskt_into_a_chain_of_every_width() -> None:
    people, ladder = flat_people(), (Width(24, ()), Width(48, ()), Width(96, ()))
    given = train_alone("vit_tiny_pass@32x16", ladder[-1], people, INPUT, RECIPE, 0)
    teacher = projected(given)
    refined = refine(teacher, ladder, people, INPUT, RECIPE, 0, mode="oskt")
    chain = refined.chain(
        name="vit",
        architecture=teacher.model.table.name,
        ladder=ladder,
        teacher=ladder[-1],
        input=INPUT,
        license="Apache-2.0",
        provenance={},
    )
    assert chain.embedding_dim == 192
    chain = calibrate(chain, flat_people(each=32))
    images = torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    for width in ladder:
        embeddings = load_student(chain, width).embed(images)
        assert embeddings.shape == (2, 2 * width.stem)
        assert embeddings.isfinite().all()
