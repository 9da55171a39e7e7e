"""The paper's objective (Li, Qi, Geng, OSKT, ICCV 2025), followed to the letter of the authors' code for ResNets.

Three losses of weight 1 are summed, with gradients into everything (methods/oskt.md §2):

    ReID(teacher) + ReID(S-student) + Σ over convs ‖ W - C[labels] ‖²

W: the teacher's conv weights (N_out, N_in, k, k). C: the chain's, (n_out, N_in, k, k): one row per cluster, columns at
teacher resolution, started from the cluster means of W. Norm weights and biases belong to both. The S-student is the
narrowest student. In the authors' code it has its own layers: a convolution with C, its rows repeated to N channels,
batch norm at teacher resolution, the average inside each cluster. Rows of a cluster are alike, so that is the narrow
network on `expand(C, n)`, which is how it runs here. It has its own neck and classifier at student width, also in the
authors' code; the chain keeps its neck, repeated to teacher resolution.

The ViT's side of the paper (separate norms that the refining loss ties, an inserted projection) needs a ViT backbone,
which this library does not have yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from chains.arch import Architecture
from chains.chain import Floats
from chains.cut import Cut, Runs, SharedClusters
from chains.errors import ChainMismatch
from chains.expand import expand, merge
from chains.losses import PAPER_LOSS, LossRecipe, ReIDLoss
from chains.model import module_name
from chains.nested import cuts_of, digest_of_cuts, in_leaf_order_model, template
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
        self.cuts: Mapping[str, Cut] = cuts_of(self.table, partitions, narrowest)
        self.partitions = partitions
        generator = torch.Generator().manual_seed(seed)
        self.teacher = in_leaf_order_model(teacher.model, partitions)
        self.rows = nn.ParameterDict(
            {
                _key(name): nn.Parameter(merge(w.detach(), self._clusters(name)).clone())
                for name, w in self._convs().items()
            }
        )
        embedding = partitions[self.table.embedding_group]
        self.classifier = nn.Parameter(teacher.classifier[:, torch.from_numpy(embedding.order)].clone())
        self.neck = nn.Parameter(torch.ones(embedding.narrowest))
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
        student = expand(self._chain(), self.table.axes, self.cuts)
        state = {module_name(name): tensor for name, tensor in {**student, NECK: self.neck}.items()}
        feature, embedding = functional_call(self.narrow[0], state, (pixels,))
        return feature, embedding

    def refining_loss(self) -> Tensor:
        """Σ over convs ‖ W - C[labels] ‖², a plain sum over all entries; gradients reach both."""
        terms = [(weight - self._repeated(name)).square().sum() for name, weight in self._convs().items()]
        return torch.stack(terms).sum()

    def settings(self) -> Mapping[str, Any]:
        return {"loss": asdict(self.loss.recipe), "cuts": digest_of_cuts({self.narrow[0].width: self.cuts})}

    def tensors(self) -> dict[str, Floats]:
        """The chain's tensors as they are now: float32, leaf order, copies; convs (n_out, N_in, k, k), norms (N,)."""
        neck = self.neck[torch.from_numpy(self.cuts[self.table.embedding_group].part_of()).to(self.neck.device)]
        tensors = {**self._chain(), NECK: neck}
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}

    def _convs(self) -> dict[str, Tensor]:
        """The teacher's conv weights by name."""
        return {name: tensor for name, tensor in self.teacher.tensors().items() if tensor.ndim > 1}

    def _chain(self) -> dict[str, Tensor]:
        """The chain's tensors by name: its own rows, the teacher's norms."""
        tensors = self.teacher.tensors()
        return {name: self.rows[_key(name)] if t.ndim > 1 else t for name, t in tensors.items()}

    def _clusters(self, name: str) -> Runs:
        """The clusters of a conv's rows, as runs of teacher channels."""
        return self.cuts[self.table.axes[name].rows].parts

    def _repeated(self, name: str) -> Tensor:
        """C[labels]: (N_out, N_in, k, k)."""
        rows = self.rows[_key(name)]
        sizes = torch.from_numpy(self._clusters(name).sizes).to(rows.device)
        return torch.repeat_interleave(rows, sizes, dim=0)


def cluster(table: Architecture, tensors: Mapping[str, Floats], narrowest: Width) -> dict[str, SharedClusters]:
    """The paper's clusters of a teacher's channels, as many per group as `narrowest` has. `tensors` are in the
    teacher's own channel order. Raises `ChainMismatch` where they are fewer than that."""
    clusters = {}
    for group, size in table.group_sizes(narrowest).items():
        rows = group_rows(tensors, table.writers(group))
        if len(rows) < size:
            raise ChainMismatch(f"group '{group}' has {len(rows)} channels, which make no {size} clusters")
        clusters[group] = shared_clusters(rows, size)
    return clusters


def _key(name: str) -> str:
    """A tensor's name as a key of a `ParameterDict`, which refuses dots."""
    return name.replace(".", "/")
