"""The synthetic people are the data set of everything else, so what is checked here is that they stay what they are."""

import hashlib
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from chains.data.images import ImageSet
from chains.data.synthetic import (
    STATION,
    PeopleSettings,
    gallery_images,
    query_images,
    render,
    stream,
    train_images,
    write_market1501,
)
from chains.data.synthetic.canvas import profile
from chains.data.synthetic.choices import Person, Shot
from chains.data.synthetic.framing import Crop, paint_occluders
from chains.data.synthetic.materials import BACKGROUND, FRONT, FRONT_2
from chains.data.synthetic.painting import paint
from chains.errors import DataError

SMALL = replace(
    PeopleSettings(),
    train_identities=6,
    train_images_per_identity=3,
    test_identities=5,
    queries_per_identity=2,
    gallery_images_per_identity=4,
)


def tiny_set(n=3):
    return ImageSet(np.zeros((n, 8, 4, 3), np.uint8), np.arange(n), np.ones(n, np.int64))


def test_the_same_numbers_give_the_same_pixels():
    first, second = (render(SMALL, [1, 2, 9], [1, 4, 2], [0, 0, 7]) for _ in range(2))
    assert np.array_equal(first, second)


def test_an_image_does_not_depend_on_its_batch():
    pids, camids, shots = np.arange(1, 41), np.arange(40) % 6 + 1, np.arange(40) % 5
    together = render(SMALL, pids, camids, shots)
    for i in (0, 17, 33, 39):
        assert np.array_equal(render(SMALL, pids[i], camids[i], shots[i])[0], together[i])
    assert np.array_equal(render(SMALL, pids[::-1], camids[::-1], shots[::-1]), together[::-1])


def test_the_number_of_training_people_changes_neither_them_nor_the_test():
    fewer = replace(SMALL, train_identities=2)
    assert np.array_equal(train_images(fewer).images, train_images(SMALL).images[:6])
    assert np.array_equal(query_images(fewer).images, query_images(SMALL).images)


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        (PeopleSettings(), "6fa2bbb862a63cc837260c805b4fb4c67f5dbd8f1845432642b52310a8500032"),
        (STATION, "1d3467c25c14ce291674bfb070243c94d5db1ed63cb16f2f10be3dee64d68919"),
        (
            replace(PeopleSettings(), height=64, width=32),
            "956fe9a79086cd55cc906a0793f83b20c69f05ba39ddd4f5abf410f030604956",
        ),
    ],
    ids=["default", "station", "half the size"],
)
def test_pixels_are_the_same_on_every_machine(settings, digest):
    """A golden digest: if it changes, every number measured on this data set has to be measured again."""
    images = render(settings, np.arange(1, 25), np.arange(24) % 6 + 1, np.arange(24) % 3)
    assert hashlib.sha256(images.tobytes()).hexdigest() == digest


def test_outlines_are_straight_lines_between_their_knots():
    values = (np.array([0, 10]), np.array([8, 10]))
    lines = profile(slice(0, 5), (0, 4), values)
    assert lines[..., 0].tolist() == [[0, 2, 4, 6, 8], [10, 10, 10, 10, 10]]


def test_every_choice_changes_the_picture():
    plain = render(SMALL, [1], [1], [0])
    for other in ([2], [1], [0]), ([1], [2], [0]), ([1], [1], [1]):
        assert not np.array_equal(render(SMALL, *other), plain)
    assert not np.array_equal(render(replace(SMALL, seed=1), [1], [1], [0]), plain)


def test_sets_have_the_promised_sizes_and_the_asked_picture_size():
    train, query, gallery = train_images(SMALL), query_images(SMALL), gallery_images(SMALL)
    assert (len(train), len(query), len(gallery)) == (6 * 3, 5 * 2, 5 * 4)
    assert train.images.shape[1:] == (128, 64, 3)
    assert render(replace(SMALL, height=256, width=128), [1], [1], [0]).shape == (1, 256, 128, 3)


def test_default_test_set_is_quick_to_embed_and_pids_have_four_digits():
    for settings in (PeopleSettings(), STATION):
        assert settings.test_identities * settings.queries_per_identity <= 400
        assert settings.test_identities * settings.gallery_images_per_identity <= 2000
        assert query_images(replace(settings, height=16, width=8)).pids.max() < 10000


def test_test_people_and_their_families_are_unknown_to_training():
    train, test = train_images(SMALL).pids, query_images(SMALL).pids
    assert not np.intersect1d(train, test).size
    assert np.array_equal(np.unique(test), np.unique(gallery_images(SMALL).pids))
    keys = [Person.of(SMALL, pids).family for pids in (np.arange(1, 5001), np.arange(5001, 10000))]
    assert not np.intersect1d(*keys).size


@pytest.mark.parametrize(("cameras", "gallery"), [(2, 2), (3, 2), (6, 3), (6, 8), (7, 5)])
def test_every_query_has_an_answer_at_another_camera(cameras, gallery):
    settings = replace(SMALL, cameras=cameras, gallery_images_per_identity=gallery, height=16, width=8)
    query, answers = query_images(settings), gallery_images(settings)
    for pid, camid in zip(query.pids, query.camids, strict=True):
        assert ((answers.pids == pid) & (answers.camids != camid)).any()


def test_no_image_is_both_query_and_gallery():
    query, gallery = query_images(SMALL), gallery_images(SMALL)
    assert not (query.images[:, None] == gallery.images[None]).all(axis=(2, 3, 4)).any()


def test_a_person_is_seen_by_several_cameras():
    train = train_images(SMALL)
    for pid in np.unique(train.pids):
        assert len(np.unique(train.camids[train.pids == pid])) == 3
    assert set(gallery_images(SMALL).camids) == set(range(1, 7))


def test_streaming_in_pieces_gives_the_whole_set():
    pieces = list(stream(SMALL, "train", chunk=7))
    whole = train_images(SMALL)
    assert [len(piece) for piece in pieces] == [7, 7, 4]
    for name in ("images", "pids", "camids"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in pieces]), getattr(whole, name))


def person_pixels(settings, count=48):
    """Which doubled pixels show the person, before and after occluders. Two masks (n, 256, 128)"""
    pids, camids, shots = np.arange(1, count + 1), np.arange(count) % 6 + 1, np.zeros(count, np.int64)
    person = Person.of(settings, pids)
    shot = Shot.of(settings, pids, camids, shots)
    canvas, crop = paint(person, shot), Crop.of(shot)
    material, shade = crop.look(canvas.material), crop.look(canvas.shade)
    before = material != BACKGROUND
    paint_occluders(material, shade, shot)
    hidden = (material == FRONT) | (material == FRONT_2)
    return before, before & ~hidden


def test_occluders_never_hide_a_person_completely():
    before, after = person_pixels(replace(SMALL, occlusion_percent=100))
    share = after.sum(axis=(1, 2)) / before.sum(axis=(1, 2))
    assert share.min() > 0.35
    assert share.min() < 0.85 < share.max()


def test_people_fill_a_fair_part_of_the_crop():
    before, after = person_pixels(replace(SMALL, occlusion_percent=0))
    assert np.array_equal(before, after)
    assert before.mean(axis=(1, 2)).min() > 0.15


def test_no_figure_touches_the_edge_of_its_canvas_because_a_crop_repeats_that_edge():
    settings = replace(SMALL, detail_percent=100)
    pids, ones = np.arange(1, 201), np.ones(200, np.int64)
    material = paint(Person.of(settings, pids), Shot.of(settings, pids, ones, ones)).material
    edges = material[:, [0, -1]], material[:, :, [0, -1]]
    assert all((edge == BACKGROUND).all() for edge in edges)


def test_background_does_not_tell_who_is_in_front_of_it():
    """Where neither picture shows a person, two people at the same camera differ as much as one person does."""
    settings = replace(SMALL, occlusion_percent=0)
    corner = render(settings, np.repeat([1, 2], 40), np.ones(80), np.tile(np.arange(40), 2))[:, :20, :12]
    means = corner.mean(axis=(1, 2, 3)).reshape(2, 40)
    assert abs(means[0].mean() - means[1].mean()) < 2 * means.std() / np.sqrt(20)


def test_look_alikes_differ_less_than_strangers():
    settings = replace(SMALL, family_size=4)
    people = Person.of(settings, np.arange(1, 401))
    picks = np.stack([people.pick(50, f"attribute {k}").ravel() for k in range(40)], axis=1)
    family = (picks[0::4] == picks[1::4]).mean()
    strangers = (picks[0:-4] == picks[4:]).mean()
    assert 0.3 < family < 0.8
    assert strangers < 0.1


def test_a_family_that_redraws_nothing_wears_the_same():
    people = Person.of(replace(SMALL, family_change_percent=0), np.arange(1, 9))
    assert len(np.unique(people.pick(1000, "hat").reshape(2, 4), axis=1)[0]) == 1


def test_market_folders_read_back_as_the_sets(tmp_path):
    write_market1501(tmp_path, SMALL)
    for name, images in (
        ("bounding_box_train", train_images(SMALL)),
        ("query", query_images(SMALL)),
        ("bounding_box_test", gallery_images(SMALL)),
    ):
        files = sorted((tmp_path / name).iterdir(), key=lambda path: path.name.split("_")[2])
        labels = [re.fullmatch(r"(\d{4})_c(\d+)s1_\d{6}_\d\d\.jpg", path.name).groups() for path in files]
        assert np.array_equal(np.array(labels, np.int64), np.stack([images.pids, images.camids], axis=1))
        pixels = np.asarray(Image.open(files[0]), np.int64)
        assert np.abs(pixels - images.images[0]).mean() < 6


def test_file_names_sort_like_the_set_so_that_readers_agree_on_the_order(tmp_path):
    write_market1501(tmp_path, replace(SMALL, height=16, width=8))
    names = sorted(path.name for path in (tmp_path / "bounding_box_train").iterdir())
    assert [int(name[:4]) for name in names] == train_images(SMALL).pids.tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cameras": 1}, "cameras must be an integer from 2"),
        ({"gallery_images_per_identity": 1}, "gallery_images_per_identity"),
        ({"train_identities": 5001}, "train_identities must be an integer from 1 to 5000"),
        ({"blur_percent": 101}, "blur_percent must be an integer from 0 to 100"),
        ({"seed": -1}, "seed"),
        ({"height": 4}, "height"),
        ({"family_size": 2.5}, "family_size"),
        ({"cameras": True}, "cameras"),
    ],
)
def test_settings_that_cannot_be_rendered_are_refused(change, words):
    with pytest.raises(DataError, match=words):
        replace(SMALL, **change)


def test_render_refuses_arrays_that_do_not_match():
    with pytest.raises(DataError, match="equally long"):
        render(SMALL, [1, 2], [1], [0])
    with pytest.raises(DataError, match="pids must lie in 1"):
        render(SMALL, [0], [1], [0])
    with pytest.raises(DataError, match="camids"):
        render(SMALL, [1], [7], [0])


def test_streaming_an_unknown_split_names_the_known_ones():
    with pytest.raises(DataError, match="'gallery', 'query', 'train'"):
        next(stream(SMALL, "valid"))


def test_rendering_nothing_gives_an_empty_array():
    assert render(SMALL, [], [], []).shape == (0, 128, 64, 3)


def test_image_set_refuses_arrays_that_do_not_belong_together():
    good = tiny_set()
    with pytest.raises(DataError, match="images must be uint8"):
        ImageSet(good.images.astype(np.float32), good.pids, good.camids)
    with pytest.raises(DataError, match=r"pids must be int64 of shape \(3,\)"):
        ImageSet(good.images, good.pids[:2], good.camids)
    with pytest.raises(DataError, match="camids must be int64"):
        ImageSet(good.images, good.pids, good.camids.astype(np.int32))


def test_taking_indices_keeps_images_and_labels_together():
    taken = train_images(SMALL).take([5, 0, 5])
    assert len(taken) == 3
    assert np.array_equal(taken.images[0], taken.images[2])
    assert taken.pids[0] == taken.pids[2] != taken.pids[1]
    with pytest.raises(DataError, match="position 3 is outside a set of 3 images"):
        tiny_set().take([0, 3])


def test_importing_the_renderer_needs_numpy_only():
    code = (
        "import sys, chains.data.synthetic\n"
        "heavy = {'torch', 'scipy', 'PIL', 'onnx'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
