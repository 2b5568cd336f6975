"""`deepseek gpu-check`: its table of steps, and its runner on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from cli import gpu_check
from cli.gpu_check import StepResult, missing, run, unmet
from cli.gpu_steps import GpuStep, Where, steps
from cli.main import values_of
from deepseek.spec.machine.gpus import Gpu
from serving.doctor.machine import Machine
from tests.conftest import RunHere
from tests.waiting import wait_for

WHERE = Where(folder=Path("/check"), models="models", triton_tag="26.10", gateway_port=1, http_port=2, grpc_port=3)
ADA = Gpu(name="L4", compute_capability="8.9", driver="580.1", memory_bytes=1)


def python(name: str, code: str, *, limit_s: int = 60, needs: tuple[str, ...] = ()) -> GpuStep:
    """A step that runs Python code."""
    return GpuStep(
        name=name, command=(sys.executable, "-c", code), limit_s=limit_s, needs=needs, claim=f"claim of {name}"
    )


def ended(pid: int) -> bool:
    """Whether a process has ended, even if nobody has collected it."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def check(monkeypatch: pytest.MonkeyPatch, folder: Path, *table: GpuStep) -> tuple[int, dict[str, dict]]:
    """Exit code of a check of these steps, and its results by name."""
    monkeypatch.setattr(gpu_check, "steps", lambda where, models: list(table))
    code = gpu_check.main(values_of("gpu-check", "--output", str(folder)))
    return code, {step["name"]: step for step in json.loads((folder / "gpu-check.json").read_text())["steps"]}


def test_a_failed_step_ends_only_the_steps_that_need_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = python("bad", "print('seen <this>'); raise SystemExit(2)")
    table = (bad, python("after", "", needs=("bad",)), python("next", "print(1)"))
    code, found = check(monkeypatch, tmp_path, *table)
    assert code == 1
    assert [step["outcome"] for step in found.values()] == ["failed", "skipped", "passed"]
    assert (found["bad"]["reason"], found["bad"]["last_lines"]) == ("exit code 2", ["seen <this>"])
    assert found["after"]["reason"] == "needs 'bad', which failed"
    page = (tmp_path / "gpu-check.html").read_text()
    assert "claim of next" in page
    assert "failed: exit code 2" in page
    assert "seen &lt;this&gt;" in page


def test_an_inconclusive_measurement_is_not_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load, other = python("load", "raise SystemExit(3)"), python("other", "exit(3)")
    monkeypatch.setattr(gpu_check, "ours", lambda: load.command)  # a command of this project
    code, found = check(monkeypatch, tmp_path, load, python("judge", "", needs=("load",)))
    assert code == 3
    assert [step["outcome"] for step in found.values()] == ["inconclusive", "skipped"]
    assert found["judge"]["reason"] == "needs 'load', which was inconclusive"
    assert check(monkeypatch, tmp_path, other)[0] == 1  # of another program, 3 means something else


def test_an_interrupted_check_takes_its_stack_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def interrupted(step: GpuStep, log: Path, environment: dict[str, str]) -> None:
        ran.append(step.name)
        if step.name == "load":
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "run", interrupted)
    monkeypatch.setattr(gpu_check, "line", str)
    monkeypatch.setattr(gpu_check, "asdict", str)
    monkeypatch.setattr(gpu_check, "page", str)
    with pytest.raises(KeyboardInterrupt):
        check(monkeypatch, tmp_path, *(python(name, "") for name in ("stack up", "load", "stack down")))
    assert ran == ["stack up", "load", "stack down"]


def test_a_step_gets_no_setting_of_another_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", "mine")
    found = run(python("names", "import os; print([n for n in os.environ if 'COMPOSE' in n])"), tmp_path / "log", {})
    assert found.last_lines == ("[]",)


def test_a_step_over_its_limit_may_stop_and_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class UntilItSpeaks(subprocess.Popen[bytes]):
        """Reaches its time limit as soon as it has said something."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                wait_for(lambda: (tmp_path / "log").read_text())
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", UntilItSpeaks)
    code = (
        "import signal, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('stopped', flush=bool(child.wait())))); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    found = run(python("slow", code), tmp_path / "log", {})
    assert (found.outcome, found.reason) == ("failed", "not done within 60 s")
    pid, said = found.last_lines
    assert said == "stopped"
    wait_for(lambda: ended(int(pid)))


def test_every_need_is_a_fact_of_the_machine_or_an_earlier_step() -> None:
    known = set(missing(Machine(ram_bytes=1)))
    for step in steps(WHERE, ["recommender", "minilm"]):
        assert known.issuperset(step.needs + step.needs_one_of), step
        assert step.name not in known
        known.add(step.name)


@pytest.mark.parametrize(("lost", "kept"), [("recommender", "minilm"), ("minilm", "recommender")])
def test_the_stack_serves_the_models_that_have_an_engine(lost: str, kept: str) -> None:
    table, met = steps(WHERE, ["recommender", "minilm"]), dict.fromkeys(missing(Machine(ram_bytes=1)), "")
    passed, failed = StepResult.of(table[0], "passed", ""), StepResult.of(table[0], "failed", "")
    before = {step.name: passed for step in table} | {f"engine {lost}": failed}
    reasons = {step.name: unmet(step, met, before) for step in table}
    for name in (f"parity {lost}", f"load test {lost}", f"capacity {lost}"):
        assert reasons[name] == f"needs 'engine {lost}', which failed"
    assert not any(
        reasons[name] for name in ("doctor", "stack up", f"parity {kept}", f"load test {kept}", "stack down")
    )
    (up,) = (step for step in table if step.name == "stack up")
    nothing = before | {f"engine {kept}": failed}
    assert unmet(up, met, nothing) == "needs 'engine recommender' or 'engine minilm'; none passed"


@pytest.mark.parametrize(
    ("capability", "reason"), [("8.9", ""), ("10.0", ""), ("8.6", "compute capability 8.6 has no FP8")]
)
def test_fp8_needs_a_chip_that_has_it(capability: str, reason: str) -> None:
    gpu = Gpu(name="x", compute_capability=capability, driver="1", memory_bytes=1)
    lacks = missing(Machine(ram_bytes=1, gpus=(gpu,), docker=("runc", "nvidia")))
    (step,) = (each for each in steps(WHERE, ["recommender"]) if each.name == "engine recommender fp8")
    assert unmet(step, lacks, {}) == reason


def test_steps_of_pytorch_are_skipped_where_only_nvidia_smi_sees_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "without_gpu", lambda: "PyTorch sees none")
    lacks = missing(Machine(ram_bytes=1, gpus=(ADA,), docker=("runc", "nvidia"))) | {"nsys": ""}
    built = replace(StepResult.of(python("", ""), "skipped", ""), outcome="passed")
    before = {step.name: built for step in steps(WHERE, ["minilm"])}
    found = [step.name for step in steps(WHERE, ["minilm"]) if unmet(step, lacks, before) == "PyTorch sees none"]
    assert found == [
        "PyTorch, torch.compile, ONNX Runtime CUDA: minilm",
        "nsys profile",
        "mixed precision and checkpointing against fp32",
    ]


def test_each_command_of_the_project_in_the_table_can_be_parsed() -> None:
    for step in steps(WHERE, ["recommender", "minilm"]):
        words = list(step.command)
        if "cli" in words:
            name, *rest = words[words.index("cli") + 1 :]
            values_of(name, *rest)


def test_a_machine_without_a_gpu_gets_a_line_for_each_step(tmp_path: Path, run_here: RunHere) -> None:
    done = run_here("gpu-check", "--output", str(tmp_path), "--json", PATH=str(tmp_path))
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(steps(WHERE, ["recommender", "minilm"]))
    assert "skipped           0 s  engine minilm: no GPU: no nvidia-smi" in lines
    assert {step["outcome"] for step in json.loads(done.stdout)["steps"]} == {"skipped"}


def test_the_baselines_say_that_there_is_no_gpu(run_here: RunHere) -> None:
    done = run_here("gpu-baselines")
    assert done.returncode == 2
    assert f"PyTorch {torch.__version__} sees no GPU" in done.stderr
