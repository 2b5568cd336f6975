"""The files of the content-addressed cache; tests/test_build.py tests it in a build."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import values_of
from deepseek.spec import InputError
from export import cache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folder(path: Path, **files: str) -> Path:
    """A folder with text files."""
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_a_refined_entry_is_found_through_the_key_that_it_refines(place: Path, tmp_path: Path) -> None:
    entry = cache.refined("k", rows="abc")
    assert entry != cache.refined("k", rows="abd")
    assert entry is not None
    assert cache.predicted("k") is None
    cache.store(entry, folder(tmp_path / "made", model="weights"))
    assert cache.refined("k", rows="abc") == entry
    assert cache.predicted("k") == {"rows": "abc", "model": cache.sha256(tmp_path / "made" / "model")}
    cache.drop(entry)
    assert cache.predicted("k") is None


def test_a_damaged_entry_is_removed_completely(place: Path, tmp_path: Path) -> None:
    cache.store("k", folder(tmp_path / "made", a="whole", model="weights"))
    (place / "k" / "model").write_text("weighed")
    assert not cache.fetch("k", folder(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    assert not (place / "k").exists()


def test_a_full_disk_of_the_build_costs_no_entry(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    cache.store("k", folder(tmp_path / "made", model="weights"))
    with monkeypatch.context() as patched:
        patched.setattr(cache.shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            cache.fetch("k", folder(tmp_path / "out"))
    assert cache.fetch("k", folder(tmp_path / "later"))


@pytest.mark.parametrize("index", ["", "[]", '{"gone": "abc"}', None], ids=["empty", "list", "no such file", "none"])
def test_an_entry_whose_index_is_damaged_is_made_again(place: Path, tmp_path: Path, index: str | None) -> None:
    for turn in ("one", "two"):
        assert not cache.fetch("k", folder(tmp_path / f"out-{turn}"))
        cache.store("k", folder(tmp_path / turn, model="weights"))
        assert cache.fetch("k", folder(tmp_path / f"back-{turn}"))
        (place / "k" / cache.INDEX).unlink() if index is None else (place / "k" / cache.INDEX).write_text(index)


@pytest.mark.parametrize("name", ["../../mine", "{folder}/mine"])
def test_an_entry_writes_no_file_outside_the_folder(place: Path, tmp_path: Path, name: str) -> None:
    cache.store("k", folder(tmp_path / "made", model="weights"))
    (place.parent / "mine").write_text("theirs")
    name = name.format(folder=place.parent)
    index = {name: cache.sha256(place.parent / "mine")}
    (place / "k" / cache.INDEX).write_text(json.dumps(index))
    assert not cache.fetch("k", folder(tmp_path / "a" / "b" / "out"))
    assert not (tmp_path / "a" / "mine").exists()


def test_least_recently_used_entries_are_evicted(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, key in enumerate("abc"):
        cache.store(key, folder(tmp_path / key, model="x" * 4000))
        os.utime(place / key / cache.INDEX, (1000 + age, 1000 + age))
    assert cache.fetch("a", folder(tmp_path / "out"))  # now the most recently used
    monkeypatch.setenv("DEEPSEEK_CACHE_GIB", str(13000 / 2**30))
    cache.store("d", folder(tmp_path / "d", model="x" * 4000))
    assert sorted(path.name for path in place.iterdir()) == ["a", "c", "d"]


def test_files_larger_than_the_cache_are_not_stored(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store("a", folder(tmp_path / "a", model="x" * 400))
    monkeypatch.setenv("DEEPSEEK_CACHE_GIB", str(1000 / 2**30))
    cache.store("b", folder(tmp_path / "b", model="x" * 2000))
    assert [path.name for path in place.iterdir()] == ["a"]
    monkeypatch.setenv("DEEPSEEK_CACHE_GIB", "0")
    assert cache.limit_bytes() == 0


def test_a_stage_without_a_key_stores_nothing(place: Path, tmp_path: Path) -> None:
    cache.fill(folder(tmp_path / "by hand"), None, lambda out: (out / "model").write_text("weights"))
    assert (tmp_path / "by hand" / "model").is_file()
    assert cache.entries(place) == {}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "file" / "cache"))
    cache.store("k", folder(tmp_path / "made", model="weights"))
    assert not cache.fetch("k", folder(tmp_path / "out"))


def test_an_entry_that_another_user_may_not_read_is_missing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a cache that two users share, one of them with umask 077."""
    stat = os.stat

    def denied(path: int | str | Path, **how: bool) -> os.stat_result:
        if str(path).endswith(cache.INDEX):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    cache.store("k", folder(tmp_path / "made", model="weights"))
    monkeypatch.setattr(os, "stat", denied)
    assert cache.predicted("k") is None
    assert not cache.fetch("k", folder(tmp_path / "out"))


def test_with_the_cache_off_no_stage_has_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_CACHE", "off")
    monkeypatch.setenv(cache.STAGE_KEYS, '{"": "k"}')
    assert (cache.stage_key(), cache.refined(None), cache.predicted("k")) == (None, None, None)


def test_a_stage_fills_a_folder_once_for_all_later_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.STAGE_KEYS, '{"": "k", "accuracy fp16": "l"}')
    assert (cache.stage_key(), cache.stage_key("accuracy fp16"), cache.stage_key("other")) == ("k", "l", None)
    made: list[Path] = []

    def make(out: Path) -> None:
        made.append(out)
        (out / "model").write_text("weights")

    for name in ("first", "second"):
        cache.fill(folder(tmp_path / name), cache.stage_key(), make)
        assert (tmp_path / name / "model").read_text() == "weights"
    assert made == [tmp_path / "first"]


@pytest.mark.parametrize("value", ["lots", "-1", "nan", "inf"])
def test_an_invalid_size_is_one_error_line(value: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_CACHE_GIB", value)
    with pytest.raises(InputError, match="CACHE_GIB: seen"):
        cache.limit_bytes()


def test_one_of_several_concurrent_builds_makes_what_all_need(place: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from export import cache\n"
        "out = Path(sys.argv[1]); out.mkdir()\n"
        "with cache.alone_with('k'):\n"
        "    if not cache.fetch('k', out):\n"
        "        time.sleep(1); (out / 'model').write_text('x'); cache.store('k', out); print('made')\n"
    )
    arguments = [[sys.executable, "-c", program, str(tmp_path / str(number))] for number in range(3)]
    builds = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True) for each in arguments]
    assert sorted(build.communicate()[0] for build in builds) == ["", "", "made\n"]
    assert [(tmp_path / str(number) / "model").read_text() for number in range(3)] == ["x"] * 3


def test_a_part_of_a_stage_does_not_end_the_lock_of_the_stage(place: Path) -> None:
    program = "import sys; from export import cache\nwith cache.alone_with(sys.argv[1]): print('alone')"
    with cache.alone_with("stage"):
        with cache.alone_with("part"):
            pass
        other = subprocess.Popen(
            [sys.executable, "-c", program, "stage"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert other.stderr is not None
        assert other.stderr.readline().startswith("waiting for another build of the same entry")
        assert other.poll() is None
    assert other.communicate() == ("alone\n", "")


def test_the_command_clears_the_cache(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.store("k", folder(tmp_path / "made", model="weights"))
    cache.clear(values_of("clean-cache"))
    assert not list(place.iterdir())
    assert capsys.readouterr().out.endswith(" B removed\n")


def test_the_command_counts_only_what_it_removed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.store("k", folder(tmp_path / "made", model="weights"))
    monkeypatch.setattr(cache, "_remove", lambda _: None)  # as with another user's entry
    cache.clear(values_of("clean-cache"))
    (size,) = cache.entries(place).values()
    assert capsys.readouterr().out.endswith(f": 0 B removed, {size} B could not be removed\n")
