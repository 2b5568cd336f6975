"""Versions as files: numbered, moved in, moved out and archived; a full disk leaves no partial files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deepseek.spec import GateFailed, InputError, PublishedManifest
from deepseek.spec.files import version_files
from deepseek.spec.files.released import last_fate
from deepseek.spec.files.repository import CONFIG, versions_of
from deepseek.spec.files.version_files import retire
from serving.embedded.verified_repository import VerifiedRepository
from serving.release import versions
from serving.release.journal import ReleaseJournal, exclusive
from serving.release.versions import (
    beside_repository,
    move_in,
    move_out,
    newest,
    previous_intact,
    same_as,
    stage,
)
from serving.repository.checks import MANIFEST, check_version, config_of, read_config
from serving.repository.config_checks import check_config
from serving.repository.version_choice import choose_versions
from tests.conftest import run_module
from tests.test_embedded import damage

Release = Callable[..., None]
Disk = Callable[[int], Path]
FULL = r"No space left on device; free some space, or use another disk"


@pytest.fixture(scope="module")
def candidate(built: Path) -> Path:
    """A repository with a version of `text`; tests must not change it."""
    return built / "repository"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A separate file system with room for this many bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted: list[Path] = []

    def make(size_bytes: int) -> Path:
        if os.geteuid() != 0:
            pytest.skip("only root may mount a tmpfs")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {run.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for each in mounted:
        subprocess.run(["umount", "--lazy", str(each)], check=True)


@pytest.fixture
def live(candidate: Path, tmp_path: Path) -> Path:
    """A model with version 1, in a separate repository."""
    return stage(candidate / "text", number=1, folder=tmp_path / "live")


@pytest.fixture
def release(candidate: Path, live: Path, tmp_path: Path) -> Release:
    def move(*numbers: int) -> None:
        for number in numbers:
            move_in(
                stage(candidate / "text", number=number, folder=tmp_path / "new"), number, live, before=newest(live)
            )

    return move


def files_of(folder: Path) -> dict[str, bytes]:
    """All names in a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_candidate_takes_its_number_with_its_warmup_and_fits(candidate: Path, tmp_path: Path) -> None:
    staged = stage(candidate / "text", number=7, folder=tmp_path / "new")
    config = read_config(staged / CONFIG)
    assert sorted(path.name for path in (staged / "warmup").iterdir()) == ["7-attention_mask", "7-input_ids"]
    assert config == read_config(staged / "7" / CONFIG)
    manifest, wrong = check_version(staged, 7)
    assert manifest is not None
    assert (wrong, check_config(staged, config, manifest)) == ([], [])
    assert same_as(staged, 7, candidate / "text", 1)
    assert not same_as(staged, 7, tmp_path / "new" / "text", 8)


def test_a_version_that_make_engine_did_not_publish_is_refused(candidate: Path, tmp_path: Path) -> None:
    (tmp_path / "text" / "3").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"text: version 3 has no manifest\.json: make engine did not publish it; name"
    ):
        stage(tmp_path / "text", number=7, folder=tmp_path / "new")
    with pytest.raises(InputError, match="gone: no version; name a repository that make engine published into"):
        stage(tmp_path / "gone", number=7, folder=tmp_path / "new")
    assert not same_as(candidate / "text", 1, tmp_path / "text", 3)


def test_caches_and_unfinished_files_in_a_version_are_not_copied(live: Path, tmp_path: Path) -> None:
    before = set(files_of(live / "1"))
    for left in ("__pycache__/model.pyc", ".scratch-0/model.onnx"):
        (live / "1" / left).parent.mkdir()
        (live / "1" / left).write_text("left")
    assert set(files_of(stage(live, number=2, folder=tmp_path / "new") / "2")) == before


def test_moving_a_version_in_and_out_again_restores_the_repository(
    live: Path, release: Release, tmp_path: Path
) -> None:
    before = files_of(live)
    release(2)
    assert read_config(live / CONFIG).model_warmup[0].name.startswith("2-")
    assert previous_intact(live) == 1
    move_out(live, 2, back_to=1, archive=tmp_path / "withdrawn")
    assert files_of(live) == before
    assert check_version(tmp_path / "withdrawn", 2)[0] is not None


def test_a_move_that_fails_on_one_disk_copies_nothing(tmp_path: Path) -> None:
    for name in ("from/inner", "to/inner"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        version_files.move(tmp_path / "from", tmp_path / "to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]


def test_an_interrupted_copy_to_another_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across(source: Path, destination: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def interrupted(source: Path, destination: Path) -> None:
        destination.mkdir()
        raise KeyboardInterrupt

    (tmp_path / "from").mkdir()
    monkeypatch.setattr(os, "rename", across)
    monkeypatch.setattr(version_files, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        version_files.move(tmp_path / "from", tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_the_configuration_never_names_a_missing_version(
    live: Path, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[bool] = []

    def named() -> list[int]:
        return list(read_config(live / CONFIG).version_policy.specific.versions)

    def watched(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def then_looked_at(source: Path, destination: Path) -> None:
            rename(source, destination)
            moments.append(set(named()) <= set(versions_of(live)))

        return then_looked_at

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    release(2)
    assert named() == [2]
    move_out(live, 2, back_to=1, archive=tmp_path / "withdrawn")
    assert named() == [1]
    assert len(moments) > 5
    assert all(moments)


def test_a_rollback_skips_damaged_versions_and_needs_an_intact_one(
    live: Path, release: Release, tmp_path: Path
) -> None:
    release(2, 3)
    damage(live / "2" / "model.onnx")
    assert previous_intact(live) == 1
    shutil.copytree(live, tmp_path / "back")
    move_out(tmp_path / "back", 3, back_to=1, archive=tmp_path / "withdrawn")
    assert versions_of(tmp_path / "back") == [1]
    assert sorted(path.name for path in (tmp_path / "withdrawn").iterdir()) == ["2", "3", "warmup"]
    assert not list((tmp_path / "back" / "warmup").glob("2-*"))
    with pytest.raises(InputError, match=r"no version before 1 to go back to; .*: make release$"):
        previous_intact(tmp_path / "back")
    damage(live / "1" / "model.onnx")
    with pytest.raises(GateFailed, match=r"no version before 3 to go back to; text/2: model.onnx is damaged"):
        previous_intact(live)


def test_the_newest_three_versions_are_kept(live: Path, release: Release) -> None:
    release(5, 9, 12)
    assert retire(live) == [1]
    assert sorted(path.name for path in live.iterdir()) == ["12", "5", "9", "config.pbtxt", "warmup"]
    assert not list((live / "warmup").glob("1-*"))


def test_the_newest_version_is_served_under_the_configuration_that_fits_it_or_not_at_all(
    live: Path, candidate: Path, tmp_path: Path
) -> None:
    staged = stage(candidate / "text", number=2, folder=tmp_path / "new")
    manifest = PublishedManifest.load(staged / "2" / MANIFEST)
    manifest.axes["batch"]["max"] = 4
    (staged / "2" / MANIFEST).write_text(manifest.model_dump_json())
    own = (staged / CONFIG).read_text().replace("max_batch_size: 8", "max_batch_size: 4")
    for place in (staged, staged / "2"):
        (place / CONFIG).write_text(own)
    move_in(staged, 2, live, before=newest(live))
    shutil.copyfile(live / "1" / CONFIG, live / CONFIG)  # killed between the two renames
    found = choose_versions(live)
    assert (found.versions, found.config, found.findings) == ((2,), live / "2" / CONFIG, ())
    assert config_of(live).max_batch_size == 4
    (live / CONFIG).write_text(own.replace("max_batch_size: 4", "max_batch_size: 64"))
    found = choose_versions(live)
    assert (found.versions, found.config) == ((1,), live / "1" / CONFIG)
    assert "max_batch_size 64 is above" in str(found.findings[0])


def test_a_full_repository_stays_unchanged(candidate: Path, disk: Disk, tmp_path: Path) -> None:
    size = sum(map(len, files_of(candidate / "text").values()))
    live = stage(candidate / "text", number=1, folder=disk(size + size // 2) / "repository")
    before = files_of(live)
    staged = stage(candidate / "text", number=2, folder=tmp_path / "new")
    with pytest.raises(InputError, match=FULL):
        move_in(staged, 2, live, before=newest(live))
    assert files_of(live) == before


def test_a_candidate_that_does_not_fit_on_the_disk_is_one_line_and_leaves_nothing(
    candidate: Path, disk: Disk, tmp_path: Path
) -> None:
    full = disk(64 * 1024)
    which = ("--model", "text", "--models", "tests/models", "--repository", str(tmp_path / "live"))
    flags = ("--new", str(candidate), "--grpc-port", "9")
    run = run_module("cli", "release", *which, *flags, DEEPSEEK_BUILD=str(full))
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1), run.stderr
    assert FULL in run.stderr
    assert "refused" in run.stdout
    assert not list(full.rglob("model.onnx"))


def fill(place: Path) -> None:
    """Fills the disk to the last byte."""
    with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"0" * 4096):
            pass
    assert os.statvfs(place).f_bavail == 0


def test_a_version_leaves_a_repository_on_a_full_disk(candidate: Path, disk: Disk, tmp_path: Path) -> None:
    place = disk(16 << 20)
    live = stage(candidate / "text", number=1, folder=place / "repository")
    move_in(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=1)
    fill(place)
    assert move_out(live, 2, back_to=1, archive=tmp_path / "withdrawn" / "text") == []
    assert (choose_versions(live).versions, read_config(live / CONFIG)) == ((1,), read_config(live / "1" / CONFIG))
    assert check_version(tmp_path / "withdrawn" / "text", 2)[0] is not None


def test_a_rollback_killed_while_it_archives_counts_as_done(
    live: Path, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    release(2)
    files = PublishedManifest.load(live / "2" / "manifest.json").files

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(versions, "_archive", killed)
    with exclusive("text") as releases:
        journal = ReleaseJournal(releases, "rollback", 1, before=2, repository=str(live.parent))
        with pytest.raises(KeyboardInterrupt):
            journal.withdraw(live, 2, back_to=1, outcome="rolled back")
    fate = last_fate("text", files, live.parent)
    assert fate is not None
    assert (newest(live), fate.outcome, fate.bad) == (1, "rolled back", True)


@pytest.mark.parametrize(("state", "bad"), [("failed", True), ("inconclusive", False), ("wrong input", False)])
def test_only_a_failed_gate_counts_against_a_version_later(
    state: str, bad: bool, candidate: Path, own_build: Path
) -> None:
    own = candidate / "text" / "1" / "manifest.json"
    with exclusive("text") as releases:
        journal = ReleaseJournal(releases, "release", 2, before=1, repository=str(own_build / "live"))
        journal.keep(MANIFEST, own.read_text())
        journal.write(step="shadow", state=state, said="why")
        journal.write(outcome="refused")
    fate = last_fate("text", PublishedManifest.load(own).files, own_build / "live")
    assert fate is not None
    assert (fate.outcome, fate.bad) == ("refused", bad)


def test_a_version_brought_to_the_repositorys_disk_is_hidden_and_later_only_renamed(
    candidate: Path, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = stage(candidate / "text", number=1, folder=disk(16 << 20) / "live")
    view = VerifiedRepository(live.parent, tmp_path / "view", print)
    view.fill()
    with beside_repository(stage(candidate / "text", number=2, folder=tmp_path / "new"), live) as near:
        assert (newest(live), list(view.changes())) == (1, [])
        monkeypatch.setattr(version_files, "copy", None)
        move_in(near, 2, live, before=1)
        assert [change.action for change in view.changes()] == ["load"]
        assert versions_of(view.folder / "text") == [2]
        assert not list((tmp_path / "view" / "text").glob(".scratch-*"))
    assert check_version(live, 2)[1] == []


def test_new_files_are_flushed_to_disk_before_their_rename(
    live: Path, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    release(2)
    assert {path.stat().st_ino for path in (live / "2", *(live / "2").iterdir(), live / CONFIG)} <= synced


def test_a_rollback_works_without_a_record(live: Path, release: Release, disk: Disk) -> None:
    release(2)
    place = disk(64 * 1024)
    (place / "text" / "releases").mkdir(parents=True)
    fill(place)
    run = run_module(
        *("cli", "rollback", "--model", "text", "--models", "tests/models", "--repository", str(live.parent)),
        *("--url", "127.0.0.1:9", "--json"),
        DEEPSEEK_BUILD=str(place),
    )
    assert (run.returncode, newest(live), json.loads(run.stdout)["outcome"]) == (0, 1, "rolled back"), run.stderr
    assert "No space left on device; the record is incomplete" in run.stderr
    assert "version 2 is withdrawn, but not archived" in run.stderr
    assert f"until the next release it is in {live / '.scratch-2-0'}, hidden from servers" in run.stderr
    assert (live / ".scratch-2-0" / "model.onnx").is_file()


def test_a_release_stops_if_another_build_published_a_version(candidate: Path, tmp_path: Path) -> None:
    live = stage(candidate / "text", number=4, folder=tmp_path / "live")
    move_in(stage(candidate / "text", number=5, folder=tmp_path / "new"), 5, live, before=4)
    with pytest.raises(InputError, match="its newest version is 5, but was 4 at the start"):
        move_in(stage(candidate / "text", number=6, folder=tmp_path / "new"), 6, live, before=4)
    assert newest(live) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="what others may read is only changed for root")
def test_others_can_read_what_root_publishes_and_rolls_back_to(live: Path, release: Release, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        release(2)
        release(3)
        move_out(live, 3, back_to=2, archive=tmp_path / "withdrawn")
    finally:
        os.umask(before)
    assert (live / "config.pbtxt").stat().st_mode & 0o777 == 0o644
    assert (live / "2").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (live / "2").iterdir() if path.is_file()} == {0o644}
