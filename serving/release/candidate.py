"""The candidate: a new version staged where no server sees it, and the gates that it passes before the switch.

Contract: writes only to the release's folder. Each gate is a method that `Release.run` lists. It returns a line for the
user, or raises what stops the release: GateFailed, InvalidMeasurement or InputError.
"""

import argparse
import math
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    Manifest,
    PublishedManifest,
    build_dir,
)
from deepseek.spec.deployment import read_catalogue
from deepseek.spec.files.manifest import OWN_DATA
from deepseek.spec.files.read_env_file import gpu_stack_tag
from deepseek.spec.objectives import requests_to_prove
from deepseek.spec.paired_drop import judge_drop, pair_values
from deepseek.spec.processes.child_server import ChildServer
from deepseek.spec.processes.stack_triton import stack_command
from deepseek.spec.vocabulary import CATALOGUE
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from serving.embedded.launcher import EmbeddedServer
from serving.embedded.wheel import parts, scratch_place
from serving.release.gate_commands import CommandResult, run_json
from serving.release.journal import ReleaseJournal
from serving.release.stack_server import check_stack, needs_stack, start_on_stack
from serving.release.step_runner import Skipped
from serving.release.versions import copy_version, newest, same_as, stage
from serving.repository.checks import MANIFEST

MOST_ATTEMPTS = 2  # at a load test, if the load generator was too slow
LEAST_COMMON = 0.5  # share of the larger catalogue: fewer common items are too few to compare accuracies
SPARE = 1.5  # times the requests that decide if all are within the limits: a few are not


class Candidate:
    """The new version, `number`, and the served version, `before`."""

    def __init__(self, options: argparse.Namespace, spec: DeploymentSpec, journal: ReleaseJournal, number: int) -> None:
        self.options, self.spec, self.journal, self.number = options, spec, journal, number
        self.model = options.repository / options.model
        self.before = newest(self.model)
        self.scratch = journal.folder / "candidate"
        self.build = Path(options.new_build) / options.model if options.new_build else build_dir(options.model)
        self.which = ("--model", options.model, "--models", str(options.models))
        self.on_stack = False
        """Whether a version on trial needs the stack's Triton."""
        self._command = ""  # of the stack's Triton
        self.started = ExitStack()
        """Ends the servers that the gates start."""
        self._servers: dict[str, EmbeddedServer | ChildServer] = {}
        self._parity: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        return self.scratch / "new" / str(self.options.model)

    def stage(self) -> str:
        if self.before is not None and not (self.model / str(self.before) / MANIFEST).is_file():
            raise InputError(
                f"{self.model / str(self.before)}: no {MANIFEST}, so make engine did not publish it and no candidate "
                "can be compared with it; publish once with make engine, without gates, or release into another "
                "repository (--repository, REPOSITORY=)"
            )
        if self.options.new:
            source = Path(self.options.new) / self.options.model
        else:
            flags = ("--target", self.options.target, "--repository", str(self.scratch / "built"), "--json")
            self._ask("publish", *flags).checked()
            source = self.scratch / "built" / self.options.model
        staged = stage(source, number=self.number, folder=self.scratch / "new")
        if self.before is not None and same_as(staged, self.number, self.model, self.before):
            what = f"the newest version in {source}" if self.options.new else "what is built"
            raise InputError(
                f"nothing to release: {self.model / str(self.before)} equals {what}; change the model or its "
                "deploy.toml, or name another repository (NEW=)"
            )
        self.journal.keep(MANIFEST, (staged / str(self.number) / MANIFEST).read_text(encoding="utf-8"))
        manifest = PublishedManifest.load(staged / str(self.number) / MANIFEST)
        if self.options.new:
            self._check_weights(manifest)
        versions = {self.model: self.before, staged: self.number}
        self.on_stack = any(needs_stack(model, version) for model, version in versions.items() if version is not None)
        if self.on_stack:
            check_stack(self.options.target, self.options.env_file)
        source_name = self.options.new or "the build"
        return f"version {self.number}, {manifest.precision} for {manifest.target}, from {source_name}"

    def _check_weights(self, manifest: PublishedManifest) -> None:
        """Raises InputError if parity would compare the candidate with a model of other weights."""
        path = self.build / "fp32" / MANIFEST
        ours = Manifest.load(path).sources.get("weights", "") if path.is_file() else ""
        theirs = manifest.sources.get("weights", "")
        if not ours or ours != theirs:
            raise InputError(
                f"{self.options.new}: made from the weights {theirs[:12] or 'none'}, but {path} has "
                f"{ours[:12] or 'none'}, so parity would compare with another model; name the build folder that it was "
                "made in (--new-build, NEW_BUILD=)"
            )

    def catalogue(self) -> str:
        """Compares its items with the served version's: accuracy is compared only on items that both know."""
        before = self.model / str(self.before) / CATALOGUE
        if not before.is_file():
            return Skipped("no served version with names to compare with")
        ours = self.folder / str(self.number) / CATALOGUE
        new, old = (set(read_catalogue(path).names[1:].tolist()) for path in (ours, before))
        common = len(new & old)
        said = (
            f"version {self.before} knows {common:,} of the new version's {len(new):,} items; {len(old) - common:,} "
            f"of its own {len(old):,} are gone"
        )
        if common >= LEAST_COMMON * max(len(new), len(old)) or self.options.new_catalogue:
            return said
        if not PublishedManifest.load(self.model / str(self.before) / MANIFEST).settings.get(OWN_DATA):
            return f"{said}, as expected: that version was not trained on a log of yours (DATA=)"
        raise GateFailed(
            f"{said}; at least {LEAST_COMMON:.0%} must be in both: is the log wrong or incomplete? If it is right, "
            "confirm the new catalogue once with NEW_CATALOGUE=1 (--new-catalogue)"
        )

    def _ask(self, name: str, *flags: str) -> CommandResult:
        return run_json(name, *self.which, *flags, build=self.options.new_build)

    def doctor(self) -> str:
        """Checks its files, and whether it runs on this machine."""
        detected = Machine.detect(triton_tag=gpu_stack_tag(self.options.env_file), in_container=True)
        # As in a container: without Docker, which does not depend on the version. TensorRT would be this host's.
        machine = replace(detected, tensorrt=None)
        _, findings = examine(self.scratch / "new", machine, model=self.options.model, kept=False)
        self.journal.keep("doctor.json", [{"level": each.level, "said": str(each)} for each in findings])
        # Without the fix, which would name the copy.
        wrong = [f"{each.where}: {each.what}" for each in findings if each.level == "mismatch"]
        if wrong:
            raise GateFailed("; ".join(wrong))
        return f"{len(findings)} notes, no mismatch"

    def start(self) -> str:
        """Starts its own server, which is ready once the warm-up has run.

        Raises InputError if this machine lacks what the server needs, which is no fault of the candidate.
        """
        began_s = time.monotonic()
        if self.on_stack:
            self._command = stack_command(self.options.env_file)
        else:
            parts()
            scratch_place()
        try:
            self._servers["new"] = self._serve("new")
        except InputError as error:
            raise GateFailed(f"it does not start: {error}") from None
        return f"ready after {time.monotonic() - began_s:.1f} s"

    def _serve(self, side: str) -> EmbeddedServer | ChildServer:
        repository, log_path = self.scratch / side, self.journal.folder / f"triton-{side}.log"
        timeout_s: float = self.options.start_timeout_s
        if self.on_stack:
            return start_on_stack(self.started, self._command, repository, log_path, timeout_s)
        server = EmbeddedServer(
            repository, http_port=0, grpc_port=0, metrics_port=0, log_path=log_path, timeout_s=timeout_s
        )
        return self.started.enter_context(server)

    def _base(self) -> EmbeddedServer | ChildServer:
        assert self.before is not None
        if "base" not in self._servers:
            copy_version(self.model, self.before, number=self.before, folder=self.scratch / "base")
            self._servers["base"] = self._serve("base")
        return self._servers["base"]

    def parity(self) -> str:
        """Compares its answers with fp32 PyTorch.

        If items have names, the served version answers the same rows: a retrained model may number its items otherwise.
        """
        server = self._servers["new"]
        flags = ("--url", server.grpc_url, "--http-url", server.http_url, "--json")
        rows = ("--rows", str(self.options.parity_rows)) if self.options.parity_rows else ()
        named = self.spec.vocabulary and self.before is not None
        base = ("--base-url", self._base().grpc_url) if named else ()
        answer = self._ask("parity", *flags, *rows, *base)
        if answer.data is not None:
            self.journal.keep("parity.json", answer.data)
        self._parity = answer.checked()
        return f"{len(self._parity['checks'])} checks over HTTP and gRPC"

    def accuracy(self) -> str:
        """Compares its task metric with the served version's: parity cannot see that a retrained model is worse."""
        metric = self._parity["metric"]
        if not metric:
            return Skipped("no precision.metric in deploy.toml")
        new = min(metric["served"].values(), key=lambda each: each["value"])
        value = new["value"]
        if self.before is None:
            return Skipped(f"{metric['name']} {value:.4f}; no served version to compare with")
        base = metric.get("base")  # on the same rows
        if base is None:
            recorded = PublishedManifest.load(self.model / str(self.before) / MANIFEST).accuracy or {}
            base = {"value": recorded.get("metrics", {}).get(metric["name"]), "values": recorded.get("values")}
        served = base["value"]
        if served is None:
            return Skipped(f"{metric['name']} {value:.4f}; version {self.before} has none in its manifest")
        if served == 0 <= value:  # such as a version that knows none of the new log's items
            return f"{metric['name']} {value:.4f}, version {self.before} has 0: no drop is possible"
        paired = pair_values(base["values"], new["values"])
        judged = judge_drop(
            paired.drop if paired else (served - value) / served if served > 0 else 0.0,
            paired,
            max_drop=metric["max_drop"],
            candidates=len(self.spec.precision.candidates),
        )
        said = f"{metric['name']} {value:.4f}, version {self.before} has {served:.4f}: {judged.reason}"
        if not judged.accepted:
            raise GateFailed(said)
        return said

    def shadow(self) -> str:
        """Sends the same requests to it and to a server with the served version."""
        if self.before is None:
            return Skipped("no served version to compare with")
        urls = ("--base-url", self._base().grpc_url, "--new-url", self._servers["new"].grpc_url)
        how = ("--requests", str(self.options.requests), "--threshold", str(self.options.threshold))
        found = self._ask("shadow-load", *urls, *how)
        if found.data is None:
            found.checked()
        data = found.data
        self.journal.keep("shadow.json", data)
        if data["verdict"] == "fails":
            raise GateFailed("; ".join(data["failures"]))
        if data["verdict"] == "inconclusive":
            raise InvalidMeasurement(data["note"])
        median = data["latency"][0]
        same = [
            f"{name} {each['same']:.1%} equal" for name, each in data["outputs"].items() if each["same"] is not None
        ]
        speed = (
            f"p50 {median['new_ms']:.2f} ms, {median['ratio']:.2f} ({median['low']:.2f} to {median['high']:.2f}) times"
        )
        return f"{speed} version {self.before}'s; {', '.join(same)}"

    def objectives(self) -> str:
        """Judges every line of the SLO under load on both servers; the candidate's verdict decides."""
        sides = [side for side in ("base", "new") if side in self._servers]
        judged = {side: self._judged(side) for side in sides}
        self.journal.keep("objectives.json", judged)
        base = {each["name"]: each for each in judged.get("base", {}).get("objectives", [])}
        said = "; ".join(_compared(each, base.get(each["name"])) for each in judged["new"]["objectives"])
        if judged["new"]["verdict"] == "violated":
            raise GateFailed(said)
        if judged["new"]["verdict"] != "holds":
            raise InvalidMeasurement("; ".join([*judged["new"]["problems"], said]))
        return said

    def _judged(self, side: str) -> dict[str, Any]:
        """The verdict of a load test of one server; repeats the test if the load generator was too slow."""
        url = self._servers[side].grpc_url
        how = ("--url", url, "--target", self.options.target, "--duration-s", str(self._duration_s()), "--json")
        rate = ("--rate", str(self.options.rate)) if self.options.rate else ()
        for attempt in range(1, MOST_ATTEMPTS + 1):
            answer = self._ask("loadtest", *how, *rate)
            made = answer.checked(3)
            if made is None:
                raise InvalidMeasurement(answer.reason)
            kept = self.journal.folder / f"run-{side}-{attempt}"
            shutil.move(made["run"], kept)  # so that it is not the latest run of the model
            if answer.code == 0:
                break
        verdict: dict[str, Any] = self._ask("verdict", "--run", str(kept), "--json").checked(1, 3)
        return verdict

    def _duration_s(self) -> int:
        """Seconds in which enough requests are sent to judge the SLO's percentiles, error rates and throughputs."""
        lines = self.spec.slo.all_objectives()
        rates = [line.limit if line.kind == "throughput" else line.rate_rps for line in lines]
        lowest = min(filter(None, rates), default=None)  # a line without a rate is judged over the whole run
        needed = 0.0
        for line in lines:
            rate = self.options.rate or line.rate_rps or self.spec.slo.rate_rps or lowest
            if line.kind == "throughput" and not self.options.rate:
                rate = max(rate or 0.0, line.limit)  # the rates that a load test sends without --rate
            requests = requests_to_prove(line, rate, self.spec.slo.confidence) if rate else None
            needed = max(needed, SPARE * (requests or 0) / (rate or 1))
        return max(self.options.duration_s, math.ceil(needed))


def _compared(line: dict[str, Any], base: dict[str, Any] | None) -> str:
    beside = "" if base is None else f", served {_number(base['seen'])}"
    limit = f"{line['relation']} {_number(line['limit'])}"
    note = f", {line['note']}" if line["note"] and line["status"] != "holds" else ""
    return f"{line['name']} {_number(line['seen'])} ({limit}{beside}): {line['status']}{note}"


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.4g}"
