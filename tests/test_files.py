"""What stands where a file should be: read within limits, written whole, or refused in words."""

import os
import threading
from pathlib import Path

import pytest

from zoscope import files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX files")


def test_a_text_is_read_with_or_without_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeffη".encode())
    assert files.read_text(tmp_path / "a") == "η"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to itself", "long name", "large"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "long name":
        path = tmp_path / ("a" * 400)
    else:
        path.write_bytes(b"x" * 100)
    with pytest.raises(OSError, match=r"it is|Too many levels|File name too long"):
        files.read_bytes(path, most=10)


def test_what_a_shell_hands_over_is_read(tmp_path: Path) -> None:
    read, write = os.pipe()
    threading.Thread(target=lambda: (os.write(write, b"hello"), os.close(write))).start()
    assert files.read_bytes(Path(f"/dev/fd/{read}")) == b"hello"
    os.close(read)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "9" * 30, "9" * 5000, "[" * 99999, "{", "\xff", ""])
def test_a_document_has_finite_numbers_and_bounds(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        files.parse_json(text)
    assert files.parse_json('{"a": [1, 2.5, -9223372036854775807]}') == {"a": [1, 2.5, -9223372036854775807]}


def test_a_pipe_that_nobody_reads_is_refused_and_one_that_is_read_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="nobody reads"):
        files.write_whole(path, b"x")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    files.write_whole(path, b"hello")
    assert os.read(reader, 10) == b"hello"
    os.close(reader)


def test_a_file_with_a_name_as_long_as_can_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    files.write_whole(path, b"x")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="leads to itself"):
        files.write_whole(loop, b"x")
