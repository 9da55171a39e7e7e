import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains.cut import NestedTree, Runs, SharedClusters, share_out
from chains.errors import CutError
from chains.tree import leading_tree, shared_clusters, ward_tree

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def a_tree(leaves: int, seed: int = 0) -> NestedTree:
    generator = np.random.default_rng(seed)
    return NestedTree(generator.permutation(leaves), generator.permutation(leaves - 1) + 1)


def literal_share_out(sizes: list[int], rows: int) -> list[int]:
    """The rule in words, with fractions instead of floats."""
    from fractions import Fraction

    shares = [1] * len(sizes)
    for _ in range(rows - len(sizes)):
        ratios = [Fraction(share, size) for share, size in zip(shares, sizes, strict=True)]
        shares[ratios.index(min(ratios))] += 1
    return shares


@given(SIZES, st.data())
def test_share_out_follows_the_rule(sizes: list[int], data: st.DataObject) -> None:
    rows = data.draw(st.integers(len(sizes), sum(sizes)))
    assert share_out(sizes, rows).tolist() == literal_share_out(sizes, rows)


@pytest.mark.timeout(3)
def test_share_out_of_a_very_wide_group_is_quick() -> None:
    """A hostile chain file may declare a group of hundreds of thousands of channels and few stored rows."""
    assert share_out([4] * 50_000, 150_000).tolist() == [3] * 50_000


@given(SIZES, st.data())
def test_every_teacher_channel_lands_in_one_part_inside_its_own_cluster(sizes: list[int], data: st.DataObject) -> None:
    clusters = SharedClusters(np.arange(sum(sizes)), np.array(sizes))
    cut = clusters.cut(data.draw(st.integers(len(sizes), sum(sizes))))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    part_of = cut.part_of()
    assert len(part_of) == sum(sizes)
    assert set(part_of) == set(range(len(cut)))  # none empty
    assert all(labels[channel] == cut.rows.starts[part] for channel, part in enumerate(part_of))


def test_clusters_at_both_ends_are_the_two_identities() -> None:
    clusters = SharedClusters(np.arange(6), np.array([3, 1, 2]))
    assert clusters.cut(3).parts.sizes.tolist() == [3, 1, 2]
    assert clusters.cut(6).parts.is_plain
    assert clusters.cut(6).rows.starts.tolist() == [0, 0, 0, 1, 2, 2]


def test_an_uneven_cluster_gives_its_earlier_parts_one_more() -> None:
    assert SharedClusters(np.arange(5), np.array([5])).cut(3).parts.sizes.tolist() == [2, 2, 1]


@given(st.integers(2, 40), st.integers(0, 5), st.data())
def test_cuts_of_a_tree_nest(leaves: int, seed: int, data: st.DataObject) -> None:
    tree = a_tree(leaves, seed)
    narrow, wide = sorted(data.draw(st.tuples(st.integers(1, leaves), st.integers(1, leaves))))
    assert set(tree.cut(narrow).parts.starts) <= set(tree.cut(wide).parts.starts)
    assert len(tree.cut(wide)) == wide


def test_the_worked_examples_of_the_module_hold() -> None:
    tree = NestedTree(np.arange(6), np.array([4, 2, 5, 1, 3]))
    assert tree.cut(2).parts.starts.tolist() == [0, 4]
    assert tree.cut(3).parts.starts.tolist() == [0, 2, 4]
    assert tree.cut(6).parts.is_plain
    leading = NestedTree(np.arange(6), np.array([2, 1]))
    assert leading.cut(1).part_of().tolist() == [0, 0, 0, -1, -1, -1]
    assert leading.cut(2).part_of().tolist() == [0, 0, 1, -1, -1, -1]
    assert leading.cut(4).part_of().tolist() == [0, 1, 2, 3, -1, -1]
    assert leading.cut(6).parts.is_plain


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5), st.data())
def test_a_cut_wider_than_its_tree_takes_the_first_channels_as_they_are(
    leaves: int, behind: int, seed: int, data: st.DataObject
) -> None:
    splits = np.random.default_rng(seed).permutation(leaves - 1) + 1
    tree = NestedTree(np.random.default_rng(seed).permutation(leaves + behind), splits)
    size = data.draw(st.integers(1, leaves + behind))
    parts = tree.cut(size).parts
    assert len(parts) == size
    assert parts.starts[0] == 0
    assert parts.stops[-1] == max(size, leaves)
    assert parts.is_plain == (size >= leaves)
    assert np.array_equal(parts.starts[1:], parts.stops[:-1])


def test_a_leading_tree_covers_the_most_important_rows() -> None:
    rows = np.array([[0.1], [-5.0], [4.9], [1.0], [-4.0]])
    tree = leading_tree(rows, 3)
    assert set(tree.order[:3]) == {1, 2, 4}
    assert tree.order[3:].tolist() == [3, 0]
    halves = [set(part) for part in np.split(tree.order[:3], tree.cut(2).parts.starts[1:])]
    assert sorted(map(sorted, halves)) == [[1, 4], [2]]
    assert leading_tree(rows, 1).order.tolist() == [1, 2, 4, 3, 0]
    assert np.array_equal(leading_tree(rows, 5).order, ward_tree(rows).order)


def test_ward_merges_the_closest_rows_first() -> None:
    tree = ward_tree(np.array([[0.0], [10.0], [0.1], [10.3], [50.0]]))
    together = [set(part) for part in np.split(tree.order, tree.cut(3).parts.starts[1:])]
    assert sorted(map(sorted, together)) == [[0, 2], [1, 3], [4]]


def test_the_leaf_order_cut_is_the_clustering_of_scipy() -> None:
    from scipy.cluster.hierarchy import fcluster, linkage

    rows = np.random.default_rng(0).standard_normal((30, 7))
    tree = ward_tree(rows)
    for size in (1, 2, 7, 19, 30):
        labels = np.empty(30, dtype=int)
        labels[tree.order] = tree.cut(size).part_of()
        expected = fcluster(linkage(rows, method="ward"), size, criterion="maxclust")
        assert len(set(zip(labels, expected, strict=True))) == size  # the same partition, differently numbered


def test_shared_clusters_are_sorted_by_cluster_then_teacher_channel() -> None:
    clusters = shared_clusters(np.random.default_rng(1).standard_normal((20, 3)), 6)
    for part in np.split(clusters.order, np.cumsum(clusters.sizes)[:-1]):
        assert part.tolist() == sorted(part)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: NestedTree(np.array([0, 0, 1]), np.array([1, 2])), "order must hold"),
        (lambda: NestedTree(np.arange(3), np.array([1, 1])), "splits must hold"),
        (lambda: NestedTree(np.arange(3), np.array([1, 3, 2])), "at most 2 boundaries, not 3"),
        (lambda: NestedTree(np.arange(4), np.array([2])), "splits must hold each of 1..1"),
        (lambda: SharedClusters(np.arange(3), np.array([1, 1])), "add up to the 3"),
        (lambda: SharedClusters(np.arange(3), np.array([3, 0])), "positive"),
        (lambda: a_tree(4).cut(5), "cannot be cut into 5"),
        (lambda: a_tree(4).cut(0), "cannot be cut into 0"),
        (lambda: SharedClusters(np.arange(4), np.array([2, 2])).cut(1), "cannot give 1"),
        (lambda: Runs(np.array([0, 2]), np.array([2, 2]), 2), "at least one channel"),
        (lambda: Runs(np.array([0, 2]), np.array([2]), 2), "one length"),
        (lambda: Runs(np.array([0, 2]), np.array([2, 4]), 3), "ends at channel 4 of 3"),
    ],
)
def test_malformed_cuts_are_refused(build: object, reason: str) -> None:
    with pytest.raises(CutError, match=reason):
        build()  # type: ignore[operator]
