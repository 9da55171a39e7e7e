"""The committed demo chain: what its frontier claims is what its served models measure."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import chains
from chains.artifact import StoredChain, dump, load
from chains.data.images import ImageSet
from chains.data.synthetic import PeopleSettings, gallery_images, query_images
from chains.onnxfile import EmitOptions, write
from chains.ranking import rank_sets
from chains.width import Width, even_ladder

PATH = Path(chains.__file__).parent / "demo" / "synthetic-r18.safetensors"


@pytest.fixture(scope="module")
def demo() -> StoredChain:
    return load(PATH)


@pytest.fixture(scope="module")
def people() -> tuple[ImageSet, ImageSet]:
    return query_images(PeopleSettings()), gallery_images(PeopleSettings())


def embed(demo: StoredChain, width: Width, images: ImageSet) -> np.ndarray:
    """Embeddings of the very file that is served, in onnxruntime."""
    session = onnxruntime.InferenceSession(write(demo, width, EmitOptions(preprocess="in-graph")))
    starts = range(0, len(images), 200)
    return np.concatenate([session.run(None, {"images": images.images[s : s + 200]})[0] for s in starts])


def test_it_is_small_calibrated_and_written_as_its_own_bytes(demo: StoredChain) -> None:
    assert demo.size_bytes <= 8_000_000
    assert set(demo.chain.statistics) == set(demo.chain.ladder)
    assert dump(demo.chain) == PATH.read_bytes()


def test_its_ladder_runs_evenly_from_a_quarter_to_the_full_width(demo: StoredChain) -> None:
    ladder = demo.chain.ladder
    assert len(ladder) >= 8
    assert ladder == even_ladder(Width(demo.chain.teacher.stem // 4), demo.chain.teacher, len(ladder))


def test_its_recorded_frontier_keeps_what_we_promise_of_it(demo: StoredChain) -> None:
    frontier = demo.chain.frontier
    assert frontier is not None
    assert not frontier.trained_after_expansion
    accuracy = [measured.map for measured in frontier.widths]
    assert accuracy[-1] >= accuracy[0] + 5
    assert all(wide >= narrow - 3 for narrow, wide in pairwise(accuracy))


def test_served_models_measure_what_the_frontier_says(demo: StoredChain, people: tuple[ImageSet, ImageSet]) -> None:
    """Narrowest, middle and full width, and the narrowest searching the full one's gallery: to half a point."""
    frontier = demo.chain.frontier
    assert frontier is not None
    queries, gallery = people
    ladder = demo.chain.ladder
    indices = (0, len(ladder) // 2, len(ladder) - 1)
    embedded = {index: (embed(demo, ladder[index], queries), embed(demo, ladder[index], gallery)) for index in indices}
    for q, g in (*((i, i) for i in indices), (indices[0], indices[-1])):
        ranking = rank_sets(embedded[q][0], embedded[g][1], queries, gallery)
        assert ranking.map == pytest.approx(frontier.cross_map[q][g], abs=0.5)
