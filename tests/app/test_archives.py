"""Archives made to do harm: each is refused, and nothing of it lands outside of the folder."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import DatasetRefused
from app.worker import archives
from app.worker.archives import HIDDEN, NOT_READ, Limits, Unpacked, unpack
from app.worker.file_tree import digest_of, list_tree, remove, seal

PLENTY = Limits(max_files=1000, max_bytes=10**9)
JPEG = b"\xff\xd8 no real image, but nobody decodes it here"
Pack = Callable[[Path, dict[str, bytes]], Path]


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def tarred(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_gzipped(path: Path, files: dict[str, bytes]) -> Path:
    return tarred(path, files, "w:gz")


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    """A tar of members without content."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            archive.addfile(member)
    return path


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.fixture(params=[zipped, tarred, tar_gzipped], ids=["zip", "tar", "tar.gz"])
def pack(request: pytest.FixtureRequest) -> Pack:
    packer: Pack = request.param
    return packer


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "inner" / "target"
    folder.mkdir(parents=True)
    return folder


def unpacked(archive: Path, target: Path, limits: Limits = PLENTY) -> Unpacked:
    return unpack(archive, target, limits)


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def assert_refused(archive: Path, target: Path, words: str, limits: Limits = PLENTY) -> None:
    """Refused in these words, and nothing lies beside the target folder."""
    around = names_beside(target)
    with pytest.raises(DatasetRefused, match=words):
        unpack(archive, target, limits)
    assert names_beside(target) == around


def names_beside(target: Path) -> set[Path]:
    """Everything in the folder of the test that is not in `target`."""
    return {path for path in target.parent.parent.rglob("*") if not path.is_relative_to(target)}


def test_images_lists_and_tables_come_out_as_they_went_in(pack: Pack, tmp_path: Path, target: Path) -> None:
    files = {
        "a/1.jpg": JPEG,
        "a/2.PNG": b"png",
        "list_train.txt": b"a 1\n",
        "people.csv": b"path,pid\n",
        "ü/é.bmp": b"x",
    }
    found = unpacked(pack(tmp_path / "archive", files), target)
    assert {name: (target / name).read_bytes() for name in names_below(target)} == files
    assert found == Unpacked(5, sum(map(len, files.values())), {})


def test_folders_and_names_that_begin_with_a_dot_slash_are_ordinary(tmp_path: Path, target: Path) -> None:
    path = tar_of(
        tmp_path / "a.tar", entry("./", tarfile.DIRTYPE), entry("./a", tarfile.DIRTYPE), entry("./a/1.jpg", b"0")
    )
    unpacked(path, target)
    assert names_below(target) == ["a/1.jpg"]


def test_what_no_reader_reads_is_counted_and_not_written(pack: Pack, tmp_path: Path, target: Path) -> None:
    files = {
        "1.jpg": JPEG,
        "run.sh": b"rm",
        "inner.zip": b"PK",
        ".bashrc": b"x",
        "__MACOSX/._1.jpg": b"x",
        ".x/2.jpg": b"y",
    }
    found = unpacked(pack(tmp_path / "archive", files), target)
    assert names_below(target) == ["1.jpg"]
    assert found.left_out == {NOT_READ: 2, HIDDEN: 3}


def test_a_nested_archive_is_never_opened(tmp_path: Path, target: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"bomb.jpg": bytes(10**7)}).read_bytes()
    found = unpacked(zipped(tmp_path / "outer.zip", {"inner.zip": inner, "1.jpg": JPEG}), target)
    assert (names_below(target), found.files) == (["1.jpg"], 1)


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "..", "a/.."])
def test_a_path_that_leads_out_is_refused(pack: Pack, tmp_path: Path, target: Path, name: str) -> None:
    assert_refused(pack(tmp_path / "archive", {"1.jpg": JPEG, name: JPEG}), target, "leads out of the data set")


def test_a_path_that_leads_out_is_refused_also_where_the_file_would_be_left_out(tmp_path: Path, target: Path) -> None:
    assert_refused(zipped(tmp_path / "a.zip", {"../.ssh/authorized_keys": b"key"}), target, "leads out")


@pytest.mark.parametrize("name", ["/evil.jpg", "//host/evil.jpg", "C:/evil.jpg", "c:evil.jpg"])
def test_an_absolute_path_is_refused(pack: Pack, tmp_path: Path, target: Path, name: str) -> None:
    assert_refused(pack(tmp_path / "archive", {name: JPEG}), target, "is absolute")


@pytest.mark.parametrize("name", ["..\\evil.jpg", "a\nb.jpg", "a\x1b[31m.jpg", "\u202egpj.exe.jpg"])
def test_a_name_that_is_another_elsewhere_is_refused(pack: Pack, tmp_path: Path, target: Path, name: str) -> None:
    assert_refused(pack(tmp_path / "archive", {name: JPEG}), target, "has characters")


def test_a_name_cut_by_a_nul_in_a_zip_is_refused(tmp_path: Path, target: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"1.jpgX.exe": JPEG})
    path.write_bytes(path.read_bytes().replace(b"1.jpgX", b"1.jpg\0"))
    assert_refused(path, target, "has characters")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path, target: Path) -> None:
    path = tarred(tmp_path / "a.tar", {"QQ.jpg": JPEG})
    content = bytearray(path.read_bytes())
    content[0:2] = b"\xff\xfe"
    struct.pack_into("8s", content, 148, b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512])))
    path.write_bytes(content)
    assert_refused(path, target, "has characters")


def test_a_name_of_endless_folders_is_refused(pack: Pack, tmp_path: Path, target: Path) -> None:
    assert_refused(pack(tmp_path / "archive", {"d/" * 100 + "1.jpg": JPEG}), target, "deeper than 32 folders")


def test_a_symbolic_link_in_a_tar_is_refused(tmp_path: Path, target: Path) -> None:
    path = tar_of(tmp_path / "a.tar", entry("link.jpg", tarfile.SYMTYPE, "/etc/passwd"))
    assert_refused(path, target, "is a link")


def test_a_file_behind_a_symbolic_link_to_a_folder_is_refused(tmp_path: Path, target: Path) -> None:
    path = tar_of(tmp_path / "a.tar", entry("out", tarfile.SYMTYPE, "../.."), entry("out/evil.jpg", tarfile.REGTYPE))
    assert_refused(path, target, "is a link")


def test_a_hard_link_in_a_tar_is_refused(tmp_path: Path, target: Path) -> None:
    path = tar_of(tmp_path / "a.tar", entry("link.jpg", tarfile.LNKTYPE, "/etc/passwd"))
    assert_refused(path, target, "is a link")


def test_a_symbolic_link_in_a_zip_is_refused(tmp_path: Path, target: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert_refused(tmp_path / "a.zip", target, "is a link")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_a_device_or_pipe_is_refused(tmp_path: Path, target: Path, kind: bytes) -> None:
    assert_refused(tar_of(tmp_path / "a.tar", entry("1.jpg", kind)), target, "device")


def test_a_device_in_a_zip_is_refused(tmp_path: Path, target: Path) -> None:
    device = zipfile.ZipInfo("1.jpg")
    device.external_attr = (stat.S_IFCHR | 0o666) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(device, "")
    assert_refused(tmp_path / "a.zip", target, "device")


def test_a_sparse_file_of_a_terabyte_is_refused(tmp_path: Path, target: Path) -> None:
    sparse = tarfile.TarInfo("1.jpg")
    sparse.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "1.jpg",
        "GNU.sparse.realsize": str(2**40),
    }
    content = b"1\n0\n0\n".ljust(512, b"\0")
    sparse.size = len(content)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(sparse, io.BytesIO(content))
    assert_refused(tmp_path / "a.tar", target, "a hole")


@pytest.mark.parametrize(
    ("one", "other"),
    [("a/1.jpg", "a/1.jpg"), ("a/1.jpg", "A/1.JPG"), ("é.jpg", "e\u0301.jpg"), ("a//1.jpg", "a/1.jpg")],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(tmp_path: Path, target: Path, one: str, other: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(one, JPEG)
        archive.writestr(other, b"other")
    assert_refused(tmp_path / "a.zip", target, "two files are called")


def test_two_files_of_one_name_in_a_tar_are_refused(tmp_path: Path, target: Path) -> None:
    path = tar_of(tmp_path / "a.tar", entry("1.jpg", tarfile.REGTYPE), entry("1.JPG", tarfile.REGTYPE))
    assert_refused(path, target, "two files are called")


def test_a_file_that_is_also_a_folder_is_refused(pack: Pack, tmp_path: Path, target: Path) -> None:
    assert_refused(pack(tmp_path / "a", {"a.jpg": JPEG, "a.jpg/1.jpg": JPEG}), target, "a file and a folder at once")


def test_too_many_files_are_refused(pack: Pack, tmp_path: Path, target: Path) -> None:
    files = {f"{number}.jpg": b"" for number in range(11)}
    assert unpacked(pack(tmp_path / "archive", files), target, Limits(11, 10**6)).files == 11
    (target.parent / "again").mkdir()
    assert_refused(pack(tmp_path / "archive", files), target.parent / "again", "more than 10 files", Limits(10, 10**6))


def test_folders_without_end_are_refused(tmp_path: Path, target: Path) -> None:
    path = tar_of(tmp_path / "a.tar", *(entry(f"d{number}", tarfile.DIRTYPE) for number in range(21)))
    assert_refused(path, target, "more than 10 files", Limits(10, 10**6))


def test_too_many_bytes_are_refused_before_they_are_written(pack: Pack, tmp_path: Path, target: Path) -> None:
    path = pack(tmp_path / "archive", {"1.bmp": os.urandom(600_000), "2.bmp": os.urandom(600_000)})
    assert_refused(path, target, "more than 1,000,000 bytes unpacked", Limits(10, 1_000_000))
    assert names_below(target) == ["1.bmp"]


def test_a_file_that_is_no_crop_by_its_size_is_refused(
    pack: Pack, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    assert_refused(pack(tmp_path / "archive", {"1.bmp": bytes(1001)}), target, "more than 1,000 bytes; a crop")


def test_a_compression_bomb_is_refused(tmp_path: Path, target: Path) -> None:
    """40 MB of zeros in 40 KB, in files that are each harmless."""
    path = zipped(tmp_path / "a.zip", {f"{number}.bmp": bytes(4_000_000) for number in range(10)})
    assert path.stat().st_size < 100_000
    assert_refused(path, target, "more than 50 times its size")


def test_a_compression_bomb_in_a_tar_gz_is_refused(tmp_path: Path, target: Path) -> None:
    path = tar_gzipped(tmp_path / "a.tgz", {f"{number}.bmp": bytes(4_000_000) for number in range(10)})
    assert_refused(path, target, "more than 50 times its size")


def test_a_compression_bomb_hidden_in_a_file_that_is_left_out_is_refused(tmp_path: Path, target: Path) -> None:
    """A tar must be read past what is not wanted."""
    path = tar_gzipped(tmp_path / "a.tgz", {"notes.doc": bytes(40_000_000), "1.jpg": JPEG})
    assert_refused(path, target, "more than 50 times its size")


def test_a_zip_whose_files_share_their_bytes_is_refused(tmp_path: Path, target: Path) -> None:
    """Every entry of the directory points at one and the same member: small to send, large to unpack."""
    path = zipped(tmp_path / "a.zip", {"0000.bmp": os.urandom(300_000)})
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    many = b"".join(content[start:end].replace(b"0000.bmp", b"%04d.bmp" % number) for number in range(999))
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 999, 999, len(many), start, 0)
    path.write_bytes(content[:start] + many + tail)
    assert_refused(path, target, "damaged|times its size")
    assert sum(file.stat().st_size for file in target.rglob("*.bmp")) < 100 * 300_000


def test_a_zip_that_lies_about_a_size_is_refused(tmp_path: Path, target: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"1.bmp": bytes(100_000)})
    lie = path.read_bytes().replace(struct.pack("<I", 100_000), struct.pack("<I", 10))
    path.write_bytes(lie)
    assert_refused(path, target, "damaged")


def test_a_tar_header_that_claims_gigabytes_of_metadata_is_refused(tmp_path: Path, target: Path) -> None:
    """The library reads extended headers into memory whole: what it may read is counted first."""
    header = entry("pax", tarfile.XHDTYPE)
    header.size = 8 * 10**9
    claimed = header.tobuf(tarfile.GNU_FORMAT) + bytes(60_000_000)
    (tmp_path / "a.tgz").write_bytes(gzip.compress(claimed, 9))
    assert_refused(tmp_path / "a.tgz", target, "more than 50 times its size")


def test_an_encrypted_zip_is_refused(tmp_path: Path, target: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"1.jpg": JPEG})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert_refused(path, target, "encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_another_method_is_refused(tmp_path: Path, target: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("1.jpg", JPEG)
    assert_refused(tmp_path / "a.zip", target, "another method than deflate")


def test_a_cut_archive_is_refused(pack: Pack, tmp_path: Path, target: Path) -> None:
    path = pack(tmp_path / "archive", {"1.bmp": os.urandom(100_000)})
    path.write_bytes(path.read_bytes()[:50_000])
    assert_refused(path, target, "damaged or cut short")


def test_flipped_bytes_in_a_member_are_noticed(tmp_path: Path, target: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.bmp", b"B" * 1000)
    path.write_bytes(path.read_bytes().replace(b"BBBB", b"BXBB", 1))
    assert_refused(path, target, "damaged")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"Rar!\x1a\x07\x00", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08"]
)
def test_what_is_no_archive_is_refused(tmp_path: Path, target: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert_refused(tmp_path / "a", target, "no zip, tar or tar.gz|damaged")


def test_no_mutation_of_an_archive_escapes_or_breaks_the_unpacking(pack: Pack, tmp_path: Path, target: Path) -> None:
    """Every byte of the headers, flipped one at a time: a clean refusal, or files inside."""
    content = pack(tmp_path / "archive", {"a/1.jpg": JPEG, "b.txt": b"text"}).read_bytes()
    outcomes = set()
    for position in range(0, min(len(content), 2048), 5):
        mutated = bytearray(content)
        mutated[position] ^= 0x41
        (tmp_path / "archive").write_bytes(mutated)
        remove(target)
        target.mkdir()
        try:
            unpack(tmp_path / "archive", target, PLENTY)
            outcomes.add("unpacked")
        except DatasetRefused:
            outcomes.add("refused")
    assert "refused" in outcomes
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "inner"}


# The files once they lie there --------------------------------------------------------------------------------------


def test_the_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name, content in {
        "b/2.jpg": b"2",
        "a.txt": b"1",
        "B/1.jpg": b"3",
        ".hidden.jpg": b"x",
        "notes.md": b"y",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    script = "LC_ALL=C sha256sum B/1.jpg a.txt b/2.jpg | sha256sum"
    found = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()[0]
    tree = list_tree(tmp_path, PLENTY)
    assert digest_of(tree) == found
    assert tree.left_out == {HIDDEN: 1, NOT_READ: 1}


def test_the_command_in_the_documentation_computes_the_digest(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "register-a-data-set.md").read_text()
    block = next(block for block in page.split("```") if "xargs -0 sha256sum" in block)
    script = block.split("\n", 2)[2]  # without the language and the `cd`
    names = ("b/2.jpg", "B/1.JPG", "a.txt", "b.csv", "b/ü ö.png", ".hidden/1.jpg", "b/.2.jpg", "b/notes.md")
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"%d" % number)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == digest_of(list_tree(tmp_path, PLENTY))


def test_a_link_inside_is_followed_and_one_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.jpg").write_bytes(JPEG)
    (tmp_path / "set" / "b").symlink_to("a")
    assert [file.name for file in list_tree(tmp_path / "set", PLENTY).files] == ["a/1.jpg", "b/1.jpg"]
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "set" / "c.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DatasetRefused, match=r"'c\.jpg' is a link that leads out"):
        list_tree(tmp_path / "set", PLENTY)


def test_a_link_to_a_folder_above_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(DatasetRefused, match="leads back into itself"):
        list_tree(tmp_path, PLENTY)


def test_a_link_to_nothing_and_a_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").symlink_to("nowhere")
    with pytest.raises(DatasetRefused, match="leads nowhere"):
        list_tree(tmp_path, PLENTY)
    (tmp_path / "1.jpg").unlink()
    os.mkfifo(tmp_path / "1.jpg")
    with pytest.raises(DatasetRefused, match="a pipe"):
        list_tree(tmp_path, PLENTY)


def test_a_sealed_folder_can_be_removed_and_has_no_right_to_write(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.jpg").write_bytes(JPEG)
    (tmp_path / "set" / "b.jpg").symlink_to("a/1.jpg")
    seal(tmp_path / "set")
    modes = {oct(path.lstat().st_mode & 0o777) for path in (tmp_path / "set", *(tmp_path / "set").rglob("1.jpg"))}
    assert modes == {"0o555", "0o444"}
    remove(tmp_path / "set")
    assert not (tmp_path / "set").exists()
