"""Folders: whole files only, on a disk and in something like an object store."""

import os
import pickle
import uuid

import pytest

from lepton_ray.errors import ConfigError
from lepton_ray.storage import Folder


@pytest.fixture(params=["disk", "url"])
def folder(request, tmp_path):
    if request.param == "disk":
        yield Folder(str(tmp_path / "run"))
        return
    made = Folder(f"memory://{uuid.uuid4().hex}/run")
    yield made
    made.delete_all()


def test_what_is_written_is_read_and_listed(folder):
    assert folder.names() == []
    folder.write("a", b"one")
    folder.write("a", b"two")
    folder.sub("inner", "deep").write("b", b"")
    assert folder.names() == ["a", "inner"]
    assert folder.read("a") == b"two"
    assert (folder.size("a"), folder.sub("inner", "deep").size("b")) == (3, 0)
    assert [folder.exists(name) for name in ("a", "inner", "b")] == [True, True, False]
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    assert copy.read("a") == b"two"


def test_deleting_is_repeatable(folder):
    folder.write("a", b"1")
    folder.sub("inner").write("b", b"2")
    for _ in range(2):
        folder.delete("a")
        assert folder.names() == ["inner"]
    for _ in range(2):
        folder.delete_all()
        assert folder.names() == []
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def test_a_stream_that_fails_leaves_the_old_file_or_none(folder):
    def break_off(name):
        with folder.open(name, "wb") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off("new")
    assert folder.names() == []
    with folder.open("old", "wb") as file:
        file.write(b"whole")
    if folder.is_local:
        with pytest.raises(RuntimeError):
            break_off("old")
        assert folder.read("old") == b"whole"
        assert folder.names() == ["old"]


def test_a_reader_that_knows_paths_only_gets_one(folder, tmp_path):
    folder.write("a", b"text")
    with open(folder.local_path("a", download_to=str(tmp_path)), "rb") as file:
        assert file.read() == b"text"


def test_probe_leaves_nothing(folder):
    folder.probe()
    assert folder.names() == []


@pytest.mark.parametrize(
    ("url", "same"), [("/a/b/", "/a/b"), ("file:///a/./b", "/a/b"), ("memory://x/y/", "memory://x/y")]
)
def test_urls_are_normal(url, same):
    assert Folder(url).url == same


@pytest.mark.parametrize("url", ["runs", "./runs", "~/runs", ""])
def test_a_relative_path_is_refused_with_the_absolute_one(url):
    with pytest.raises(ConfigError, match="not an absolute path.*Use '/"):
        Folder(url)


@pytest.mark.parametrize("name", ["..", "", "a/b"])
def test_a_name_cannot_leave_its_folder(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot name"):
        Folder(str(tmp_path)).sub(name)


def test_probe_says_why_and_what_to_do(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"file/run.*cannot write.*(NotADirectory|FileExists).*every node"):
        Folder(str(tmp_path / "file" / "run")).probe()
    with pytest.raises(ConfigError, match="no file system for 'nosuch'"):
        Folder("nosuch://bucket/run").probe()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_probe_names_missing_rights(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="PermissionError"):
        Folder(str(tmp_path)).probe()
