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
from chains.cut import Indices, NestedTree, SharedClusters


def group_rows(tensors: Mapping[str, NDArray[np.float32]], writers: tuple[str, ...]) -> NDArray[np.float64]:
    """The rows of a group: every matrix that writes it, flattened to `(N, -1)` and set side by side."""
    flat = [tensors[name].reshape(len(tensors[name]), -1) for name in writers]
    return np.concatenate(flat, axis=1).astype(np.float64)


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


def grow_trees(architecture: Architecture, tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NestedTree]:
    """A Ward tree for every channel group of a teacher whose tensors are in their own channel order."""
    return {group: ward_tree(group_rows(tensors, architecture.writers(group))) for group in architecture.groups}


def in_leaf_order(
    architecture: Architecture, tensors: Mapping[str, NDArray[np.float32]], orders: Mapping[str, Indices]
) -> dict[str, NDArray[np.float32]]:
    """The same network with the channels of every group permuted into `orders`: rows and columns consistently."""
    permuted = {}
    for name, axes in architecture.axes.items():
        tensor = tensors[name][orders[axes.rows]]
        permuted[name] = tensor if axes.columns is None else tensor[:, orders[axes.columns]]
    return permuted
