"""Every layout of a data set, every refusal, and the report on what was read; on folders of tiny images."""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chains.data.files import ImageFiles
from chains.data.images import UNKNOWN_CAMERA, load
from chains.data.readers import DataSet, ReadOptions, detect, read
from chains.data.synthetic import PeopleSettings, gallery_images, query_images, train_images, write_market1501
from chains.data.validation import unmatched_queries, validate
from chains.errors import DataError

SMALL = ReadOptions(size=(8, 4))


def write(root: Path, names: Iterable[str], size: tuple[int, int] = (8, 4)) -> Path:
    """A tiny image for each name, each of another colour; formats follow the names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(list(name.encode())).integers(0, 256, 3)
        Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(path)
    return root


def names(images: ImageFiles) -> list[str]:
    return [path.name for path in images.paths]


def files_below(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


MARKET = (
    "bounding_box_train/0002_c1s1_000451_03.jpg",
    "bounding_box_train/0002_c2s1_000301_01.jpg",
    "bounding_box_train/0007_c3s3_077419_03.jpg",
    "query/0001_c1s1_001051_00.jpg",
    "query/0003_c4s6_015641_00.jpg",
    "bounding_box_test/0001_c2s1_009966_00.jpg",
    "bounding_box_test/0001_c1s1_001051_03.jpg",
    "bounding_box_test/0003_c6s2_000076_05.jpg",
    "bounding_box_test/0000_c1s1_000151_01.jpg",
    "bounding_box_test/-1_c1s1_000401_03.jpg",
    "bounding_box_test/-1_c2s1_000402_04.jpg",
)
MSMT17 = {
    "list_train.txt": ("0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_001_05_0303noon_0010_1.jpg 1"),
    "list_val.txt": ("0001/0001_002_12_0303noon_0011_0.jpg 1",),
    "list_query.txt": ("0000/0000_000_14_0303morning_0015_0.jpg 0",),
    "list_gallery.txt": ("0000/0000_001_03_0303morning_0020_2.jpg 0", "0001/0001_002_03_0303noon_0021_0.jpg 1"),
}
PEOPLE_FOLDERS = (
    "ben/2.png",
    "ben/10.png",
    "anna/a.jpg",
    "anna/b.jpg",
    "anna/c.jpg",
    "cleo/1.bmp",
    "dan/1.jpg",
    "dan/2.jpg",
)
VIPER = tuple(f"cam_{camera}/{pid:03}_{angle}.bmp" for pid in (0, 4, 9, 31) for camera, angle in (("a", 45), ("b", 90)))


def write_msmt17(root: Path, train: str = "train", test: str = "test") -> Path:
    for list_name, lines in MSMT17.items():
        folder = train if list_name in ("list_train.txt", "list_val.txt") else test
        write(root / folder, [line.split()[0] for line in lines])
        (root / list_name).write_text("".join(f"{line}\n" for line in lines))
    return root


def write_table(root: Path, text: str) -> Path:
    write(root, ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "c.png"))
    (root / "people.csv").write_text(text)
    return root / "people.csv"


# --- Market-1501 and CUHK03-NP


def test_market1501_names_give_identity_and_camera(tmp_path):
    people = read("market1501", write(tmp_path, MARKET), SMALL)
    assert (people.train.pids.tolist(), people.train.camids.tolist()) == ([2, 2, 7], [1, 2, 3])
    assert (people.query.pids.tolist(), people.query.camids.tolist()) == ([1, 3], [1, 4])
    assert people.train.pixels([0, 2]).shape == (2, 8, 4, 3)


def test_market1501_junk_is_dropped_and_counted_and_distractors_stay_in_the_gallery(tmp_path):
    people = read("market1501", write(tmp_path, MARKET), SMALL)
    assert people.gallery.pids.tolist() == [0, 1, 1, 3]
    assert {reason: len(paths) for reason, paths in people.left_out.items()} == {"junk, pid -1": 2}
    assert not set(people.query.pids) & {0}


def test_what_the_renderer_writes_is_read_back(tmp_path):
    settings = replace(PeopleSettings(), train_identities=3, test_identities=2)
    write_market1501(tmp_path, settings)
    people = read(None, tmp_path, ReadOptions(size=(settings.height, settings.width)))
    for images, rendered in zip(
        people.splits.values(), (train_images(settings), query_images(settings), gallery_images(settings)), strict=True
    ):
        by_name = np.lexsort((np.arange(len(rendered)), rendered.pids))
        assert np.array_equal(images.pids, rendered.pids[by_name])
        assert sorted(images.camids.tolist()) == sorted(rendered.camids.tolist())
    assert validate(people).is_usable
    close = np.abs(
        load(people.train).images.astype(int).mean(axis=(1, 2, 3)).mean() - train_images(settings).images.mean()
    )
    assert close < 2


def test_other_files_in_market1501_are_left_out_and_named(tmp_path):
    write(tmp_path, (*MARKET, "query/portrait.jpg", "query/0005_x.png"))
    (tmp_path / "query" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "query" / ".DS_Store").write_bytes(b"x")
    people = read("market1501", tmp_path, SMALL)
    left_out = {reason: [path.name for path in paths] for reason, paths in people.left_out.items()}
    assert left_out["the name does not begin like 0002_c1s1_"] == ["0005_x.png", "portrait.jpg"]
    assert left_out["not an image file by its name"] == ["Thumbs.db"]


@pytest.mark.parametrize(
    "name", ["query/0000_c1s1_000001_00.jpg", "bounding_box_train/0000_c1s1_000001_00.jpg", "query/-2_c1_1.jpg"]
)
def test_distractors_are_for_the_gallery_alone(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}: pid (0|-2) in (query|train); people are numbered from 1"):
        read("market1501", write(tmp_path, (*MARKET, name)), SMALL)


def test_a_market1501_folder_without_readable_names_is_refused(tmp_path):
    write(tmp_path, [name for name in MARKET if not name.startswith("query")] + ["query/me.jpg"])
    with pytest.raises(DataError, match=r"query: no image with a name like 0002_c1s1_000451_03\.jpg"):
        read("market1501", tmp_path)


def test_cuhk03_np_has_detected_and_labeled_boxes(tmp_path):
    for boxes, pid in (("detected", 1), ("labeled", 2)):
        folders = ("bounding_box_train/0900_c1", f"query/{pid:04}_c1", f"bounding_box_test/{pid:04}_c2")
        write(tmp_path / boxes, [f"{folder}_{number}.png" for number, folder in enumerate(folders, start=1)])
    assert detect(tmp_path).kind == "cuhk03-np"
    detected, labeled = (read(None, tmp_path, replace(SMALL, boxes=boxes)) for boxes in ("detected", "labeled"))
    assert (detected.query.pids.tolist(), labeled.query.pids.tolist()) == ([1], [2])
    assert labeled.gallery.camids.tolist() == [2]
    assert labeled.name == "CUHK03-NP, labeled boxes"


def test_cuhk03_np_without_the_asked_boxes_is_refused(tmp_path):
    write(tmp_path / "labeled", MARKET)
    with pytest.raises(DataError, match="detected: there is no such folder"):
        read("cuhk03-np", tmp_path)


# --- MSMT17


@pytest.mark.parametrize(
    ("version", "folders"), [("MSMT17 V1", ("train", "test")), ("MSMT17 V2", ("mask_train_v2", "mask_test_v2"))]
)
def test_msmt17_lists_give_identities_and_names_give_cameras(tmp_path, version, folders):
    people = read("msmt17", write_msmt17(tmp_path, *folders), SMALL)
    assert people.name == version
    assert (people.train.pids.tolist(), people.train.camids.tolist()) == ([0, 1], [1, 5])
    assert (people.query.camids.tolist(), people.gallery.camids.tolist()) == ([14], [3, 3])
    assert people.train.pixels([0]).shape == (1, 8, 4, 3)


def test_msmt17_test_people_are_not_taken_for_training_people_of_the_same_number(tmp_path):
    people = read("msmt17", write_msmt17(tmp_path), SMALL)
    assert (people.query.pids.tolist(), people.gallery.pids.tolist()) == ([2], [2, 3])
    assert validate(people).leaked_identities == 0
    assert "numbered from 2" in people.notes[0]


def test_msmt17_validation_images_are_trained_on_only_if_asked(tmp_path):
    write_msmt17(tmp_path)
    without, with_val = (read("msmt17", tmp_path, replace(SMALL, has_val_in_train=asked)) for asked in (False, True))
    assert (len(without.train), len(with_val.train)) == (2, 3)
    assert [len(paths) for paths in without.left_out.values()] == [1]
    assert with_val.train.pids.tolist() == [0, 1, 1]
    assert np.array_equal(without.query.pids, with_val.query.pids)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0000/0000_000_01_0303morning_0008_0.jpg", "line 3: .* is not like"),
        ("0000/no_number.jpg 0", "line 3: .* is not like"),
        ("0000/0000_000_01_0303morning_9999_0.jpg 0", r"line 3: there is no file .*9999_0\.jpg"),
        ("../test/0000/0000_000_14_0303morning_0015_0.jpg 0", "line 3: .* leads out of"),
    ],
)
def test_a_bad_line_of_an_msmt17_list_is_named(tmp_path, line, message):
    write_msmt17(tmp_path)
    with (tmp_path / "list_train.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=rf"list_train\.txt, {message}"):
        read("msmt17", tmp_path)


def test_msmt17_with_an_empty_list_or_without_its_folders_is_refused(tmp_path):
    (write_msmt17(tmp_path) / "list_query.txt").write_text("\n")
    with pytest.raises(DataError, match=r"list_query\.txt: the list is empty"):
        read("msmt17", tmp_path)
    (tmp_path / "train").rename(tmp_path / "training")
    with pytest.raises(DataError, match="neither folders train and test nor mask_train_v2 and mask_test_v2"):
        read("msmt17", tmp_path)


# --- VIPeR


def test_viper_trains_on_half_of_the_people_and_searches_the_other_camera(tmp_path):
    people = read("viper", write(tmp_path, VIPER), SMALL)
    assert (len(people.train), len(people.query), len(people.gallery)) == (4, 2, 2)
    assert people.query.pids.tolist() == people.gallery.pids.tolist()
    assert not set(people.train.pids) & set(people.query.pids)
    assert set(people.train.pids) | set(people.query.pids) == {0, 4, 9, 31}
    assert (set(people.query.camids), set(people.gallery.camids)) == ({1}, {2})
    assert "4 people; VIPeR as published has 632" in people.notes


def test_viper_splits_are_a_function_of_the_seed_and_serve_both_directions(tmp_path):
    write(tmp_path, VIPER)
    splits = [read("viper", tmp_path, replace(SMALL, seed=seed)).train.pids.tolist() for seed in (*range(6), 0)]
    assert splits[0] == splits[-1]
    assert len({tuple(split) for split in splits}) > 1
    there, back = (read("viper", tmp_path, replace(SMALL, query_camera=camera)) for camera in "ab")
    assert (there.query.paths, there.train.paths) == (back.gallery.paths, back.train.paths)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("cam_a/040_0.bmp", r"cam_a/040_0\.bmp: person 40 has no image from the other camera"),
        ("cam_b/009_180.bmp", r"a second image of person 9, beside 009_180\.bmp"),
    ],
)
def test_viper_needs_one_image_of_each_person_from_each_camera(tmp_path, extra, message):
    with pytest.raises(DataError, match=message):
        read("viper", write(tmp_path, (*VIPER, extra)))


# --- folders of identities


def test_a_folder_of_identities_is_split_by_identity(tmp_path):
    people = read("folder", write(tmp_path / "mine", PEOPLE_FOLDERS), SMALL)
    assert people.name == "mine"
    assert people.people == ("anna", "ben", "cleo", "dan")
    trained, tested = set(people.train.pids), set(people.gallery.pids)
    assert (len(trained), len(tested), trained & tested) == (2, 2, set())
    assert set(people.query.pids) < trained | tested
    assert {path.parent.name: int(pid) for path, pid in zip(people.train.paths, people.train.pids, strict=True)} == {
        people.people[pid]: pid for pid in trained
    }


def test_the_split_is_a_function_of_the_seed(tmp_path):
    write(tmp_path, PEOPLE_FOLDERS)
    splits = [tuple(read("folder", tmp_path, replace(SMALL, seed=seed)).train.paths) for seed in (*range(6), 0)]
    assert splits[0] == splits[-1]
    assert len(set(splits)) > 1


def test_the_first_images_are_queries_and_one_is_always_left_for_the_gallery(tmp_path):
    write(tmp_path, [f"{person}/{number}.png" for person in "ab" for number in range(4)])
    for asked, expected in ((1, ["0.png"]), (3, ["0.png", "1.png", "2.png"]), (9, ["0.png", "1.png", "2.png"])):
        people = read("folder", tmp_path, replace(SMALL, queries_per_identity=asked))
        assert names(people.query) == expected
        assert len(people.query) + len(people.gallery) == 4


def test_an_identity_with_one_image_cannot_be_queried_and_is_counted(tmp_path):
    write(tmp_path, ["a/1.png", "b/1.png", "c/1.png", "c/2.png", "d/1.png", "d/2.png"])
    for seed in range(8):
        people = read("folder", tmp_path, replace(SMALL, seed=seed))
        alone = [name for name in ("a", "b") if any(path.parent.name == name for path in people.gallery.paths)]
        assert not any(path.parent.name in ("a", "b") for path in people.query.paths)
        if not alone:
            continue
        assert (
            f"{len(alone)} test identities have one image and cannot be queried; it is in the gallery" in people.notes
        )
        return
    pytest.fail("no seed put a or b into the test")


def test_a_folder_may_state_its_split(tmp_path):
    write(tmp_path, ("train/anna/1.jpg", "query/ben/1.jpg", "gallery/ben/2.jpg", "gallery/cleo/1.jpg"))
    people = read(None, tmp_path, SMALL)
    assert people.people == ("anna", "ben", "cleo")
    assert [images.pids.tolist() for images in people.splits.values()] == [[0], [1], [1, 2]]


def test_a_folder_may_be_for_training_alone(tmp_path):
    people = read(None, write(tmp_path, ("train/anna/1.jpg", "train/ben/1.jpg")), SMALL)
    assert (len(people.train), len(people.query), len(people.gallery)) == (2, 0, 0)
    assert validate(people).is_usable
    assert "no query images" in validate(people).warnings


def test_folders_know_no_cameras_and_the_report_says_what_follows(tmp_path):
    people = read("folder", write(tmp_path, PEOPLE_FOLDERS), SMALL)
    assert all((images.camids == UNKNOWN_CAMERA).all() for images in people.splits.values())
    assert "no camera ids: evaluation leaves out no gallery image" in people.notes[-1]
    assert validate(people).splits["train"].cameras == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train/a/1.jpg", "test/b/1.jpg"), "test: beside train only folders named train, query, gallery"),
        (("query/a/1.jpg",), "none in gallery"),
        (("gallery/a/1.jpg",), "none in query"),
        (("a/1.jpg", "a/2.jpg"), "1 identity cannot be split"),
        (("1.jpg",), "no image found"),
    ],
)
def test_a_folder_that_cannot_be_understood_is_refused(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        read("folder", write(tmp_path, files))


def test_what_lies_where_no_image_is_expected_is_left_out_and_named(tmp_path):
    write(tmp_path, (*PEOPLE_FOLDERS, "stray.jpg", "anna/more/9.jpg"))
    (tmp_path / "anna" / "notes.txt").write_text("x")
    left_out = read("folder", tmp_path, SMALL).left_out
    assert {reason: [str(path.relative_to(tmp_path)) for path in paths] for reason, paths in left_out.items()} == {
        "an image outside the folders of identities": ["stray.jpg"],
        "a folder where only images belong": ["anna/more"],
        "not an image file by its name": ["anna/notes.txt"],
    }


# --- tables


def test_a_table_gives_people_cameras_and_splits_by_any_names(tmp_path):
    text = (
        "split, PATH ,pid,camid\n"
        "train,a/1.jpg,zoe,lobby\n"
        "train,a/2.jpg,zoe,\n"
        "query,b/1.jpg,007,gate\n"
        "gallery,b/2.jpg,007,lobby\n"
        "gallery,c.png,7,\n"
    )
    people = read(None, write_table(tmp_path, text), SMALL)
    assert (people.name, people.people, people.cameras) == ("people", ("007", "7", "zoe"), ("gate", "lobby"))
    assert [images.pids.tolist() for images in people.splits.values()] == [[2, 2], [0], [0, 1]]
    assert [images.camids.tolist() for images in people.splits.values()] == [
        [1, UNKNOWN_CAMERA],
        [0],
        [1, UNKNOWN_CAMERA],
    ]


def test_a_table_without_splits_is_split_by_identity(tmp_path):
    people = read("csv", write_table(tmp_path, "\ufeffpath,pid\na/1.jpg,a\na/2.jpg,a\nb/1.jpg,b\nb/2.jpg,b\n"), SMALL)
    assert (len(people.train), len(people.query), len(people.gallery)) == (2, 1, 1)
    assert people.train.pids[0] != people.query.pids[0] == people.gallery.pids[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,pid\na/1.jpg,a\n", "no column path; the first line names the columns: path, pid"),
        ("path,pid,pid\na/1.jpg,a,b\n", "a column is there twice"),
        ("", "no column path and no column pid"),
        ("path,pid\na/1.jpg\n", "line 2: not as many fields"),
        ("path,pid\na/1.jpg,a,b\n", "line 2: not as many fields"),
        ("path,pid\na/1.jpg,a\n,b\n", "line 3: path is empty"),
        ("path,pid\na/1.jpg, \n", "line 2: pid is empty"),
        ("path,pid\na/1.jpg,a\n./a/1.jpg,b\n", r"line 3: \./a/1\.jpg stands in line 2 already"),
        ("path,pid\na/9.jpg,a\n", r"line 2: there is no file .*a/9\.jpg"),
        ("path,pid\na,a\n", "line 2: there is no file"),
        ("path,pid\npeople.csv,a\n", r"line 2: people\.csv is none of \.bmp"),
        ("path,pid\n" + "x" * 300 + ".jpg,a\n", "line 2: .*File name too long"),
        ("path,pid,split\na/1.jpg,a,test\n", "line 2: split is 'test'; it must be one of train, query, gallery"),
        ("path,pid,split\na/1.jpg,a,train\na/2.jpg,a,\n", "1 of 2 lines have no split"),
        ('path,pid\n"a/1.jpg,a\n', "not readable as CSV"),
        ("path,pid\n", r"people\.csv: no image found"),
        ("path,pid\na/1.jpg,a\n", r"people\.csv: 1 identity cannot be split"),
        ("path,pid\na\\1.jpg,a\n", r"line 2: there is no file .*; write folders with /, not \\"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read("csv", write_table(tmp_path, text))


def test_a_table_that_is_no_text_is_refused(tmp_path):
    table = write_table(tmp_path, "")
    table.write_bytes(b"path,pid\n\xff\xfe,1\n")
    with pytest.raises(DataError, match=r"people\.csv: cannot be read as UTF-8"):
        read("csv", table)


# --- nothing outside the root is read, nothing inside is written


@pytest.mark.parametrize(
    "name", ["/etc/passwd.jpg", "../secret.jpg", "a/../../secret.jpg", "C:\\secret.jpg", "a/\0.jpg"]
)
def test_a_table_that_names_files_outside_its_folder_is_refused(tmp_path, name):
    write(tmp_path, ["secret.jpg"])
    with pytest.raises(DataError, match=r"people\.csv, line 2: .* leads out of"):
        read("csv", write_table(tmp_path / "set", f"path,pid\n{name},a\n"))


def test_links_that_lead_out_of_the_root_are_refused(tmp_path):
    outside = write(tmp_path / "outside", ["1.jpg"])
    for what, target in (("anna/9.jpg", outside / "1.jpg"), ("eve", outside)):
        root = write(tmp_path / f"set {what[:3]}", PEOPLE_FOLDERS)
        (root / what).symlink_to(target)
        with pytest.raises(DataError, match=rf"{what}: leads to .*, out of .*; put a copy there"):
            read("folder", root)


@pytest.mark.parametrize("link", ["9.jpg", "folder/1.jpg"])
def test_links_of_a_table_that_lead_out_of_its_folder_are_refused(tmp_path, link):
    outside = write(tmp_path / "outside", ["1.jpg"])
    table = write_table(tmp_path / "set", f"path,pid\n{link},a\n")
    (tmp_path / "set" / "9.jpg").symlink_to(outside / "1.jpg")
    (tmp_path / "set" / "folder").symlink_to(outside)
    with pytest.raises(DataError, match=r"leads to .*outside"):
        read("csv", table)


def test_market1501_folders_that_are_links_out_of_the_root_are_refused(tmp_path):
    write(tmp_path / "real", MARKET)
    (tmp_path / "set").mkdir()
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "set" / folder).symlink_to(tmp_path / "real" / folder)
    with pytest.raises(DataError, match="bounding_box_train: leads to"):
        read("market1501", tmp_path / "set")


def test_a_link_that_stays_inside_or_is_the_root_itself_is_fine(tmp_path):
    write(tmp_path / "set", PEOPLE_FOLDERS)
    (tmp_path / "set" / "anna" / "again.jpg").symlink_to(tmp_path / "set" / "ben" / "2.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    people = read(None, tmp_path / "link", SMALL)
    assert sum(map(len, people.splits.values())) == len(PEOPLE_FOLDERS) + 1


def test_a_pipe_is_no_image_and_does_not_block(tmp_path):
    write(tmp_path, PEOPLE_FOLDERS)
    os.mkfifo(tmp_path / "anna" / "pipe.jpg")
    assert "not an image file by its name" in read("folder", tmp_path, SMALL).left_out


@pytest.mark.parametrize("names_or_make", [MARKET, write_msmt17, VIPER, PEOPLE_FOLDERS], ids=["a", "b", "c", "d"])
def test_reading_and_validating_write_nothing_below_the_root(tmp_path, names_or_make):
    if callable(names_or_make):
        names_or_make(tmp_path)
    else:
        write(tmp_path, names_or_make)
    before = files_below(tmp_path)
    validate(read(None, tmp_path, SMALL))
    assert files_below(tmp_path) == before


# --- which layout it is


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("market1501", lambda root: write(root, MARKET)),
        ("cuhk03-np", lambda root: write(root / "labeled", MARKET).parent),
        ("msmt17", write_msmt17),
        ("msmt17", lambda root: write_msmt17(root, "mask_train_v2", "mask_test_v2")),
        ("viper", lambda root: write(root, VIPER)),
        ("csv", lambda root: write_table(root, "path,pid\n")),
        ("folder", lambda root: write(root, PEOPLE_FOLDERS)),
        ("folder", lambda root: write(root, ("train/a/1.jpg",))),
    ],
)
def test_a_layout_is_recognised_and_the_others_are_ruled_out_with_a_reason(tmp_path, kind, make):
    found = detect(make(tmp_path))
    assert found.kind == kind
    assert kind not in found.why_not
    assert all(found.why_not.values())


def test_an_unknown_layout_is_refused_with_the_reason_for_each(tmp_path):
    with pytest.raises(
        DataError, match=r"market1501: no folder bounding_box_train .*; cuhk03-np: .*; folder: no folder of"
    ):
        read(None, write(tmp_path, ["a.jpg"]))


def test_an_incomplete_published_layout_is_not_taken_for_folders_of_identities(tmp_path):
    write(tmp_path, [name for name in MARKET if not name.startswith("query")])
    with pytest.raises(
        DataError, match=r"market1501: no folder query; .*folder: bounding_box_test belongs to another layout"
    ):
        read(None, tmp_path)


def test_a_data_set_one_folder_down_is_pointed_at(tmp_path):
    write(tmp_path / "Market-1501-v15.09.15", MARKET)
    with pytest.raises(DataError, match=r"but .*Market-1501-v15\.09\.15 looks like market1501: give that"):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda root: detect(root / "none"), "there is no such file or folder"),
        (lambda root: read("duke", root), "no data set layout is called 'duke'; there are market1501, cuhk03-np"),
        (lambda root: read("market1501", root / "none"), "there is no such folder"),
        (lambda root: read("market1501", root), "no folder bounding_box_train .* not Market-1501 as it is published"),
        (lambda root: read("viper", root), "no folder cam_a and no folder cam_b"),
        (lambda root: read("csv", root), "a table is given by its own path"),
        (lambda root: ReadOptions(boxes="drawn"), "'detected' or 'labeled', not 'drawn'"),
        (lambda root: ReadOptions(query_camera="c"), "'a' or 'b', not 'c'"),
        (lambda root: ReadOptions(queries_per_identity=0), "at least 1, not 0"),
        (lambda root: ReadOptions(seed=-1), "a seed must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(tmp_path, call, message):
    with pytest.raises(DataError, match=message):
        call(tmp_path)


# --- the report


def a_set(root: Path, table: str) -> DataSet:
    return read("csv", write_table(root, table), SMALL)


def test_a_report_counts_images_identities_cameras_and_sizes(tmp_path):
    write(tmp_path, MARKET)
    write(tmp_path, ["query/0003_c5s1_000001_00.jpg"], size=(32, 16))
    report = validate(read(None, tmp_path, SMALL))
    train, query, gallery = report.splits.values()
    assert (train.images, train.identities, train.cameras, train.single_image_identities) == (3, 2, 3, 1)
    assert (query.images, query.identities, query.cameras) == (3, 2, 3)
    assert (gallery.images, gallery.identities, gallery.unknown_camera) == (4, 3, 0)
    assert (report.smallest.height, report.smallest.width) == (8, 4)
    assert (report.largest.height, report.largest.width, Path(report.largest.path).name) == (
        32,
        16,
        "0003_c5s1_000001_00.jpg",
    )
    assert report.left_out == {"junk, pid -1": 2}
    assert report.is_usable


def test_a_report_prints_as_a_table_and_as_json(tmp_path):
    report = validate(read(None, write(tmp_path, MARKET), SMALL))
    table = report.table().splitlines()
    assert table[2].split() == ["images", "identities", "cameras", "one", "image", "no", "camera"]
    assert table[3].split() == ["train", "3", "2", "3", "1", "0"]
    assert "left out: 2 (junk, pid -1)" in table
    assert table[-1] == "every image decoded; usable"
    fields = json.loads(report.json())
    assert fields["splits"]["gallery"]["images"] == 4
    assert fields["largest"]["height"] == 8


def test_broken_files_are_counted_and_named_but_not_without_end(tmp_path):
    write(tmp_path, MARKET)
    for number in range(30):
        (tmp_path / "query" / f"0001_c1s1_{number:06}_09.jpg").write_bytes(b"no image")
    report = validate(read(None, tmp_path, SMALL))
    assert (report.broken, len(report.broken_files), report.is_usable) == (30, 20, False)
    assert "query/0001_c1s1_000000_09.jpg: not an image" in report.broken_files[0]
    assert "30 files cannot be decoded" in report.table()


def test_a_broken_picture_behind_a_good_header_takes_decoding_to_find(tmp_path):
    write(tmp_path, MARKET, size=(64, 64))
    path = tmp_path / "query" / "0001_c1s1_001051_00.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    people = read(None, tmp_path, SMALL)
    assert (validate(people, decode=False).broken, validate(people).broken) == (0, 1)
    assert "headers read, pixels not decoded" in validate(people, decode=False).table()


def test_an_identity_in_training_and_test_is_an_error_that_names_files(tmp_path):
    report = validate(a_set(tmp_path, "path,pid,split\na/1.jpg,zoe,train\nb/1.jpg,zoe,query\nb/2.jpg,zoe,gallery\n"))
    assert (report.leaked_identities, report.is_usable) == (1, False)
    assert "1 identities are in training and test; the first is zoe: " in report.errors[0]
    assert "a/1.jpg and " in report.errors[0]
    assert "b/1.jpg" in report.errors[0]


def test_the_same_bytes_in_two_splits_are_found_under_any_name(tmp_path):
    table = "path,pid,split\na/1.jpg,x,train\na/2.jpg,y,query\nb/1.jpg,y,gallery\nb/2.jpg,z,gallery\nc.png,y,gallery\n"
    people = a_set(tmp_path, table)
    (tmp_path / "b" / "1.jpg").write_bytes((tmp_path / "a" / "2.jpg").read_bytes())
    (tmp_path / "b" / "2.jpg").write_bytes((tmp_path / "a" / "1.jpg").read_bytes())
    report = validate(people)
    assert (report.same_in_query_and_gallery, report.same_in_train_and_test) == (1, 1)
    assert "1 queries lie in the gallery as the same file; the first is " in report.warnings[0]
    assert "1 images are in training and test; the first is " in report.errors[0]


def test_queries_without_a_correct_match_are_counted(tmp_path):
    """x is in the gallery, but from the query's own camera; y's camera is unknown, so it is matched; z is not there."""
    table = (
        "path,pid,camid,split\n"
        "a/1.jpg,x,1,query\n"
        "a/2.jpg,x,1,gallery\n"
        "b/1.jpg,y,,query\n"
        "b/2.jpg,y,,gallery\n"
        "c.png,z,2,query\n"
    )
    report = validate(a_set(tmp_path, table))
    assert report.unmatched_queries == 2
    assert "2 of 3 queries have no correct match" in report.warnings[0]
    assert report.is_usable


def test_a_set_in_which_no_query_can_be_answered_is_an_error(tmp_path):
    report = validate(a_set(tmp_path, "path,pid,split\na/1.jpg,x,query\na/2.jpg,y,gallery\n"))
    assert "nothing can be measured" in report.errors[0]


def test_unmatched_queries_agree_with_the_protocol_spelled_out():
    generator = np.random.default_rng(0)

    def some(n: int) -> ImageFiles:
        return ImageFiles.of([Path("x")] * n, generator.integers(0, 12, n), generator.integers(-1, 3, n), (8, 4))

    query, gallery = some(60), some(25)
    expected = [
        index
        for index, (pid, camid) in enumerate(zip(query.pids, query.camids, strict=True))
        if not any(
            p == pid and not (c == camid != UNKNOWN_CAMERA) for p, c in zip(gallery.pids, gallery.camids, strict=True)
        )
    ]
    assert unmatched_queries(query, gallery).tolist() == expected
    assert 0 < len(expected) < 60


def test_progress_is_reported_file_by_file(tmp_path):
    seen: list[tuple[int, int]] = []
    validate(read(None, write(tmp_path, MARKET), SMALL), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 9) for done in range(1, 10)]
