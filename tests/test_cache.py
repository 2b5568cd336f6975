"""The content-addressed cache, its files only; tests/test_make.py has it in a build."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.spec import InputError
from export import cache
from tests.warm import run_warm


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folder(path: Path, **files: str) -> Path:
    """A folder with text files."""
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_what_was_stored_is_fetched_by_the_same_key_only(place: Path, tmp_path: Path) -> None:
    key = cache.key_of("quantize", sources={"onnx": "abc"})
    cache.store(key, folder(tmp_path / "made", model="weights", manifest="{}"))
    assert cache.fetch(cache.key_of("quantize", sources={"onnx": "abc"}), folder(tmp_path / "out"))
    assert (tmp_path / "out" / "model").read_text() == "weights"
    for other in (cache.key_of("quantize", sources={"onnx": "abd"}), cache.key_of("to_onnx", sources={"onnx": "abc"})):
        assert not cache.fetch(other, folder(tmp_path / other))


def test_the_key_follows_the_code_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "layers_of_a_user.py").write_text("WIDTH = 1")
    before = cache.key_of("to_onnx")
    importlib.import_module("layers_of_a_user")
    loaded = cache.key_of("to_onnx")
    (tmp_path / "layers_of_a_user.py").write_text("WIDTH = 2")
    assert len({before, loaded, cache.key_of("to_onnx")}) == 3


def test_the_key_follows_the_stage_that_runs_as_a_command(tmp_path: Path) -> None:
    stage, keys = tmp_path / "stage.py", set()
    for line in ("WIDTH = 1", "WIDTH = 2"):
        stage.write_text(f"from export import cache\n{line}\nprint(cache.key_of('stage'))\n")
        run = subprocess.run(
            [sys.executable, stage], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
        )
        keys.add(run.stdout)
    assert len(keys) == 2, keys


def test_a_damaged_entry_is_dropped_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    cache.store("k", folder(tmp_path / "made", a="whole", model="weights"))
    (place / "k" / "model").write_text("weighed")
    assert not cache.fetch("k", folder(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    assert not (place / "k").exists()


@pytest.mark.parametrize("index", ["", "[]", '{"gone": "abc"}', None], ids=["empty", "list", "no such file", "none"])
def test_an_entry_whose_index_is_damaged_is_made_again(place: Path, tmp_path: Path, index: str | None) -> None:
    for turn in ("one", "two"):
        assert not cache.fetch("k", folder(tmp_path / f"out-{turn}"))
        cache.store("k", folder(tmp_path / turn, model="weights"))
        assert cache.fetch("k", folder(tmp_path / f"back-{turn}"))
        (place / "k" / cache.INDEX).unlink() if index is None else (place / "k" / cache.INDEX).write_text(index)


def test_the_entries_used_longest_ago_make_room(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, key in enumerate("abc"):
        cache.store(key, folder(tmp_path / key, model="x" * 4000))
        os.utime(place / key / cache.INDEX, (1000 + age, 1000 + age))
    assert cache.fetch("a", folder(tmp_path / "out"))  # used: now the youngest
    monkeypatch.setenv("CACHE_GIB", str(13000 / 2**30))
    cache.store("d", folder(tmp_path / "d", model="x" * 4000))
    assert sorted(path.name for path in place.iterdir()) == ["a", "c", "d"]


def test_what_is_larger_than_the_cache_is_not_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store("a", folder(tmp_path / "a", model="x" * 400))
    monkeypatch.setenv("CACHE_GIB", str(1000 / 2**30))
    cache.store("b", folder(tmp_path / "b", model="x" * 2000))
    assert [path.name for path in place.iterdir()] == ["a"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CACHE", str(tmp_path / "file" / "cache"))
    cache.store("k", folder(tmp_path / "made", model="weights"))
    assert not cache.fetch("k", folder(tmp_path / "out"))


def test_off_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE", "off")
    monkeypatch.setenv("HOME", str(tmp_path))
    cache.store("k", folder(tmp_path / "made", model="weights"))
    assert not (tmp_path / ".cache").exists()


def test_the_files_of_a_model_folder_are_found_through_links_and_not_where_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for name in (
        "model/model.py",
        "model/.git/index",
        "model/.venv/lib/x.py",
        "model/__pycache__/x.pyc",
        "words/a b.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (folder / "words").symlink_to(tmp_path / "words")
    (folder / "back").symlink_to(tmp_path)
    assert sorted(cache.files_in(folder)) == ["model.py", "words/a b.txt"]


@pytest.mark.parametrize("value", ["lots", "-1", "nan", "inf"])
def test_a_wrong_size_is_one_line(value: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_GIB", value)
    with pytest.raises(InputError, match="CACHE_GIB: seen"):
        cache.key_of("any")  # before anything is built


def test_builds_at_once_share_one_cache(place: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from export import cache\n"
        "for turn in range(40):\n"
        "    key, out = f'k{turn % 5}', Path(sys.argv[2]) / str(turn); out.mkdir(parents=True)\n"
        "    if cache.fetch(key, out): assert (out / 'model').read_text() == key * 500\n"
        "    else: (out / 'model').write_text(key * 500); cache.store(key, out)\n"
    )
    environment = {**os.environ, "CACHE_GIB": str(3500 / 2**30)}  # three of the five: entries come and go
    builds = [
        subprocess.Popen([sys.executable, "-c", program, "", tmp_path / str(number)], env=environment)
        for number in range(4)
    ]
    assert [build.wait() for build in builds] == [0, 0, 0, 0]
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []


def test_of_builds_at_once_one_makes_what_all_need(place: Path, tmp_path: Path) -> None:
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


def test_an_entry_of_another_user_is_read(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store("k", folder(tmp_path / "made", model="weights"))

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert cache.fetch("k", folder(tmp_path / "out"))
    assert (place / "k").is_dir()


def test_the_command_counts_and_clears(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.store("k", folder(tmp_path / "made", model="weights"))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(sys, "argv", ["cache"])
        cache.main()
        patch.setattr(sys, "argv", ["cache", "--clear"])
        cache.main()
    lines = capsys.readouterr().out.splitlines()
    assert ": 1 artifacts, " in lines[0]
    assert ": 0 artifacts, 0 B of at most 10.00 GiB" in lines[1]


STAGES = (
    ("export.prune", "--ratio", "0.25"),
    ("export.to_onnx",),
    ("export.to_torchscript",),
    ("export.quantize", "--precision", "int8", "--high-precision", "fp32"),
    ("export.compare", "--precision", "int8"),
)


@pytest.mark.slow
def test_no_stage_makes_again_what_another_clone_has_made(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    used = {}
    for clone in (tmp_path / "first", tmp_path / "second" / "deeper"):
        for room in ("deepseek", "export", "tests/models"):
            shutil.copytree(room, clone / room, ignore=shutil.ignore_patterns("__pycache__"))
        for stage, *flags in STAGES:
            arguments = [stage, "--models", "tests/models", "--model", "image", *flags]
            run = run_warm(arguments, os.environ | {"CACHE": str(place)}, clone)
            assert run.returncode == 0, run.stderr
        used[clone] = {index.parent.name for index in place.glob(f"*/{cache.INDEX}") if index.stat().st_mtime > 2000}
        for index in place.glob(f"*/{cache.INDEX}"):
            os.utime(index, (1000, 1000))
    first, second = used.values()
    assert len(first) == len(STAGES) + 1  # compare measures int8 and fp32
    assert first == second
    assert len(list(place.glob(f"*/{cache.INDEX}"))) == len(first)
