"""Row clustering: Ward trees over the rows of a channel group, and the leaf order that makes every cut contiguous.

Rows are the flattened weights of every matrix that writes the group, side by side, as in OSKT (`FilterClustering` of
the authors' code); the clustering is agglomerative with Ward's criterion.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage

from chains.arch import Architecture
from chains.cut import Indices, NestedTree, SharedClusters, joined_order


def group_rows(
    architecture: Architecture, tensors: Mapping[str, NDArray[np.float32]], group: str
) -> NDArray[np.float64]:
    """The rows of a group (N, features): of every matrix that writes it, flattened to `(N, -1)` and set side by side.
    Where a matrix writes several groups, which are blocks of one size, those of its own block."""
    flat = [_block(architecture, tensors[name], name, group) for name in architecture.writers(group)]
    return np.concatenate(flat, axis=1).astype(np.float64)


def _block(architecture: Architecture, tensor: NDArray[np.float32], name: str, group: str) -> NDArray[np.float32]:
    blocks = architecture.axes[name].rows
    rows = len(tensor) // len(blocks)
    first = blocks.index(group) * rows
    return tensor[first : first + rows].reshape(rows, -1)


def ward_tree(rows: NDArray[np.float64]) -> NestedTree:
    """The Ward tree of `rows` (N, features), leaves in order.

    Merging two clusters that are neighbours in leaf order removes the one boundary between them; read backwards, the
    merges are the order in which boundaries appear as a cut gets wider.
    """
    if len(rows) == 1:
        return NestedTree(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    merges = linkage(rows, method="ward")
    order = leaves_list(merges).astype(np.int64)
    return NestedTree(order, _boundaries_removed(merges, order)[::-1].copy())


def leading_tree(rows: NDArray[np.float64], leaves: int) -> NestedTree:
    """The Ward tree of the `leaves` most important of `rows` (N, features), the others behind it by importance, which
    is a row's L1 norm as in OFA's elastic width (Cai et al., ICLR 2020). 1 ≤ leaves ≤ N; 1 gives US-Net's slices."""
    by_importance = np.argsort(-np.abs(rows).sum(axis=1), kind="stable")
    leading = np.sort(by_importance[:leaves])
    tree = ward_tree(rows[leading])
    return NestedTree(np.concatenate((leading[tree.order], by_importance[leaves:])), tree.splits)


def _boundaries_removed(merges: NDArray[np.float64], order: Indices) -> Indices:
    """For each merge in turn, the leaf position of the boundary that it removes: int64 (N - 1,)."""
    leaves = len(order)
    first = np.empty(2 * leaves - 1, dtype=np.int64)  # leftmost leaf position of every cluster
    first[order] = np.arange(leaves)
    removed = np.empty(leaves - 1, dtype=np.int64)
    for index, (left, right) in enumerate(merges[:, :2].astype(np.int64)):
        first[leaves + index] = min(first[left], first[right])
        removed[index] = max(first[left], first[right])
    return removed


def shared_clusters(rows: NDArray[np.float64], count: int) -> SharedClusters:
    """The Ward tree of `rows` cut at `count` clusters, as the paper uses it: sorted by (cluster, teacher channel),
    clusters numbered by the leaf order of the tree."""
    tree = ward_tree(rows)
    labels = np.empty(len(rows), dtype=np.int64)
    labels[tree.order] = tree.cut(count).part_of()
    return SharedClusters(np.argsort(labels, kind="stable").astype(np.int64), np.bincount(labels).astype(np.int64))


def grow_trees(
    architecture: Architecture, tensors: Mapping[str, NDArray[np.float32]], merged_share: float = 1
) -> dict[str, NestedTree]:
    """A Ward tree for every channel group of a teacher whose tensors are in their own channel order.

    merged_share: of a group's channels, the most important, that its tree covers, 0 (slices) to 1. The embedding's tree
    covers all in any case: that is how every width's embedding comes to stand for all of the teacher's.
    """
    shares = dict.fromkeys(architecture.groups, merged_share) | dict.fromkeys(architecture.embedding_channels, 1)
    grown = {}
    for group, share in shares.items():
        rows = group_rows(architecture, tensors, group)
        grown[group] = leading_tree(rows, max(1, round(share * len(rows))))
    return grown


def in_leaf_order(
    architecture: Architecture, tensors: Mapping[str, NDArray[np.float32]], orders: Mapping[str, Indices]
) -> dict[str, NDArray[np.float32]]:
    """The same network with the channels of every group permuted into `orders`: rows and columns consistently."""
    permuted = {}
    for name, axes in architecture.axes.items():
        rows = joined_order([orders[group] for group in axes.rows])
        columns = None if axes.columns is None else joined_order([orders[group] for group in axes.columns])
        permuted[name] = tensors[name][rows] if columns is None else tensors[name][rows][:, columns]
    return permuted
