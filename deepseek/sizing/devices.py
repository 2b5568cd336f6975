"""The devices that a plan compares: those of `deepseek/devices.toml` or of your own file, and this machine.

Contract: every figure is checked when the file is read; a mistake raises InputError in one line with the file, the key,
the value seen and what is allowed. `make plan MEASURE=1` measures "this-machine" and writes it to
`$DEEPSEEK_BUILD/this-machine.toml`, in the same format.
"""

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from deepseek.precisions import NumberType
from deepseek.settings import NotNegative, Positive
from deepseek.sizing.memory import FILL
from deepseek.sizing.training_step import Platform
from deepseek.spec import InputError, build_dir
from deepseek.spec.checks import Table, checked, listed, read_toml
from deepseek.spec.files.folders import write_whole

THIS_MACHINE = "this-machine"
Efficiency = Annotated[float, Field(gt=0, le=1)]


class Device(Table):
    """One kind of accelerator, or a machine's CPU. `deepseek/devices.toml` explains the keys."""

    name: str = Field(min_length=1)
    memory_gib: Positive
    bandwidth_gb_s: Positive
    compute_units: int = Field(ge=1)
    rates: dict[NumberType, Positive] = Field(min_length=1)
    """Dense TFLOPS (TOPS) of matrix products by type."""
    efficiency: dict[NumberType, Efficiency] = {}
    """Share of the rate that large products reach; absent: the default of `deepseek.sizing.roofline`."""
    attention_share: dict[NumberType, Efficiency] = {}
    """Rate of the products in attention, as a share of that of large products; absent: the default of
    `deepseek.sizing.roofline`."""
    bandwidth_efficiency: Efficiency | None = None
    launch_us: Positive | None = None
    """Launch overhead per operation; absent: that of a GPU with CUDA graphs."""
    elements_g_s: Positive | None = None
    """On a CPU: 1e9 results/s of the elementwise operations between products, which are not fused."""
    instances: int = Field(1, ge=1)
    """Copies of a model that run in parallel, each at these figures: they divide the cores of a CPU."""
    platform: Platform = "accelerator"
    interconnect: str = "none"
    interconnect_gb_s: Positive | None = None
    price_usd_hour: NotNegative | None = None
    source: str = Field(min_length=1)

    @field_validator("rates")
    @classmethod
    def _has_a_common_type(cls, rates: dict[str, float]) -> dict[str, float]:
        if "fp32" not in rates:
            raise ValueError(f"seen {listed(rates)}; fp32 is required")
        return rates

    @property
    def usable_bytes(self) -> float:
        """Memory that a plan may fill: 80 %."""
        return FILL * self.memory_gib * 2**30

    def runs(self, precision: str) -> bool:
        """Whether it has units for a type."""
        return precision in self.rates

    def rate(self, precision: str) -> float:
        """FLOP/s of matrix products. Raises InputError for a type without units."""
        if precision not in self.rates:
            raise InputError(f"{self.name} has no rate for {precision}; it has {listed(self.rates)}")
        return self.rates[precision] * 1e12


def load_devices(
    path: str | Path | None = None, *, names: Iterable[str] = (), measured: bool = False
) -> dict[str, Device]:
    """Devices by key, all or only `names`; `path` replaces the project's and, unless `measured`, this machine."""
    file = Path(path) if path else Path(str(files("deepseek") / "devices.toml"))
    found = read_devices(file)
    if (measured or not path) and measured_path().is_file():
        found |= read_devices(measured_path())
    wanted = list(names) or list(found)
    for name in wanted:
        if name not in found:
            hint = "; measure it with: make plan MEASURE=1" if name == THIS_MACHINE else ""
            raise InputError(f"device {name!r} is not in {file}; it has {', '.join(found)}{hint}")
    return {name: found[name] for name in wanted}


def measured_path() -> Path:
    return build_dir(f"{THIS_MACHINE}.toml")


def read_devices(path: Path) -> dict[str, Device]:
    """Reads one file of devices. Raises InputError in one line."""
    tables = read_toml(path)
    if not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise InputError(f"{path}: each device is a table, like [t4] in deepseek/devices.toml; seen {listed(tables)}")
    return {key: checked(Device, table, path, f"{key}.") for key, table in tables.items()}


def write_device(path: Path, key: str, device: Device) -> None:
    """Writes one device to a file that `read_devices` can read."""
    lines = [f"[{key}]"]
    for name, value in device.model_dump(exclude_none=True, exclude_defaults=True).items():
        # Numbers and strings are written as in JSON; objects become dotted keys.
        each = {f"{name}.{kind}": share for kind, share in value.items()} if isinstance(value, dict) else {name: value}
        lines += [f"{full} = {json.dumps(part, ensure_ascii=False)}" for full, part in each.items()]
    write_whole(path, "\n".join(lines) + "\n")
