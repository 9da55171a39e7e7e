"""The paper's objective against slow, literal transcriptions of its own form."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from chains.cut import SharedClusters
from chains.errors import ChainMismatch
from chains.expand import expand
from chains.losses import PAPER_LOSS, center_loss, reid_loss
from chains.model import model_of, numpy_tensors
from chains.oskt import OneShot, cluster
from chains.width import Width
from tests.chains.toys import a_teacher

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
            labels, rows = labels_of(objective, objective.table.axes[name].rows), objective.rows[name.replace(".", "/")]
            for row, label in enumerate(labels.tolist()):
                by_hand += (weight[row] - rows[label]).square().sum().item()
    assert by_hand > 0
    assert objective.refining_loss().item() == pytest.approx(by_hand, rel=1e-4)


def test_the_refining_loss_pulls_teacher_and_chain_towards_each_other() -> None:
    """d/dW = 2 (W - C[labels]) and d/dC = 2 Σ over the cluster (C - W); away from the means, neither is zero."""
    objective = one_shot()
    with torch.no_grad():
        objective.rows["conv1/weight"].add_(0.1)
    objective.refining_loss().backward()
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
