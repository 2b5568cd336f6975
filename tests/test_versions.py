"""Versions as files: numbered, moved in, out and away; on a full disk nothing is left of what was begun."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deepseek.spec import FileDigest, GateFailed, InputError, PublishedManifest
from deepseek.spec.released import last_fate
from deepseek.spec.repository import CONFIG, versions_of
from serving import versions
from serving.doctor import examine
from serving.machine import Machine
from serving.releases import Journal, alone, rolled_back
from serving.repository import MANIFEST, check_config, check_layout, check_version, config_of, models_in, read_config
from serving.versions import brought, earlier, newest, put_live, retire, same_as, stage, take_out
from serving.view import ApprovedView, decide
from tests.conftest import run_module
from tests.test_embedded import damage

FULL = r"No space left on device; make room, or name another disk"


@pytest.fixture(scope="module")
def candidate(built: Path) -> Path:
    """A repository with a version of `text`; not to be changed."""
    return built / "repository"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own, that has room for so many bytes."""
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


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, hidden files too."""
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


def test_into_the_repository_and_out_of_it_again_leaves_what_was(candidate: Path, tmp_path: Path) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    before = files_of(live)
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=newest(live))
    assert read_config(live / CONFIG).model_warmup[0].name.startswith("2-")
    assert earlier(live) == 1
    take_out(live, 2, back_to=1, archive=tmp_path / "withdrawn")
    assert files_of(live) == before
    assert check_version(tmp_path / "withdrawn", 2)[0] is not None


def test_going_back_passes_over_what_is_damaged_and_needs_something_intact(candidate: Path, tmp_path: Path) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    for number in (2, 3):
        put_live(stage(candidate / "text", number=number, folder=tmp_path / "new"), number, live, before=newest(live))
    damage(live / "2" / "model.onnx")
    assert earlier(live) == 1
    shutil.copytree(live, tmp_path / "back")
    take_out(tmp_path / "back", 3, back_to=1, archive=tmp_path / "withdrawn")
    assert versions_of(tmp_path / "back") == [1]
    assert sorted(path.name for path in (tmp_path / "withdrawn").iterdir()) == ["2", "3", "warmup"]
    assert not list((tmp_path / "back" / "warmup").glob("2-*"))
    damage(live / "1" / "model.onnx")
    with pytest.raises(GateFailed, match=r"no version before 3 to go back to; text/2: model.onnx is damaged"):
        earlier(live)


def test_three_versions_are_kept_however_their_numbers_lie(candidate: Path, tmp_path: Path) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    for number in (5, 9, 12):
        put_live(stage(candidate / "text", number=number, folder=tmp_path / "new"), number, live, before=newest(live))
    assert retire(live) == [1]
    assert sorted(path.name for path in live.iterdir()) == ["12", "5", "9", "config.pbtxt", "warmup"]
    assert not list((live / "warmup").glob("1-*"))


def test_what_was_rolled_back_is_known_when_it_comes_again(
    candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=newest(live))
    manifest = PublishedManifest.load(live / "2" / "manifest.json")
    assert rolled_back("text", manifest) is None
    with alone("text") as releases:
        Journal(releases, "rollback", 1, before=2).withdraw(live, 2, back_to=1, outcome="rolled back")
    found = rolled_back("text", manifest)
    assert found is not None
    assert found.before == 2
    manifest.files["model.onnx"] = FileDigest.of(live / "config.pbtxt")
    assert rolled_back("text", manifest) is None


def test_a_version_that_goes_is_no_change_of_the_one_that_is_served(candidate: Path, tmp_path: Path) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    for number in (2, 3, 4):
        put_live(stage(candidate / "text", number=number, folder=tmp_path / "new"), number, live, before=newest(live))
    view = ApprovedView(tmp_path / "live", tmp_path / "view", print)
    view.fill()
    assert retire(live) == [1]
    assert list(view.changes()) == []
    put_live(stage(candidate / "text", number=5, folder=tmp_path / "new"), 5, live, before=newest(live))
    assert [change.versions for change in view.changes()] == [(5,)]


@pytest.mark.parametrize("largest", [8, 4], ids=["the same profile", "a smaller one"])
def test_a_version_whose_configuration_did_not_come_any_more_is_served_under_its_own(
    candidate: Path, tmp_path: Path, largest: int
) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    staged = stage(candidate / "text", number=2, folder=tmp_path / "new")
    manifest = PublishedManifest.load(staged / "2" / MANIFEST)
    manifest.axes["batch"]["max"] = largest
    (staged / "2" / MANIFEST).write_text(manifest.model_dump_json())
    own = (staged / CONFIG).read_text().replace("max_batch_size: 8", f"max_batch_size: {largest}")
    for place in (staged, staged / "2"):
        (place / CONFIG).write_text(own)
    put_live(staged, 2, live, before=newest(live))
    shutil.copyfile(live / "1" / CONFIG, live / CONFIG)  # killed between the two renames
    found = decide(live)
    assert (found.versions, found.config, found.findings) == ((2,), live / "2" / CONFIG, ())
    assert config_of(live).max_batch_size == largest
    machine = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",))
    (said,) = (each for each in examine(live.parent, machine, kept=False)[1] if each.level != "info")
    assert (said.level, said.fix) == ("warning", f"end it: cp '{live}/2/{CONFIG}' '{live}/{CONFIG}'")


def test_a_version_whose_configuration_does_not_fit_leaves_the_older_one_in_service(
    candidate: Path, tmp_path: Path
) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=newest(live))
    (live / CONFIG).write_text((live / CONFIG).read_text().replace("max_batch_size: 8", "max_batch_size: 64"))
    found = decide(live)
    assert (found.versions, found.config) == ((1,), live / "1" / CONFIG)
    assert "max_batch_size 64 is above" in str(found.findings[0])


def test_a_candidate_that_does_not_fit_on_the_disk_is_one_line_and_leaves_nothing(
    candidate: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    full = disk(64 * 1024)
    run = run_module(
        *("serving.release", "--model", "text", "--models", "tests/models", "--repository", str(tmp_path / "live")),
        *("--new", str(candidate), "--url", "127.0.0.1:9", "--may-be-absent"),
        BUILD=str(full),
    )
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1), run.stderr
    assert FULL in run.stderr
    assert "refused" in run.stdout
    assert not list(full.rglob("model.onnx"))


def test_a_repository_that_is_full_stays_as_it_was(
    candidate: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    size = sum(map(len, files_of(candidate / "text").values()))
    live = stage(candidate / "text", number=1, folder=disk(size + size // 2) / "repository")
    before = files_of(live)
    staged = stage(candidate / "text", number=2, folder=tmp_path / "new")
    with pytest.raises(InputError, match=FULL):
        put_live(staged, 2, live, before=newest(live))
    assert files_of(live) == before


def test_what_has_no_room_to_be_kept_is_taken_out_all_the_same(
    candidate: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=newest(live))
    full = disk(64 * 1024)
    (said,) = take_out(live, 2, back_to=1, archive=full / "withdrawn")
    assert re.search(
        rf"version 2 is out, and not kept: .*{FULL}.* it lies in \S+/\.scratch-2-0, read by no server", said
    )
    assert not list(full.rglob("model.onnx"))
    assert (newest(live), decide(live).versions) == (1, (1,))
    assert read_config(live / CONFIG) == read_config(live / "1" / CONFIG)
    with brought(stage(candidate / "text", number=3, folder=tmp_path / "new"), live) as near:
        put_live(near, 3, live, before=1)
    assert not list(live.glob(".scratch-*"))


def fill(place: Path) -> None:
    """Writes until no byte more finds room."""
    with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"0" * 4096):
            pass
    assert os.statvfs(place).f_bavail == 0


def test_out_of_a_repository_without_a_byte_left_a_version_is_taken(
    candidate: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    place = disk(16 << 20)
    live = stage(candidate / "text", number=1, folder=place / "repository")
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=1)
    fill(place)
    assert take_out(live, 2, back_to=1, archive=tmp_path / "withdrawn") == []
    assert (decide(live).versions, read_config(live / CONFIG)) == ((1,), read_config(live / "1" / CONFIG))
    assert check_version(tmp_path / "withdrawn", 2)[0] is not None


def test_no_server_sees_a_version_while_it_is_copied_away(
    candidate: Path, disk: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=1)
    seen: list[int | None] = []

    def copy(source: Path, destination: Path, original: Callable[[Path, Path], None] = versions._copy) -> None:
        if destination.is_relative_to(tmp_path / "disk"):
            seen.append(newest(live))
        original(source, destination)

    monkeypatch.setattr(versions, "_copy", copy)
    assert take_out(live, 2, back_to=1, archive=disk(16 << 20) / "withdrawn") == []
    assert set(seen) == {1}


def test_a_rollback_that_is_killed_while_it_archives_is_decided_all_the_same(
    candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=1)
    files = PublishedManifest.load(live / "2" / "manifest.json").files

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(versions, "_archive", killed)
    with alone("text") as releases:
        journal = Journal(releases, "rollback", 1, before=2, repository=str(live.parent))
        with pytest.raises(KeyboardInterrupt):
            journal.withdraw(live, 2, back_to=1, outcome="rolled back")
    fate = last_fate("text", files, live.parent)
    assert fate is not None
    assert (newest(live), fate.outcome, fate.bad) == (1, "rolled back", True)


@pytest.mark.parametrize(("state", "bad"), [("failed", True), ("inconclusive", False), ("wrong input", False)])
def test_only_what_failed_a_gate_is_refused_for_good(
    state: str, bad: bool, candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    own = candidate / "text" / "1" / "manifest.json"
    with alone("text") as releases:
        journal = Journal(releases, "release", 2, before=1, repository=str(tmp_path / "live"))
        journal.keep(MANIFEST, own.read_text())
        journal.write(step="shadow", state=state, said="why")
        journal.write(outcome="refused")
    fate = last_fate("text", PublishedManifest.load(own).files, tmp_path / "live")
    assert fate is not None
    assert (fate.outcome, fate.bad) == ("refused", bad)


def test_a_record_without_a_folder_stops_no_rollback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "releases").write_text("no folder")
    journal = Journal(tmp_path / "releases", "rollback", 1, may_fail=True, before=2)
    journal.keep("manifest.json", "{}")
    assert [line["kind"] for line in journal.lines] == ["rollback"]
    assert capsys.readouterr().err.count("the record is not whole") == 1


def test_what_is_brought_to_the_repositorys_disk_is_hidden_and_then_only_renamed(
    candidate: Path, disk: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = stage(candidate / "text", number=1, folder=disk(16 << 20) / "live")
    view = ApprovedView(live.parent, tmp_path / "view", print)
    view.fill()
    with brought(stage(candidate / "text", number=2, folder=tmp_path / "new"), live) as near:
        assert (newest(live), list(view.changes())) == (1, [])
        monkeypatch.setattr(versions, "_copy", None)
        put_live(near, 2, live, before=1)
        assert [change.versions for change in view.changes()] == [(2,)]
        assert not list((tmp_path / "view" / "text").glob(".scratch-*"))
    assert check_version(live, 2)[1] == []


def test_what_comes_into_the_repository_is_on_the_disk_before_its_rename(
    candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=1)
    assert {path.stat().st_ino for path in (live / "2", *(live / "2").iterdir(), live / CONFIG)} <= synced


def test_a_rollback_goes_on_where_no_record_can_be_written(
    candidate: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=1)
    place = disk(64 * 1024)
    (place / "text" / "releases").mkdir(parents=True)
    fill(place)
    run = run_module(
        *("serving.rollback", "--model", "text", "--models", "tests/models", "--repository", str(live.parent)),
        *("--url", "127.0.0.1:9", "--json"),
        BUILD=str(place),
    )
    assert (run.returncode, newest(live), json.loads(run.stdout)["outcome"]) == (0, 1, "rolled back"), run.stderr
    assert "No space left on device; the record is not whole" in run.stderr
    assert "version 2 is out, and not kept" in run.stderr
    assert (live / ".scratch-2-0" / "model.onnx").is_file()


def test_what_another_build_published_meanwhile_is_not_released_over(candidate: Path, tmp_path: Path) -> None:
    live = stage(candidate / "text", number=4, folder=tmp_path / "live")
    put_live(stage(candidate / "text", number=5, folder=tmp_path / "new"), 5, live, before=4)
    with pytest.raises(InputError, match="its newest version is 5, not 4 as when the release began"):
        put_live(stage(candidate / "text", number=6, folder=tmp_path / "new"), 6, live, before=4)
    assert newest(live) == 5


def test_what_a_killed_publisher_left_in_the_repository_is_no_model(candidate: Path, tmp_path: Path) -> None:
    live = stage(candidate / "text", number=1, folder=tmp_path / "live")
    (live.parent / ".scratch-a" / "2").mkdir(parents=True)
    shutil.copytree(live, live.parent / ".scratch-b")
    view = ApprovedView(live.parent, tmp_path / "view", print)
    view.fill()
    assert [path.name for path in models_in(live.parent)] == ["text"]
    assert {each.level for each in check_layout(live.parent)} == {"warning"}
    assert list(view.changes()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="what others may read is only changed for root")
def test_what_root_puts_into_the_repository_others_can_read(candidate: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        live = stage(candidate / "text", number=1, folder=tmp_path / "live")
        put_live(stage(candidate / "text", number=2, folder=tmp_path / "new"), 2, live, before=1)
    finally:
        os.umask(before)
    assert (live / "2").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (live / "2").iterdir() if path.is_file()} == {0o644}
