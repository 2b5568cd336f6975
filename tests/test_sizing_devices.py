"""The file of devices: complete, with sources, and checked when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.sizing import load_devices
from deepseek.sizing.devices import THIS_MACHINE, Device, measured_path, read_devices, write_device
from deepseek.spec import InputError

MINE = """[mine]
name = "Mine"
memory_gib = 1
bandwidth_gb_s = 100
compute_units = 10
rates = { fp32 = 1, fp16 = 2.5 }
source = "a datasheet"
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the measured machine of this checkout."""
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "build"))


def test_every_required_device_exists_with_a_source() -> None:
    devices = load_devices()
    wanted = [
        "t4",
        "v100-16",
        "v100-32",
        "a10",
        "a30",
        "l4",
        "l40s",
        "a100-40",
        "a100-80",
        "h100",
        "h200",
        "b200",
        "mi300x",
        "ascend-910b",
    ]
    assert list(devices) == wanted
    assert all(len(device.source) > 20 for device in devices.values())
    assert all(device.rates["fp16"] > device.rates["fp32"] for device in devices.values())


def test_your_own_file_replaces_the_projects(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    (device,) = load_devices(path).values()
    assert (device.rate("fp16"), device.usable_bytes) == (2.5e12, 0.8 * 2**30)
    with pytest.raises(InputError, match="Mine has no rate for int8; it has fp16, fp32"):
        device.rate("int8")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("memory_gib = 1", "memory_gib = -1", "mine.memory_gib: seen -1.*greater than 0"),
        ("memory_gib = 1", "memory_gib = nan", "mine.memory_gib: seen nan; it must be a finite number"),
        ("memory_gib = 1", "memory_gb = 1", "mine.memory_gb: unknown key .* did you mean memory_gib"),
        ("fp32 = 1, ", "", "mine.rates: seen fp16; fp32 is required"),
        ("[mine]", "[mine", "not valid TOML"),
        ("[mine]", 'mine = "yes"\n[other]', "each device is a table.*seen mine, other"),
    ],
)
def test_a_malformed_file_is_a_one_line_error_with_the_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace(old, new))
    with pytest.raises(InputError, match=says) as error:
        read_devices(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_an_empty_or_missing_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(InputError, match="each device is a table"):
        read_devices(tmp_path / "empty.toml")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_devices(tmp_path / "absent.toml")


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"device 'a1000' is not in .* it has t4, "):
        load_devices(names=["a1000"])
    with pytest.raises(InputError, match="MEASURE=1"):
        load_devices(names=[THIS_MACHINE])


def test_a_measured_machine_is_written_and_read_back() -> None:
    device = Device(
        name='A "CPU"',
        memory_gib=3.5,
        bandwidth_gb_s=12.25,
        compute_units=2,
        rates={"fp32": 0.125},
        launch_us=0.5,
        platform="cpu",
        source="measured",
    )
    write_device(measured_path(), THIS_MACHINE, device)
    assert load_devices()[THIS_MACHINE] == device
