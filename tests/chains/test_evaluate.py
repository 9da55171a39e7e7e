"""Calibration and evaluation at toy size: that they do what they say, in both modes."""

import csv
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from chains.calibrate import BATCH, calibrate
from chains.chain import Chain, Mode
from chains.data.images import UNKNOWN_CAMERA, ImageSet
from chains.errors import DataError
from chains.evaluate import PROTOCOL, embed, evaluate_model, measure_frontier, protocol
from chains.expand import student
from chains.model import load_student, normalise
from chains.ranking import rank_sets
from chains.rerank import Reranking
from chains.testing import pico_chain, with_own_norms
from chains.width import Width
from tests.chains.toys import INPUT, flat_people

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
ENOUGH = 64  # identities of four images: one batch of calibration


def a_chain(mode: Mode = "nested") -> Chain:
    """Random weights, not calibrated, not measured."""
    chain = pico_chain(mode=mode, stem=4, narrowest=2, rungs=3)
    return replace(chain, input=INPUT, statistics={}, frontier=None)


def test_calibrated_statistics_are_those_of_the_student_s_own_activations() -> None:
    people = flat_people(ENOUGH)
    chain = calibrate(a_chain(), people)
    assert set(chain.statistics) == set(chain.ladder)
    for width in chain.ladder:
        embeddings, neck = embed(load_student(chain, width), people, INPUT), load_student(chain, width).neck
        np.testing.assert_allclose(embeddings.mean(axis=0), neck.bias.detach(), atol=0.02)
        # torch's running variance has n - 1 below, numpy's n
        np.testing.assert_allclose(embeddings.std(axis=0), neck.weight.detach().abs(), rtol=0.05)


@pytest.mark.parametrize("device", ["tpu", pytest.param("cuda", marks=NO_GPU)])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(DataError, match="device"):
        calibrate(a_chain(), flat_people(ENOUGH), device)
    with pytest.raises(DataError, match="device"):
        measure_frontier(pico_chain(), *queries_and_gallery(), "flat colours", seed=0, device=device)


def test_calibration_measures_a_width_with_the_norms_it_is_served_with() -> None:
    people = flat_people(ENOUGH)
    chain = calibrate(with_own_norms(a_chain()), people)
    width = chain.ladder[0]
    embeddings = embed(load_student(chain, width), people, INPUT)
    np.testing.assert_allclose(embeddings.std(axis=0), chain.own_norms[width]["neck.weight"], rtol=0.05)


def test_calibration_averages_over_all_batches() -> None:
    people = flat_people(identities=2 * BATCH // 4)
    chain = calibrate(a_chain(), people)
    width = chain.ladder[1]
    weight = torch.from_numpy(student(chain, width)["conv1.weight"])
    maps = torch.nn.functional.conv2d(normalise(people.images, INPUT), weight, stride=2, padding=3)
    expected = maps.mean(dim=(0, 2, 3)).numpy()
    np.testing.assert_allclose(chain.statistics[width]["bn1.running_mean"], expected, atol=1e-4)


def test_a_recalibrated_chain_has_no_frontier_until_it_is_measured_again() -> None:
    measured = replace(a_chain(), frontier=pico_chain(stem=4, narrowest=2, rungs=3).frontier)
    assert measured.frontier is not None
    assert calibrate(measured, flat_people(ENOUGH)).frontier is None


def test_calibration_on_too_few_images_is_refused() -> None:
    with pytest.raises(DataError, match=f"32 images are too few .* {BATCH}"):
        calibrate(a_chain(), flat_people(identities=8))


@pytest.fixture(scope="module", params=["nested", "oskt"])
def chain(request: pytest.FixtureRequest) -> Chain:
    return calibrate(a_chain(request.param), flat_people(ENOUGH))


def queries_and_gallery(identities: int = 64) -> tuple[ImageSet, ImageSet]:
    """One query an identity, of camera 0; a gallery of both cameras."""
    people = flat_people(identities)
    return people.take(np.arange(0, len(people), 4)), people.take(np.flatnonzero(np.arange(len(people)) % 4))


def test_a_frontier_measures_every_width_and_every_pair(chain: Chain) -> None:
    frontier = measure_frontier(chain, *queries_and_gallery(), "flat colours", seed=0)
    assert tuple(measured.width for measured in frontier.widths) == chain.ladder
    for index, measured in enumerate(frontier.widths):
        assert frontier.cross_map[index][index] == measured.map
        assert measured.map_ci95[0] <= measured.map <= measured.map_ci95[1]
        assert measured.minp is not None
        assert 0 < measured.minp <= measured.map
    assert (frontier.queries, frontier.gallery, frontier.protocol) == (64, 192, PROTOCOL)
    assert not frontier.trained_after_expansion


def lifted(chain: Chain, width: Width, images: ImageSet) -> np.ndarray:
    """Unit vectors in the common space, float64."""
    common = embed(load_student(chain, width), images, INPUT)[:, chain.lift(width)].astype(np.float64)
    return np.asarray(common / np.linalg.norm(common, axis=1, keepdims=True))


def test_cut_offs_of_every_pair_of_widths_keep_their_rate_on_its_cosines(chain: Chain) -> None:
    queries, gallery = queries_and_gallery()
    frontier = measure_frontier(chain, queries, gallery, "flat colours", seed=0)
    assert [at_rate.false_accept_rate for at_rate in frontier.thresholds] == [1e-2, 1e-3]
    same_pid = queries.pids[:, None] == gallery.pids[None]
    genuine = same_pid & (queries.camids[:, None] != gallery.camids[None])
    for at_rate in frontier.thresholds:
        for q, g in product(range(3), range(3)):
            cosines = lifted(chain, chain.ladder[q], queries) @ lifted(chain, chain.ladder[g], gallery).T
            threshold = at_rate.matrix[q][g]
            assert threshold is not None
            accepted = np.mean(cosines[~same_pid] >= threshold.cosine)
            allowed = at_rate.false_accept_rate + 2 / (~same_pid).sum()  # float32 may move a pair across
            assert accepted <= allowed
            assert np.mean(cosines[~same_pid] >= threshold.cosine - 0.0002) > at_rate.false_accept_rate
            share = 100 * np.mean(cosines[genuine] >= threshold.cosine)
            assert threshold.true_accept == pytest.approx(share, abs=1.0)


def test_a_set_too_small_to_show_a_rate_has_no_cut_off_for_it() -> None:
    chain = calibrate(a_chain(), flat_people(ENOUGH))
    frontier = measure_frontier(chain, *queries_and_gallery(identities=8), "flat colours", seed=0)
    hundredth, thousandth = frontier.thresholds  # 8 × 21 pairs of different people
    assert all(threshold is not None for row in hundredth.matrix for threshold in row)
    assert all(threshold is None for row in thousandth.matrix for threshold in row)


class OnDemand:
    """A set that hands out pixels by position and has no array to look at, as one on disk."""

    def __init__(self, held: ImageSet) -> None:
        self._held = held
        self.pids, self.camids, self.size = held.pids, held.camids, held.size
        self.largest_request = 0

    def __len__(self) -> int:
        return len(self.pids)

    def pixels(self, indices: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        self.largest_request = max(self.largest_request, np.size(indices))
        return self._held.pixels(indices)

    def take(self, indices: npt.ArrayLike) -> "OnDemand":
        return OnDemand(self._held.take(indices))


def test_images_on_demand_are_calibrated_and_measured_as_those_in_memory() -> None:
    people, (queries, gallery) = flat_people(160), queries_and_gallery(160)
    on_demand = [OnDemand(images) for images in (people, queries, gallery)]
    held, lazy = calibrate(a_chain(), people), calibrate(a_chain(), on_demand[0])
    expected = measure_frontier(held, queries, gallery, "flat colours", seed=0)
    assert measure_frontier(lazy, on_demand[1], on_demand[2], "flat colours", seed=0) == expected
    assert [images.largest_request for images in on_demand] == [256, 160, 256]


def test_the_protocol_says_when_cameras_are_unknown() -> None:
    queries, gallery = queries_and_gallery()
    unknown = replace(gallery, camids=np.where(np.arange(len(gallery)) < 5, UNKNOWN_CAMERA, gallery.camids))
    assert protocol(queries, gallery) == PROTOCOL
    assert "the camera of 5 of 192 gallery images is unknown" in protocol(queries, unknown)
    assert "64 of 64 query images" in protocol(replace(queries, camids=np.full(64, UNKNOWN_CAMERA)), gallery)


def test_without_cameras_every_image_of_the_identity_is_a_match() -> None:
    chain = calibrate(a_chain(), flat_people(ENOUGH))
    queries, gallery = queries_and_gallery()
    nowhere = [replace(images, camids=np.full(len(images), UNKNOWN_CAMERA)) for images in (queries, gallery)]
    one_camera = [replace(images, camids=np.zeros(len(images), np.int64)) for images in (queries, gallery)]
    assert measure_frontier(chain, *nowhere, "no cameras", seed=0).widths[0].map > 0
    with pytest.raises(DataError, match="nothing can be measured"):
        measure_frontier(chain, *one_camera, "one camera", seed=0)


def test_a_frontier_of_re_ranked_lists_says_so_and_keeps_its_cut_offs() -> None:
    chain = calibrate(a_chain(), flat_people(ENOUGH))
    queries, gallery = queries_and_gallery()
    plain, reranked = (
        measure_frontier(chain, queries, gallery, "flat colours", 0, how) for how in (None, Reranking(k1=4, k2=2))
    )
    assert reranked.protocol == f"{PROTOCOL}; k-reciprocal re-ranking, k1 4, k2 2, lambda 0.3"
    assert reranked.thresholds == plain.thresholds
    assert reranked.cross_map != plain.cross_map


def test_one_model_is_measured_in_its_native_space() -> None:
    chain = calibrate(a_chain(), flat_people(ENOUGH))
    queries, gallery = queries_and_gallery()
    model = load_student(chain, chain.ladder[0])
    embedded = [embed(model, images, INPUT) for images in (queries, gallery)]
    ranking = evaluate_model(model, queries, gallery, INPUT)
    assert ranking.map == rank_sets(*embedded, queries, gallery).map
    assert evaluate_model(model, queries, gallery, INPUT, Reranking(k1=4, k2=2)).map != ranking.map


def test_embedding_uses_running_statistics_and_gives_the_model_back_as_it_was() -> None:
    chain = calibrate(a_chain(), flat_people(ENOUGH))
    model, images = load_student(chain, chain.ladder[0]), flat_people(4)
    expected = embed(model, images, INPUT)
    model.train()
    np.testing.assert_array_equal(embed(model, images, INPUT), expected)
    assert model.training


def test_images_of_another_size_are_refused() -> None:
    chain = calibrate(a_chain(), flat_people(ENOUGH))
    with pytest.raises(DataError, match="32x16 pixels"):
        embed(load_student(chain, chain.ladder[0]), flat_people(4), replace(INPUT, height=64))


def test_the_example_in_the_documentation_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "evaluation.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    exec(example, {})
    assert capsys.readouterr().out.strip() == example.strip().rsplit("# ", 1)[1]


def test_the_committed_costs_are_bounded_and_below_a_full_sort() -> None:
    """Over the normalised embeddings an evaluation takes a few blocks, whatever all scores would take."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "reference" / "evaluation.md").read_text()
    with (root / "benchmarks" / "results" / "evaluation.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["way"] == "rank and thresholds"]
    assert any((int(row["queries"]), int(row["gallery"])) == (10_000, 20_000) for row in rows)
    for row in rows:
        assert float(row["over_sort"]) < 0.6
        assert int(row["peak_mb"]) < int(row["embeddings_mb"]) + 80
        assert f"| {row['cpu_s']} s | {100 * float(row['over_sort']):.0f} % | {row['peak_mb']} MB |" in page
