"""The paper's objective (Li, Qi, Geng, OSKT, ICCV 2025), followed to the letter of the authors' code.

Three losses of weight 1 are summed, with gradients into everything (methods/oskt.md §2):

    ReID(teacher) + ReID(S-student) + Σ over weights ‖ W - C[labels] ‖²

W: the teacher's weights (N_out, N_in, …). C: the chain's, (n_out, N_in, …): one row per cluster, columns at teacher
resolution, started from the cluster means of W. Norm weights and biases belong to both. The S-student is the
narrowest student. In the authors' code it has its own layers: a convolution with C, its rows repeated to N channels,
batch norm at teacher resolution, the average inside each cluster. Rows of a cluster are alike, so that is the narrow
network on `expand(C, n)`, which is how it runs here. It has its own neck and classifier at student width, also in the
authors' code; the chain keeps its neck, repeated to teacher resolution.

A ViT differs in three ways. Rows are L2-normalised, each matrix on its own, before they are clustered. The chain has
biases and norms of its own at teacher resolution, started as the teacher's and tied to them in the refining loss, all
entries alike. And in front of the blocks stands one more projection `dw` (`projected`), which is what is cut: patch
embedding and positions stay at the teacher's width and belong to both, as every tensor that no width changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from chains.arch import Architecture
from chains.architectures.vit import is_transformer, refined_name
from chains.chain import Floats, cuts_of
from chains.cut import Cuts, Runs, SharedClusters, joined_order
from chains.errors import ChainMismatch
from chains.expand import expand, merge
from chains.losses import PAPER_LOSS, LossRecipe, ReIDLoss
from chains.model import ReIDModel, module_name
from chains.nested import digest_of_cuts, in_leaf_order_model, template
from chains.train import Objective, Trained
from chains.tree import group_rows, shared_clusters
from chains.width import Width

NECK = "neck.weight"


class OneShot(Objective):
    """Teacher and weight chain under refinement. Batch norm uses batch statistics; none are kept."""

    def __init__(
        self,
        teacher: Trained,
        partitions: Mapping[str, SharedClusters],
        narrowest: Width,
        seed: int,
        loss: LossRecipe = PAPER_LOSS,
    ) -> None:
        super().__init__()
        self.table: Architecture = teacher.model.table
        self.cuts: Cuts = cuts_of(self.table, partitions, narrowest)
        self.partitions = partitions
        generator = torch.Generator().manual_seed(seed)
        self.teacher = in_leaf_order_model(teacher.model, partitions)
        rows = {_key(name): merge(weight.detach(), self._clusters(name)) for name, weight in self._weights().items()}
        self.rows = nn.ParameterDict({key: nn.Parameter(means.clone()) for key, means in rows.items()})
        vectors = {_key(name): vector.detach().clone() for name, vector in self._own_vectors().items()}
        self.vectors = nn.ParameterDict({key: nn.Parameter(vector) for key, vector in vectors.items()})
        groups = self.table.embedding_channels
        order = joined_order([partitions[group].order for group in groups])
        self.classifier = nn.Parameter(teacher.classifier[:, torch.from_numpy(order)].clone())
        self.neck = nn.Parameter(torch.ones(len(self.cuts.of(groups))))
        (pids, dim), width = self.classifier.shape, len(self.neck)
        self.chain_classifier = nn.Parameter(torch.randn(pids, width, generator=generator) * 1e-3)
        self.loss = ReIDLoss(pids, dim, loss, generator)
        self.chain_loss = ReIDLoss(pids, width, loss, generator)
        self.narrow = (template(self.table.name, narrowest),)  # in a tuple, so that it is no submodule

    def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:  # noqa: ARG002
        with self.autocast(pixels.device):
            feature, embedding = self.teacher(pixels)
            narrow_feature, narrow = self.narrowest(pixels)
        return {
            "teacher": self.loss(feature.float(), embedding.float() @ self.classifier.T, labels),
            "student": self.chain_loss(narrow_feature.float(), narrow.float() @ self.chain_classifier.T, labels),
            "refining": self.refining_loss(),
        }

    def narrowest(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Feature and embedding (batch, n) of the S-student."""
        student = expand(self._chain(), self.table.averaged_axes, self.cuts)
        state = {module_name(name): tensor for name, tensor in {**student, NECK: self.neck}.items()}
        feature, embedding = functional_call(self.narrow[0], state, (pixels,))
        return feature, embedding

    def refining_loss(self) -> Tensor:
        """Σ over weights ‖ W - C[labels] ‖², of a ViT over biases and norms too; a plain sum over all entries.
        Gradients reach both."""
        terms = [(weight - self._repeated(name)).square().sum() for name, weight in self._weights().items()]
        terms += [(v - self.vectors[_key(name)]).square().sum() for name, v in self._own_vectors().items()]
        return torch.stack(terms).sum()

    def settings(self) -> Mapping[str, Any]:
        return {"loss": asdict(self.loss.recipe), "cuts": digest_of_cuts({self.narrow[0].width: self.cuts})}

    def tensors(self) -> dict[str, Floats]:
        """The chain's tensors as they are now: float32, leaf order, copies; weights (n_out, N_in, …), vectors (N,)."""
        neck = self.neck[torch.from_numpy(self.cuts.of(self.table.embedding_channels).part_of()).to(self.neck.device)]
        tensors = {**self._chain(), NECK: neck}
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}

    def _weights(self) -> dict[str, Tensor]:
        """The teacher's weights by name, of which the chain has rows of its own."""
        return {name: tensor for name, tensor in self._cut().items() if tensor.ndim > 1}

    def _own_vectors(self) -> dict[str, Tensor]:
        """The teacher's biases and norms by name, where the chain has its own: those of a ViT, but for the neck's."""
        if not is_transformer(self.table):
            return {}
        return {name: t for name, t in self._cut().items() if t.ndim == 1 and not name.startswith("neck.")}

    def _cut(self) -> dict[str, Tensor]:
        """The teacher's tensors by name, but for those that are alike at every width."""
        return {name: t for name, t in self.teacher.tensors().items() if not _is_constant(self.table, name)}

    def _chain(self) -> dict[str, Tensor]:
        """The chain's tensors by name: its own, where it has some, and the teacher's."""
        own: dict[str, Tensor] = {**self.rows, **self.vectors}
        return {name: own.get(_key(name), tensor) for name, tensor in self.teacher.tensors().items()}

    def _clusters(self, name: str) -> Runs:
        """The clusters of a weight's rows, as runs of teacher channels."""
        return self.cuts.of(self.table.axes[name].rows).parts

    def _repeated(self, name: str) -> Tensor:
        """C[labels]: (N_out, N_in, k, k)."""
        rows = self.rows[_key(name)]
        sizes = torch.from_numpy(self._clusters(name).sizes).to(rows.device)
        return torch.repeat_interleave(rows, sizes, dim=0)


def cluster(table: Architecture, tensors: Mapping[str, Floats], narrowest: Width) -> dict[str, SharedClusters]:
    """The paper's clusters of a teacher's channels, as many per group as `narrowest` has. `tensors` are in the
    teacher's own channel order. Raises `ChainMismatch` where they are fewer than that."""
    if is_transformer(table):
        tensors = {name: _unit_rows(tensor) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    clusters = {}
    for group, size in table.group_sizes(narrowest).items():
        rows = group_rows(table, tensors, group)
        if len(rows) < size:
            raise ChainMismatch(f"group '{group}' has {len(rows)} channels, which make no {size} clusters")
        clusters[group] = shared_clusters(rows, size)
    return clusters


def _unit_rows(weight: Floats) -> Floats:
    """Rows of L2 norm one; a row of zeros stays."""
    norms: Floats = np.sqrt(np.square(weight).sum(axis=tuple(range(1, weight.ndim)), keepdims=True))
    norms[norms == 0] = 1
    return weight / norms


def projected(teacher: Trained) -> Trained:
    """`teacher`; if it is a ViT without the projection `dw`, the same function as one that has it, as the identity.

    Raises `WidthError` as `refined_name`."""
    model = teacher.model
    name = refined_name(model.table, model.width)
    if name == model.table.name:
        return teacher
    made = ReIDModel(name, model.width).to(next(model.parameters()).device)
    made.load_state_dict({**model.state_dict(), "backbone.dw.weight": torch.eye(model.width.stem)})
    return Trained(made.train(model.training), teacher.classifier)


def _is_constant(table: Architecture, name: str) -> bool:
    """Whether a tensor is the same at every width."""
    axes = table.axes[name]
    return all(table.groups[group].constant is not None for group in (*axes.rows, *(axes.columns or ())))


def _key(name: str) -> str:
    """A tensor's name as a key of a `ParameterDict`, which refuses dots."""
    return name.replace(".", "/")
