"""Builds a model up to the repository: runs the stages whose inputs changed, and nothing else.

Contract: a stage runs if its output is missing or modified, or if its inputs (`export.stage_inputs`) have changed;
`build/<name>/pipeline.json` records both. One build at a time runs in a model's folder; the next one waits. A killed
build leaves no partial files, and the next build resumes where it stopped. `--explain` prints one line per stage and
builds nothing.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from deepseek.precisions import Precision
from deepseek.spec import InputError, build_dir
from deepseek.spec.files.folders import alone_in, write_whole
from deepseek.spec.files.read_env_file import other_stack
from deepseek.spec.processes.children import ends_with_us
from deepseek.targets import PUBLISHABLE
from export.artifact import LAST, choice_path, last_options, pruned_path, pruning_path, record_path, refusal
from export.cache import STAGE_KEYS, limit_bytes, predicted
from export.dependencies.digests import RememberedDigests
from export.dependencies.requirements import install
from export.pipeline import Stage, graph_stages, publish_stage, stack_stage, stages_of
from export.plan import Plan, build_plan_of
from export.stage_inputs import StageInputs, key_of, named

INSIDE = "/opt/export/bin/python"  # of the export image


class Builder:
    """Runs or explains the stages of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.digests = RememberedDigests(build_dir("") / ".digests.json")
        self.inputs = StageInputs(plan, self.digests)
        self._recorded = record_path(plan.model)
        self._record: dict[str, dict[str, dict[str, str]]] = {}
        """Inputs and outputs of each completed stage, and the options of the last build."""
        with contextlib.suppress(OSError, ValueError):
            self._record = json.loads(self._recorded.read_text())
        self._remade: dict[Path, str] = {}
        """Files rebuilt in this build, with the stage that makes them."""

    def step(self, stage: Stage) -> tuple[dict[str, str], str]:
        """A stage's current inputs, and why it has to run; "" if it is up to date."""
        inputs = self.inputs.of(stage)
        return inputs, self._reason(stage, inputs)

    def _reason(self, stage: Stage, inputs: dict[str, str]) -> str:
        remade = next((self._remade[path] for path in stage.reads if path in self._remade), "")
        if remade:
            return f"{remade} is rebuilt"
        refused = any(map(refusal, stage.writes))  # then there is no manifest beside it
        for path in (*stage.writes, *(() if refused else stage.beside)):
            if path not in self.inputs.foreseen and not path.is_file():
                return f"{named(path)} is missing"
        if stage.name not in self._record:
            return "its inputs are not recorded"
        made_from, made = self._record[stage.name]["inputs"], self._record[stage.name]["outputs"]
        changes = [_change(name, made_from.get(name), inputs.get(name)) for name in {**made_from, **inputs}]
        changes += [f"{name} was changed" for name, digest in self.outputs(stage).items() if made.get(name) != digest]
        return next(filter(None, changes), "")

    def outputs(self, stage: Stage) -> dict[str, str]:
        """Digests of the files that a stage wrote, by name."""
        return {name: digest for path in stage.writes for name, digest in self.inputs.files(path).items()}

    def run(self, stages: Sequence[Stage], lock: int) -> None:
        """Runs the stages that have to run; their processes inherit `lock`."""
        if not self.plan.data and (last := last_options(self.plan.model).get("data")):
            print(f"engine    DATA is not set; the last build had DATA={last}", flush=True)
        last_build, ran = self._record.get(LAST), False
        self._record[LAST] = {"options": {"data": self.plan.data, "prune": self.plan.prune}}
        self._save_record()
        for place, stage in enumerate(stages):
            inputs, reason = self.step(stage)
            if not reason:
                continue
            if stage.name in self._record:
                print(f"engine    {stage.name}: {reason}", flush=True)
            self._remade |= dict.fromkeys(stage.writes, stage.name)
            for invalid in (stage, *_followers(stage, stages[place + 1 :])):
                self._record.pop(invalid.name, None)
            self._save_record()
            self.digests.save()
            before = _files(stage)
            try:
                self._execute(stage, lock)
            except SystemExit:
                if last_build and not ran:  # the files are still those of the last build
                    self._record[LAST] = last_build
                    self._save_record()
                raise
            ran = True
            after = _files(stage)
            if missing := [path for path in stage.writes if path not in after or after == before]:
                raise InputError(
                    f"{stage.name} ended with exit code 0, but did not write {named(missing[0])}: model.py must not "
                    "end the process, and the current folder must have no cli.py of its own"
                )
            self._record[stage.name] = {"inputs": inputs, "outputs": self.outputs(stage)}
            self._save_record()
        self.digests.save()

    def _save_record(self) -> None:
        write_whole(self._recorded, json.dumps(self._record, indent=1))

    def keys(self, stage: Stage) -> dict[str, str]:
        """Cache keys of a stage (under "") and of its parts."""
        own = {"": key_of(stage.name, self.inputs.of(stage))}
        return own | {part.name: key_of(part.name, self.inputs.of(part)) for part in stage.parts}

    def _execute(self, stage: Stage, lock: int) -> None:
        """Runs the stage's command; if that fails, exits with the same code."""
        environment = {**os.environ, STAGE_KEYS: json.dumps(self.keys(stage))}
        if stage.command[0] in ("train", "prune"):  # idle threads sleep instead of spinning
            environment["OMP_WAIT_POLICY"] = "passive"
        if self.plan.data:
            environment["DEEPSEEK_DATA"] = self.plan.data
        process = subprocess.Popen(self.command(stage), env=environment, pass_fds=[lock], preexec_fn=ends_with_us())
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            sys.exit(130)
        if code < 0:  # minus the number of the signal that ended it
            sys.exit(128 - code)
        if code:
            sys.exit(code)

    def command(self, stage: Stage) -> list[str]:
        """The command line of a stage; if the stage needs TensorRT, with the plan's compiler."""
        name, *flags = stage.command
        words = [name, "--model", self.plan.model, "--models", str(self.plan.models), *flags]
        compiler = self.plan.compiler if stage.on_compiler else ""
        if compiler == "container":
            models = str(self.plan.models)
            words = ["tensorrt-container", "--tag", self.plan.triton_tag, "--models", models, "--", *words]
        return [INSIDE if compiler == "inside" else sys.executable, "-m", "cli", *words]

    def explain(self, stages: Iterable[Stage]) -> None:
        """Prints one line per stage; builds nothing."""
        unknown: set[Path] = set()  # files whose content cannot be predicted
        for stage in stages:
            inputs, reason = self.step(stage)
            hopeless = unknown.intersection(stage.reads) or not stage.writes
            found = None if hopeless else predicted(key_of(stage.name, inputs))
            if not reason:
                told = "up to date"
            else:
                told = f"{'rebuild' if found is None else 'from the cache'}: {reason}"
                self._remade |= dict.fromkeys((*stage.writes, *stage.beside), stage.name)
                self._foresee(stage, found or {})
                unknown.update(() if found else (*stage.writes, *stage.beside))
            print(f"{stage.name:<28} {told}")
        self.digests.save()

    def _foresee(self, stage: Stage, found: dict[str, str]) -> None:
        for path in (*stage.writes, *stage.beside):
            near = [name for name in found if name == path.name or name.startswith(f"{path.name}.")]
            self.inputs.foreseen |= {path.with_name(name): found[name] for name in near}


def _files(stage: Stage) -> dict[Path, tuple[int, int]]:
    """Inode and time of the files of a stage: each run replaces at least one of them."""
    states = {path: path.stat() for path in stage.writes if path.is_file()}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in states.items()}


def _followers(stage: Stage, later: Sequence[Stage]) -> list[Stage]:
    """Later stages that depend on this one, directly or indirectly."""
    written, found = set(stage.writes), []
    for each in later:
        if written.intersection(each.reads):
            written.update(each.writes)
            found.append(each)
    return found


def _change(name: str, before: str | None, now: str | None) -> str:
    """How an input changed; "" if it did not."""
    if before == now:
        return ""
    if before is None or now is None:
        return f"{name} is {'new' if before is None else 'gone'}"
    return f"{name} changed" + (f" from {before} to {now}" if max(len(before), len(now)) < 40 else "")


def build(options: argparse.Namespace, publish: bool = True) -> Plan:
    """Builds what `options` ask for, through precision selection; with `publish`, also into the repository."""
    plan = build_plan_of(options)
    if publish and plan.not_tensorrt:
        print(f"engine    target {plan.target}, not tensorrt: {plan.not_tensorrt}", flush=True)
    limit_bytes()  # a wrong size ends the build before its first stage
    with alone_in(build_dir(plan.model)) as lock:  # the stages inherit it
        install(plan.folder, *([INSIDE] if plan.compiler == "inside" else ()))
        builder = Builder(plan)
        _drop_pruned(plan)
        builder.run(list(stages_of(plan)), lock)
        if publish:
            for stage in published_stages(plan, options):
                builder.run([stage], lock)
            if plan.target in PUBLISHABLE and (other := stack_elsewhere(plan, options)):
                print(
                    f"engine    {options.env_file} is unchanged: its stack has {other}; make stack with this "
                    "REPOSITORY= and BUILD= points it here",
                    flush=True,
                )
    return plan


def published_stages(plan: Plan, options: argparse.Namespace) -> Iterator[Stage]:
    """The stages after precision selection; none for tensorrt_rtx, whose engines Triton cannot load."""
    if plan.target in PUBLISHABLE:
        yield publish_stage(plan)
        if not stack_elsewhere(plan, options):
            yield stack_stage(plan, options)


def stack_elsewhere(plan: Plan, options: argparse.Namespace) -> str:
    """The setting by which the env file's stack serves another repository, which this build must keep; else ""."""
    return other_stack(Path(options.env_file), Path(plan.repository), build_dir(""))


def build_graphs(plan: Plan, precisions: list[Precision]) -> None:
    """Builds only the graphs of a model, with DATA and PRUNE of its last build, for `deepseek check-engine`."""
    with alone_in(build_dir(plan.model)) as lock:  # the stages inherit it
        install(plan.folder)
        last = last_options(plan.model)
        plan = replace(plan, data=last.get("data", ""), prune=last.get("prune", ""))
        _drop_pruned(plan)
        Builder(plan).run(list(graph_stages(plan, precisions)), lock)


def _drop_pruned(plan: Plan) -> None:
    """Without PRUNE, removes an earlier pruned module, so that later stages start from the whole one."""
    if not plan.prune:
        for path in (pruned_path(plan.model), pruning_path(plan.model)):
            path.unlink(missing_ok=True)


def main(options: argparse.Namespace) -> None:
    if options.explain:
        plan = build_plan_of(options)
        Builder(plan).explain([*stages_of(plan), *published_stages(plan, options)])
        return
    plan = build(options)
    published = plan.target in PUBLISHABLE
    ready = plan.repository / plan.model / "config.pbtxt" if published else choice_path(plan.model, plan.target)
    print(f"engine    {ready} is up to date")
