"""The devices that a plan may choose from: `deepseek/devices.toml`, a file of one's own, and this machine.

Contract: every figure is checked when the file is read; a mistake is an InputError in one line, with the file, the key,
the value seen and what is allowed. "this-machine" is what `make plan MEASURE=1` measured
(`$BUILD/this-machine.toml`, the same format).

Examples:
    devices = load_devices()                         # deepseek/devices.toml, and this machine if it was measured
    devices["a100-80"].rate("fp16")                  # 3.12e14 FLOPs a second
    load_devices("my-devices.toml", names=["h100"])
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from deepseek.sizing.memory import FILL
from deepseek.sizing.training_step import Platform
from deepseek.spec import InputError
from deepseek.spec.checks import Table, first_error, listed
from deepseek.spec.folders import write_whole

THIS_MACHINE = "this-machine"
Type = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Device(Table):
    """One kind of accelerator, or a machine's CPU; units as the names say. See `deepseek/devices.toml`."""

    name: str = Field(min_length=1)
    memory_gib: Positive
    bandwidth_gb_s: Positive
    compute_units: int = Field(ge=1)
    rates: dict[Type, Positive] = Field(min_length=1)
    """Dense TFLOPS (TOPS) of matrix products by type."""
    efficiency: dict[Type, Share] = {}
    """Share of the rate that large products reach; absent: the default of `deepseek.sizing.roofline`."""
    attention_share: dict[Type, Share] = {}
    """Share of what products reach that attention's do; absent: the default of `deepseek.sizing.roofline`."""
    bandwidth_efficiency: Share | None = None
    launch_us: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Time that each operation takes on top; absent: that of a GPU with CUDA graphs."""
    elements_g_s: Positive | None = None
    """Of a CPU: results a second, in 1e9, of operations between products, which nothing fuses."""
    instances: int = Field(1, ge=1)
    """Copies of a model that run side by side, each at these figures: a CPU's cores divided."""
    platform: Platform = "accelerator"
    interconnect: str = "none"
    interconnect_gb_s: Positive | None = None
    price_usd_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    source: str = Field(min_length=1)

    @field_validator("rates")
    @classmethod
    def _has_a_common_type(cls, rates: dict[str, float]) -> dict[str, float]:
        if "fp32" not in rates:
            raise ValueError(f"seen {listed(rates)}; fp32 has to be among them")
        return rates

    @field_validator("efficiency", "attention_share")
    @classmethod
    def _is_of_a_rate(cls, shares: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if without := shares.keys() - info.data.get("rates", shares).keys():
            raise ValueError(f"seen {listed(without)}; rates has {listed(info.data['rates'])}")
        return shares

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * 2**30

    @property
    def usable_bytes(self) -> float:
        """What a plan fills: 80 %."""
        return FILL * self.memory_bytes

    def runs(self, precision: str) -> bool:
        """Whether it has units for a type. tf32 falls back to fp32, bf16 does not to fp16."""
        return precision in self.rates

    def rate(self, precision: str) -> float:
        """FLOPs a second of matrix products. Raises InputError for a type that it has no units for."""
        if precision not in self.rates:
            raise InputError(f"{self.name} has no rate for {precision}; it has {listed(self.rates)}")
        return self.rates[precision] * 1e12


def load_devices(path: str | Path | None = None, *, names: Iterable[str] = ()) -> dict[str, Device]:
    """Devices by their key, all or those named; `path` takes the place of the file that comes with the project."""
    file = Path(path) if path else Path(str(files("deepseek") / "devices.toml"))
    found = read_devices(file)
    if not path and measured_path().is_file():
        found |= read_devices(measured_path())
    wanted = list(names) or list(found)
    for name in wanted:
        if name not in found:
            hint = "; measure it with: make plan MEASURE=1" if name == THIS_MACHINE else ""
            raise InputError(f"device {name!r} is not in {file}; it has {', '.join(found)}{hint}")
    return {name: found[name] for name in wanted}


def measured_path() -> Path:
    """Where the measured machine is kept."""
    return Path(os.environ.get("BUILD", "build")) / f"{THIS_MACHINE}.toml"


def read_devices(path: Path) -> dict[str, Device]:
    """Reads one file of devices. Raises InputError in one line."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    if not tables:
        raise InputError(f"{path}: no device in it; each is a table, as [t4] in deepseek/devices.toml")
    found = {}
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(f"{path}: {key}: seen {table!r}; each device is a table: [{key}]")
        try:
            # JSON: types are exact, but a whole number may stand for a float.
            found[key] = Device.model_validate_json(json.dumps(table, default=str))
        except ValidationError as error:
            where, message = first_error(error, Device, f"{key}.")
            raise InputError(f"{path}: {where}: {message}") from None
    return found


def write_device(path: Path, key: str, device: Device) -> None:
    """Writes one device as a file that `read_devices` takes."""
    lines = [f"[{key}]"]
    for name, value in device.model_dump(exclude_none=True, exclude_defaults=True).items():
        lines.append(f"{name} = {_toml(value)}")
    write_whole(path, "\n".join(lines) + "\n")


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) and "e" not in f"{value:.4g}" else repr(value)
    return json.dumps(value, ensure_ascii=False)
