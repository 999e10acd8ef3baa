"""Every file is written whole or not at all, and nothing but a regular file is ever replaced."""

import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from ghostvis_cli import files
from tests.limits import limited

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def ran(program: str, stdout: int | IO[bytes] = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    code = f"from pathlib import Path; from ghostvis_cli import files; {program}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=stdout, timeout=60)


def test_a_new_file_appears_whole_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    files.write(tmp_path / "a", b"one")
    files.write(tmp_path / "b", (piece for piece in (b"t", b"wo")), mode=0o600)
    umask = os.umask(0)
    os.umask(umask)
    found = {path.name: (path.read_bytes(), path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert found == {"a": (b"one", 0o666 & ~umask), "b": (b"two", 0o600)}


def test_a_replaced_file_is_another_one_with_the_mode_it_had(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o640)
    with path.open() as reader:
        files.write(path, b"new", mode=0o600)
        assert reader.read() == "old"
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o640)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link_and_what_it_names_is_written(tmp_path: Path, there: bool) -> None:
    (tmp_path / "in").mkdir()
    if there:
        (tmp_path / "in" / "file").write_text("old")
    (tmp_path / "in" / "second").symlink_to("file")
    (tmp_path / "first").symlink_to("in/../in/second")
    files.write(tmp_path / "first", b"new")
    assert (tmp_path / "first").is_symlink() and (tmp_path / "in" / "second").is_symlink()
    assert (tmp_path / "in" / "file").read_text() == "new"
    assert names(tmp_path / "in") == ["file", "second"]


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels"):
        files.write(tmp_path / "a", b"x")


@pytest.mark.parametrize("linked", [True, False])
def test_a_fifo_is_written_straight_and_stays(tmp_path: Path, linked: bool) -> None:
    fifo, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    writer = threading.Thread(
        target=files.write, args=(tmp_path / ("link" if linked else "pipe"), b"x" * 10**6)
    )
    writer.start()  # a reader that comes a little later is waited for
    reader.start()
    for thread in (reader, writer):
        thread.join(60)
    assert got == [b"x" * 10**6] and fifo.is_fifo()


def test_a_fifo_that_nobody_reads_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READER_WAIT_S", 0.0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no process reads this FIFO"):
        files.write(tmp_path / "pipe", b"x")
    assert (tmp_path / "pipe").is_fifo()


def test_a_device_is_written_straight(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to(os.devnull)
    files.write(tmp_path / "null", b"x")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode) and names(tmp_path) == ["null"]


def test_a_terminal_is_written_straight() -> None:
    ours, theirs = os.openpty()
    files.write(Path(os.ttyname(theirs)), b"hello")
    assert os.read(ours, 5) == b"hello"
    for descriptor in (ours, theirs):
        os.close(descriptor)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_device_is_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        files.write(Path("/dev/full"), b"x")


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_stdout_by_any_name_goes_on_where_it_is(tmp_path: Path, place: str, to: str) -> None:
    """Opened anew, a redirected stdout would be written from its start, over what was printed before."""
    if place.startswith("/proc") and not Path("/proc/self/fd").exists():
        pytest.skip("this system has no /proc")
    (tmp_path / "link").symlink_to("/dev/stdout")
    program = (
        f"print('before', flush=True); files.write(Path({str(tmp_path / place)!r}), b'it\\n'); print('after')"
    )
    if to == "pipe":
        said = ran(program).stdout
    else:
        with (tmp_path / "out").open("wb") as out:
            ran(program, out)
        said = (tmp_path / "out").read_bytes()
    assert said == b"before\nit\nafter\n"


def test_a_shells_process_substitution_gets_it(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from ghostvis_cli import files; files.write(pathlib.Path(sys.argv[1]), b'it')"
    )
    line = f'"$0" -c "$1" >(cat > {tmp_path}/got); wait $!'
    subprocess.run(["bash", "-c", line, sys.executable, code], cwd=ROOT, check=True, timeout=60)
    assert (tmp_path / "got").read_text() == "it"


def test_a_directory_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path / "d", b"x")
    assert names(tmp_path) == ["d"]


@pytest.mark.parametrize("what", ["file", "fifo", "link", "broken link"])
def test_a_new_file_is_never_put_over_anything(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        (tmp_path / "b").write_text("mine")
        path.symlink_to("b")
    elif what == "file":
        path.write_text("mine")
    else:
        path.symlink_to("b")
    before = {name: os.lstat(tmp_path / name).st_ino for name in names(tmp_path)}
    if what == "broken link":
        files.write(path, b"x", over=False)
        assert (tmp_path / "b").read_text() == "x"
        return
    with pytest.raises(FileExistsError) as caught:
        files.write(path, b"x", over=False)
    assert {name: os.lstat(tmp_path / name).st_ino for name in names(tmp_path)} == before
    assert ".ghostvis-" not in str(caught.value)


@pytest.fixture
def small_files() -> Iterator[None]:
    with limited(resource.RLIMIT_FSIZE, 1000):
        yield


@pytest.mark.usefixtures("small_files")
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    files.write(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="File too large") as caught:
        files.write(tmp_path / "a", [b"x" * 700, b"y" * 700])
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]
    told = files.cannot_write(tmp_path / "a", caught.value, "df -h .")
    assert (told.message, told.hint) == (f"{tmp_path / 'a'} can't be written: File too large", "df -h .")


def test_content_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def content() -> Iterator[bytes]:
        yield b"x" * 10**6
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a", content())
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "new\nline", "\udcff"])
def test_any_name_that_a_file_may_have_will_do(tmp_path: Path, name: str) -> None:
    files.write(tmp_path / name, b"x")
    assert names(tmp_path) == [name]


def test_what_a_killed_run_left_is_removed_by_the_next_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    done = ran(f"\nwith files.replacing(Path({str(tmp_path / 'a')!r})): import os; os.kill(os.getpid(), 9)")
    assert done.returncode == -signal.SIGKILL
    [left] = names(tmp_path)
    assert files.LEFTOVER.fullmatch(left)
    (tmp_path / ".a.ghostvis-notes").write_text("mine")
    with files.replacing(tmp_path / "b"):
        now = set(names(tmp_path)) - {left, ".a.ghostvis-notes"}
        files.write(tmp_path / "c", b"x")
        assert set(names(tmp_path)) == now | {".a.ghostvis-notes", "c"}
    assert names(tmp_path) == [".a.ghostvis-notes", "b", "c"]


def test_writers_of_one_name_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for _ in range(30):
            files.write(tmp_path / "a", b"%d" % number * 10_000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert re.fullmatch(rb"(\d)\1{9999}", (tmp_path / "a").read_bytes()) and names(tmp_path) == ["a"]


@pytest.mark.parametrize("there", ["nothing", "file", "directory", "full directory", "broken link"])
@pytest.mark.parametrize("old_system", [True, False])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_rename_to_a_new_name_is_never_onto_anything(
    tmp_path: Path, kind: str, there: str, old_system: bool
) -> None:
    source, place = tmp_path / "source", tmp_path / "place"
    source.mkdir() if kind == "directory" else source.touch()
    if there == "file":
        place.write_text("mine")
    elif there == "broken link":
        place.symlink_to("nowhere")
    elif there != "nothing":
        (place / "x" if there == "full directory" else place).mkdir(parents=True)
    inode = source.lstat().st_ino
    rename = files._claim_and_rename if old_system else files.rename_new
    if there == "nothing":
        rename(source, place)
        assert place.lstat().st_ino == inode and not source.exists()
        return
    with pytest.raises(FileExistsError):
        rename(source, place)
    assert source.exists() and place.lstat().st_ino != inode


@pytest.mark.parametrize(("name", "why"), [("a\0b", "NUL"), ("a\ud800", "half a character")])
def test_a_name_that_no_file_can_have_is_an_os_error(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(OSError, match=why):
        files.write(tmp_path / name, b"")
    assert not files.is_special(tmp_path / name) and not list(tmp_path.iterdir())
