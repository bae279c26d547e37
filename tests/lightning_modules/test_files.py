"""Files are written whole or not at all."""

import os
import stat
import threading

import pytest

from lightning_modules.files import atomic_write, new_folder, whole_rows


def test_the_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "data.bin"
    with atomic_write(path) as file:
        file.write(b"one\r\n")
        assert not path.exists()
        assert os.path.dirname(file.name) == str(path.parent)  # so that the renaming stays on one disk
        file.write(b"two\n")
    assert path.read_bytes() == b"one\r\ntwo\n"
    assert os.listdir(path.parent) == ["data.bin"]


def test_text_is_utf8_with_its_line_ends(tmp_path):
    path = tmp_path / "text.txt"
    with atomic_write(path, "w") as file:
        file.write("ä\r\nb\n")
    assert path.read_bytes() == b"\xc3\xa4\r\nb\n"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "data.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["data.bin"]


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "data.bin"):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "data.bin")


def test_the_last_of_two_writers_wins(tmp_path):
    path = tmp_path / "data.bin"
    with atomic_write(path) as slow:
        slow.write(b"slow " * 1000)
        with atomic_write(path) as fast:
            fast.write(b"fast")
        assert path.read_bytes() == b"fast"
    assert path.read_bytes() == b"slow " * 1000
    assert os.listdir(tmp_path) == ["data.bin"]


def test_a_reader_never_sees_a_part(tmp_path):
    path, versions, seen, done = (
        tmp_path / "data.bin",
        [b"a" * 70_001, b"b" * 50_021],
        set(),
        threading.Event(),
    )
    path.write_bytes(versions[0])

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        with atomic_write(path) as file:
            for start in range(0, 70_001, 10_000):
                file.write(versions[i % 2][start : start + 10_000])
    done.set()
    reader.join()
    assert seen <= set(versions)


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "atomic"):
        pass
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"x"


@pytest.fixture
def ordinary_user():
    """Root may write into any folder: be someone else for a while."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_read_only_folder_is_named_in_one_line(tmp_path, ordinary_user):
    path = tmp_path / "data.bin"
    if os.geteuid() != 65534:
        tmp_path.chmod(0o555)
    try:
        with pytest.raises(ValueError, match="cannot write .*data.bin.*: permission denied; name a file") as error:
            with atomic_write(path) as file:
                file.write(b"x")
    finally:
        if os.geteuid() != 65534:
            tmp_path.chmod(0o755)
    assert "\n" not in str(error.value)


def test_a_folder_or_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in tmp_path, tmp_path / "file" / "data.bin":
        with pytest.raises(ValueError, match="cannot write"):
            with atomic_write(path):
                pass
    assert os.listdir(tmp_path) == ["file"]


def test_only_writing_modes(tmp_path):
    with pytest.raises(ValueError, match="mode must be 'wb' or 'w'; got 'a'"):
        with atomic_write(tmp_path / "x", "a"):
            pass


@pytest.mark.parametrize("number", [28, 122])
def test_a_disk_that_is_full_from_the_start_is_no_bad_input(tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, "no room")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "data.bin"):
        pass
    assert (error.value.errno, error.value.filename) == (number, str(tmp_path / "data.bin"))


@pytest.mark.parametrize("error", [OSError(28, "no room"), RuntimeError("I/O error: no room (os error 28)")])
def test_a_folder_on_a_full_disk(tmp_path, error):
    with pytest.raises(OSError) as raised, new_folder(tmp_path / "new") as folder:
        (folder / "part").touch()
        raise error
    assert (raised.value.errno, raised.value.filename) == (28, str(tmp_path / "new")) and not os.listdir(tmp_path)
    with pytest.raises(RuntimeError, match="another"), new_folder(tmp_path / "new"):
        raise RuntimeError("another")


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "a,b\n1,2\n"])
def test_rows_are_appended_all_or_none(tmp_path, kind, before):
    path = tmp_path / "rows.csv"
    if before is not None:
        path.write_text(before)
    with pytest.raises(kind) as raised, whole_rows(path), open(path, "a") as file:
        file.write("3,4\n5,")
        file.flush()
        raise kind(28, "no room")
    assert (path.read_text() if path.exists() else None) == before
    assert getattr(raised.value, "filename", str(path)) == str(path)
    with whole_rows(path), open(path, "a") as file:
        file.write("3,4\n")
    assert path.read_text() == (before or "") + "3,4\n"
