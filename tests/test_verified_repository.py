"""A server follows a repository: it sees only changes that are complete, readable and needed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deepseek.spec.files.repository import CONFIG, versions_of
from deepseek.spec.files.version_files import retire
from serving.embedded import verified_repository
from serving.embedded.verified_repository import VerifiedRepository
from serving.repository.checks import check_layout, models_in
from tests.test_versions import Disk, Release, candidate, disk, live, release

__all__ = ["candidate", "disk", "live", "release"]  # fixtures


def test_an_old_version_that_goes_does_not_reload_the_one_that_is_served(
    live: Path, release: Release, tmp_path: Path
) -> None:
    release(2, 3, 4)
    view = VerifiedRepository(tmp_path / "live", tmp_path / "view", print)
    view.fill()
    assert retire(live) == [1]
    assert list(view.changes()) == []
    release(5)
    assert [change.action for change in view.changes()] == ["load"]
    assert versions_of(tmp_path / "view" / "text") == [5]


@pytest.mark.parametrize("hidden", ["repository", "model", "configuration"])
def test_what_cannot_be_read_for_a_while_keeps_serving(hidden: str, live: Path, tmp_path: Path) -> None:
    said: list[str] = []
    view = VerifiedRepository(live.parent, tmp_path / "view", said.append)
    view.fill()
    said.clear()
    place = {"repository": live.parent, "model": live, "configuration": live / CONFIG}[hidden]
    away = place.rename(tmp_path / "away")
    if place == live:
        live.symlink_to(live)  # as unreadable as a folder of another user, also for root
    assert [*view.changes(), *view.changes()] == []
    assert said == [f"warning   {live / CONFIG}: cannot be read; what is served keeps serving"]
    place.unlink(missing_ok=True)
    away.rename(place)
    assert list(view.changes()) == []
    shutil.rmtree(live)
    assert [change.action for change in view.changes()] == ["unload"]


def test_a_model_that_leaves_during_a_look_is_unloaded_at_the_next_one(
    live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = VerifiedRepository(live.parent, tmp_path / "view", print)
    view.fill()

    def leaving(model: Path) -> Iterator[Path]:
        yield model / CONFIG
        shutil.rmtree(model)
        raise FileNotFoundError

    monkeypatch.setattr(verified_repository, "everything_in", leaving)
    assert list(view.changes()) == []
    assert [change.action for change in view.changes()] == ["unload"]


def test_a_look_that_fails_is_repeated(
    live: Path, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    view = VerifiedRepository(live.parent, tmp_path / "view", said.append)
    view.fill()
    release(2)
    said.clear()

    def stale(repository: Path) -> list[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    def leaving(source: Path, target: Path) -> None:
        with suppress(FileNotFoundError):
            (live / CONFIG).rename(tmp_path / CONFIG)

    for name, broken in (("model_folders", stale), ("_mirror", leaving)):
        with monkeypatch.context() as patched:
            patched.setattr(verified_repository, name, broken)
            assert list(view.changes()) == []
    (tmp_path / CONFIG).rename(live / CONFIG)
    assert said == [f"warning   {live.parent}: cannot be read (Stale file handle); what is served keeps serving"]
    assert [change.action for change in view.changes()] == ["load"]
    assert versions_of(view.folder / "text") == [2]


def test_a_version_that_finds_no_room_is_reported_and_taken_later(live: Path, release: Release, disk: Disk) -> None:
    said: list[str] = []
    size = len((live / CONFIG).read_bytes())
    place = disk(2 * -(-size // 4096) * 4096)  # for the configurations of two versions
    view = VerifiedRepository(live.parent, place / "view", said.append)
    view.fill()
    said.clear()
    (place / "other").write_bytes(bytes(size))
    release(2)
    assert [change for _ in range(3) for change in view.changes()] == []
    assert said == ["refused   text: its files cannot be read or linked: [Errno 28] No space left on device"]
    (place / "other").unlink()
    assert [change.action for change in view.changes()] == ["load"]
    assert versions_of(view.folder / "text") == [2]


def test_the_leftovers_of_a_killed_publisher_are_ignored(live: Path, tmp_path: Path) -> None:
    (live.parent / ".scratch-a" / "2").mkdir(parents=True)
    shutil.copytree(live, live.parent / ".scratch-b")
    view = VerifiedRepository(live.parent, tmp_path / "view", print)
    view.fill()
    assert [path.name for path in models_in(live.parent)] == ["text"]
    assert check_layout(live.parent) == []
    assert list(view.changes()) == []
