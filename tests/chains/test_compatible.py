"""Compatibility over time: centroids, the loss, what is refused, and a gallery that stays searchable."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chains.artifact import StoredChain, dump, load
from chains.calibrate import calibrate
from chains.chain import Chain
from chains.compatible import (
    Anchor,
    AnchorLoss,
    Compatibility,
    anchor_in,
    centroids_of,
    common_embeddings,
    compatibility_of,
    joined_space,
    measure_compatibility,
    rival_width,
)
from chains.cost import count_macs
from chains.data.batches import BatchRecipe
from chains.data.images import ImageSet
from chains.errors import ChainMismatch, DataError, NotCalibrated
from chains.evaluate import embed
from chains.losses import LossRecipe, ReIDLoss, backward_compatible_loss
from chains.model import ReIDModel, numpy_tensors
from chains.nested import NestedRecipe, Sandwich
from chains.ranking import rank_sets
from chains.refine import Refined, refine
from chains.testing import pico_chain
from chains.train import Alone, Trained, TrainRecipe, new_classifier, train_alone
from chains.tree import grow_trees
from chains.width import Width
from tests.chains.toys import INPUT, LADDER, RECIPE, a_teacher, flat_people

IMAGES = torch.randn(8, 3, 32, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8)


def an_anchor(pids: int = 8, dim: int = 32, weight: float = 1.0) -> Anchor:
    centroids = np.random.default_rng(0).standard_normal((pids, dim)).astype(np.float32)
    return Anchor(centroids, "old", "d" * 64, "es-old", weight)


def a_chain(refined: Refined, images: ImageSet) -> Chain:
    chain = refined.chain(
        name="toy", architecture="resnet18", ladder=LADDER, teacher=Width(4), input=INPUT, license="Apache-2.0",
        provenance={"made_by": "a test"},
    )  # fmt: skip
    return calibrate(chain, images)


def alone(anchor: Anchor | None) -> Alone:
    torch.manual_seed(0)
    model = ReIDModel("resnet18", Width(4))
    loss = ReIDLoss(8, 32, LossRecipe(), torch.Generator())
    return Alone(model, new_classifier(flat_people(), 32), loss, compatible=anchor)


def sandwich(anchor: Anchor | None) -> Sandwich:
    teacher = a_teacher()
    trees = grow_trees(teacher.model.table, numpy_tensors(teacher.model))
    return Sandwich(teacher, trees, LADDER, NestedRecipe(), 0, anchor)


# --- centroids and loss, by hand


def test_a_centroid_is_the_mean_direction_of_an_identity() -> None:
    """Lengths do not count: (0, 3) and (4, 0) weigh the same. Rows follow the pids, 2 before 7."""
    embeddings = np.array([[0, 3], [0, -5], [4, 0]], np.float32)
    root = np.sqrt(0.5)
    np.testing.assert_allclose(centroids_of(embeddings, np.array([7, 2, 7])), [[0, -1], [root, root]], atol=1e-6)


def test_backward_compatible_loss_by_hand() -> None:
    """Cosines 1 and 0 with the centroids, then 0.6 and 0.8; the right ones are the first and the second; scale 10."""
    centroids, embeddings = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[5.0, 0.0], [3.0, 4.0]])
    by_hand = (np.log(np.exp(10) + np.exp(0)) - 10 + np.log(np.exp(6) + np.exp(8)) - 8) / 2
    loss = backward_compatible_loss(embeddings, centroids, torch.tensor([0, 1]), 10.0)
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def test_no_gradient_reaches_the_centroids() -> None:
    centroids, embedding = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5, requires_grad=True)
    backward_compatible_loss(embedding, centroids, LABELS, 30.0).backward()
    assert centroids.grad is None
    assert embedding.grad is not None


@pytest.mark.parametrize("make", [alone, sandwich])
def test_an_anchor_is_neither_trained_nor_checkpointed_but_decides_the_run(make) -> None:  # type: ignore[no-untyped-def]
    anchor = an_anchor()
    before = anchor.centroids.copy()
    with_anchor, without = make(anchor), make(None)
    assert with_anchor.state_dict().keys() == without.state_dict().keys()
    assert not [name for name, _ in with_anchor.named_buffers() if "anchor" in name]
    optimiser = torch.optim.SGD(with_anchor.parameters(), 0.1)
    sum(with_anchor(IMAGES, LABELS, 0).values()).backward()
    optimiser.step()
    assert np.array_equal(anchor.centroids, before)
    others = (None, replace(anchor, weight=2.0), replace(anchor, scale=9.0), replace(anchor, digest="e" * 64))
    assert all(make(other).settings() != with_anchor.settings() for other in others)


def test_a_network_alone_has_the_loss_as_one_of_its_own() -> None:
    anchor = an_anchor(weight=3.0)
    losses, plain = alone(anchor)(IMAGES, LABELS, 0), alone(None)(IMAGES, LABELS, 0)
    embedding = alone(None).model.train()(IMAGES)[1]
    expected = 3 * backward_compatible_loss(embedding, torch.from_numpy(anchor.centroids), LABELS, 30.0)
    assert losses["compatible"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-5)


def test_every_pass_of_the_sandwich_meets_the_old_space_in_the_teacher_s_own_channel_order() -> None:
    anchor = an_anchor(weight=3.0)
    ours, plain = sandwich(anchor), sandwich(None)
    order = plain.partitions["layer4"].order
    assert list(order) != sorted(order)
    differences = {name: loss - plain(IMAGES, LABELS, 0)[name] for name, loss in ours(IMAGES, LABELS, 0).items()}
    for name, width in (("full", LADDER[2]), ("narrowest", LADDER[0]), ("between", LADDER[1])):
        in_teacher_order = torch.empty(8, 32)
        in_teacher_order[:, order] = plain.run(width, IMAGES).lifted
        expected = 3 * backward_compatible_loss(in_teacher_order, torch.from_numpy(anchor.centroids), LABELS, 30.0)
        assert differences[name].item() == pytest.approx(expected.item(), rel=1e-3)


# --- from an old chain to a new one


EACH = 28
PEOPLE = flat_people(12, EACH)
NUMBER = np.tile(np.arange(EACH), 12)
TRAIN, QUERY, GALLERY = (PEOPLE.take(np.flatnonzero(some)) for some in (NUMBER < 24, NUMBER == 24, NUMBER > 24))
QUERY.camids[:] = 2
A_MEASURE = Compatibility(
    old_map=60.0, old_gallery_new_query_map=60.0, new_map=70.0, old_gallery_narrowest_query_map=50.0
)


def longer(steps: int) -> TrainRecipe:
    return TrainRecipe(steps, lr=3e-3, warmup_steps=3, batch=BatchRecipe(8, 2, pad=0))


@pytest.fixture(scope="module")
def old() -> StoredChain:
    teacher = train_alone("resnet18", Width(4), TRAIN, INPUT, longer(40), 0)
    return load(dump(a_chain(refine(teacher, LADDER, TRAIN, INPUT, longer(10), 0), TRAIN)))


@pytest.fixture(scope="module")
def independent() -> Trained:
    return train_alone("resnet18", Width(4), TRAIN, INPUT, longer(60), 1)


def test_an_anchor_holds_the_full_width_s_centroids_in_the_common_space(old: StoredChain) -> None:
    anchor = anchor_in(old, TRAIN, 32, weight=2.0)
    assert (anchor.digest, anchor.embedding_space) == (old.digest, old.chain.embedding_space)
    assert anchor.centroids.shape == (12, 32)
    embeddings = common_embeddings(old.chain, Width(4), TRAIN)
    normalised = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    mean = normalised[TRAIN.pids == 5].mean(axis=0)
    np.testing.assert_allclose(anchor.centroids[5], mean / np.linalg.norm(mean), atol=1e-5)


def test_a_compatible_teacher_s_queries_search_the_old_gallery(old: StoredChain, independent: Trained) -> None:
    gallery = common_embeddings(old.chain, Width(4), GALLERY)
    compatible = train_alone(
        "resnet18", Width(4), TRAIN, INPUT, longer(60), 1, compatible=anchor_in(old, TRAIN, 32)
    )  # fmt: skip
    ours, theirs = (
        rank_sets(embed(trained.model, QUERY, INPUT), gallery, QUERY, GALLERY).map
        for trained in (compatible, independent)
    )
    assert ours > theirs + 30


def test_every_width_of_a_compatible_chain_searches_the_old_gallery(old: StoredChain, independent: Trained) -> None:
    """The teacher knows nothing of the old space here: refinement alone brings its chain there."""
    anchor = anchor_in(old, TRAIN, 32)
    ours, theirs = (
        measure_compatibility(
            old.chain,
            a_chain(refine(independent, LADDER, TRAIN, INPUT, longer(40), 1, compatible=wanted), TRAIN),
            QUERY,
            GALLERY,
        )
        for wanted in (anchor, None)
    )
    assert ours.old_map == theirs.old_map > 80
    assert ours.old_gallery_new_query_map > theirs.old_gallery_new_query_map + 30
    assert ours.old_gallery_narrowest_query_map > theirs.old_gallery_narrowest_query_map + 15


def test_a_chain_measured_against_itself_loses_nothing(old: StoredChain) -> None:
    measured = measure_compatibility(old.chain, old.chain, QUERY, GALLERY)
    assert measured.old_map == measured.old_gallery_new_query_map == measured.new_map
    narrowest = common_embeddings(old.chain, LADDER[0], QUERY), common_embeddings(old.chain, Width(4), GALLERY)
    assert measured.old_gallery_narrowest_query_map == round(rank_sets(*narrowest, QUERY, GALLERY).map, 2)
    assert measured.is_met


def test_queries_of_a_narrower_width_may_be_what_is_to_be_matched(old: StoredChain) -> None:
    measured = measure_compatibility(old.chain, old.chain, QUERY, GALLERY, LADDER[0])
    assert measured.old_map == measured.old_gallery_narrowest_query_map < measured.new_map
    record = compatibility_of(joined_space(pico_chain(), an_anchor(), measured))
    assert record is not None
    assert record["old_width"] == str(LADDER[0])
    assert "old_width" not in (compatibility_of(joined_space(pico_chain(), an_anchor(), A_MEASURE)) or {})


def test_the_width_to_be_matched_costs_no_more_than_the_model(old: StoredChain) -> None:
    costs = [count_macs(old.chain.table, width, INPUT) for width in old.chain.ladder]
    assert rival_width(old.chain, costs[1]) == rival_width(old.chain, costs[2] - 1) == old.chain.ladder[1]
    assert rival_width(old.chain, costs[-1]) == old.chain.teacher
    assert rival_width(old.chain, costs[0] - 1) == old.chain.ladder[0]


# --- which space the new chain is in


@pytest.mark.parametrize(("across", "space"), [(60.0, "es-old"), (59.99, "pico-0")])
def test_a_chain_keeps_the_old_space_only_where_new_queries_find_no_less(across: float, space: str) -> None:
    measured = replace(A_MEASURE, old_gallery_new_query_map=across)
    chain = load(dump(joined_space(pico_chain(), an_anchor(), measured))).chain
    record = compatibility_of(chain)
    assert record is not None
    assert chain.embedding_space == space
    assert record["is_met"] == (space == "es-old")
    assert (record["chain"], record["chain_digest"], record["embedding_space"]) == ("old", "d" * 64, "es-old")
    assert (record["old_map"], record["old_gallery_new_query_map"], record["new_map"]) == (60.0, across, 70.0)
    assert chain.provenance["made_by"] == "chains.testing.pico_chain"


def test_native_embeddings_never_share_a_space_across_trainings() -> None:
    plain = pico_chain()
    kept = joined_space(plain, an_anchor(), Compatibility(60.0, 60.0, 70.0, 50.0))
    assert kept.embedding_space == "es-old"
    assert kept.native_space(Width(3)) == plain.native_space(Width(3)) == "pico-0/native-3x2-4-8"
    assert compatibility_of(plain) is None


# --- refusals


def test_an_old_chain_of_other_dimensions_is_refused() -> None:
    old = load(dump(pico_chain(height=32, width=16)))
    with pytest.raises(ChainMismatch, match="'pico' embeds into 64 numbers, the new teacher into 32"):
        anchor_in(old, flat_people(), 32)


def test_an_old_chain_that_sees_other_images_is_refused() -> None:
    old = load(dump(pico_chain(stem=4, rungs=3, height=64, width=32)))
    with pytest.raises(DataError, match=r"sees images of 64x32 pixels \(height x width\), these are 32x16"):
        anchor_in(old, flat_people(), 32)


def test_an_old_chain_without_statistics_at_full_width_is_refused() -> None:
    old = load(dump(replace(pico_chain(stem=4, rungs=3), statistics={}, frontier=None)))
    with pytest.raises(NotCalibrated, match="width 4x2-4-8 of chain 'pico' has no normalisation statistics"):
        anchor_in(old, flat_people(), 32)


def test_centroids_of_other_identities_are_refused_before_training() -> None:
    with pytest.raises(ChainMismatch, match=r"centroids of chain 'old' are \(9, 32\) .* to be trained \(8, 32\)"):
        refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0, compatible=an_anchor(9))
    with pytest.raises(ChainMismatch, match=r"\(8, 16\)"):
        AnchorLoss(an_anchor(dim=16), (8, 32))


def test_the_paper_s_mode_knows_no_old_space() -> None:
    with pytest.raises(DataError, match="mode 'oskt' is the paper's and knows no old space"):
        refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0, mode="oskt", compatible=an_anchor())


@pytest.mark.parametrize("values", [{"weight": 0.0}, {"scale": -1.0}], ids=str)
def test_an_anchor_weighs_something(values: dict[str, float]) -> None:
    with pytest.raises(DataError, match="must be above 0"):
        replace(an_anchor(), **values)
