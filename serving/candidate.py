"""A new version laid out beside the repository, where no server sees it, and the gates that it takes alone.

Contract: nothing is written but in the release's folder; each gate returns a line for people and raises what stops the
release: GateFailed, InvalidMeasurement, InputError (`serving.release` says what each is about).
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from contextlib import ExitStack
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
from serving.commands import Answer, ask
from serving.doctor import examine
from serving.embedded import EmbeddedServer, check_repository
from serving.machine import Machine
from serving.releases import Journal, LeftOut, rolled_back
from serving.repository import MANIFEST
from serving.versions import lay_out, newest, same_as, stage

MOST_ATTEMPTS = 2  # of a load test that the generator spoiled
SPARE = 1.2  # times the requests that a percentile needs: arrivals are random


class Candidate:
    """What is to be version `number`, and the version that is served, `before`."""

    def __init__(self, args: argparse.Namespace, spec: DeploymentSpec, journal: Journal, number: int) -> None:
        self.args, self.spec, self.journal, self.number = args, spec, journal, number
        self.model = Path(args.repository) / args.model
        self.before = newest(self.model)
        self.scratch = journal.folder / "candidate"
        self.build = Path(args.new_build) / args.model if args.new_build else build_dir(args.model)
        self.which = ("--model", args.model, "--models", args.models)
        self._servers: dict[str, EmbeddedServer] = {}
        self._parity: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """The model's, with the candidate under its number."""
        return self.scratch / "new" / str(self.args.model)

    def stage(self) -> str:
        """The candidate, laid out alone under its number."""
        if self.before is not None and not (self.model / str(self.before) / MANIFEST).is_file():
            raise InputError(
                f"{self.model / str(self.before)}: no {MANIFEST}, so it was not made by make engine and no candidate "
                "can be compared with it; publish into it once with make engine, without gates, or release into "
                "another repository (--repository, REPOSITORY=)"
            )
        if self.args.new:
            source = Path(self.args.new) / self.args.model
        else:
            flags = ("--target", self.args.target, "--repository", str(self.scratch / "built"), "--json")
            self._ask("export.to_triton", *flags).checked()
            source = self.scratch / "built" / self.args.model
        staged = stage(source, number=self.number, folder=self.scratch / "new")
        if self.before is not None and same_as(staged, self.number, self.model, self.before):
            what = f"the newest version in {source}" if self.args.new else "what is built"
            raise InputError(
                f"nothing to release: {self.model / str(self.before)} is the same as {what}; change the model or its "
                "deploy.toml, or name another repository (NEW=)"
            )
        self.journal.keep(MANIFEST, (staged / str(self.number) / MANIFEST).read_text())
        manifest = self._manifest(staged, self.number)
        if self.args.new:
            self._check_weights(manifest)
        said = f"version {self.number}, {manifest.precision} for {manifest.target}, from {self.args.new or 'the build'}"
        if record := rolled_back(self.args.model, manifest):
            said += f"; note: its files are those of version {record.before}, rolled back {record.started[:16]}"
        return said

    def _check_weights(self, manifest: PublishedManifest) -> None:
        """Raises InputError where parity would hold the candidate against another model than it was made from."""
        path = self.build / "fp32" / MANIFEST
        ours = Manifest.load(path).sources.get("weights", "") if path.is_file() else ""
        theirs = manifest.sources.get("weights", "")
        if not ours or ours != theirs:
            raise InputError(
                f"{self.args.new}: made of the weights {theirs[:12] or 'none'}, {path} has {ours[:12] or 'none'}, so "
                "parity would be with another model; name the build folder of its own (--new-build, NEW_BUILD=)"
            )

    def _ask(self, name: str, *flags: str) -> Answer:
        """Another room's command about this model, in the build folder that the candidate was made in."""
        return ask(name, *self.which, *flags, build=self.args.new_build)

    def doctor(self) -> str:
        """What speaks against it, from its files and this machine."""
        machine = Machine.detect(in_container=True)  # what Docker and the disk are like is no matter of the version's
        _, findings = examine(self.scratch / "new", machine, model=self.args.model, kept=False)
        self.journal.keep("doctor.json", [{"level": each.level, "said": str(each)} for each in findings])
        # Without the fix, which is about the copy.
        wrong = [f"{each.where}: {each.what}" for each in findings if each.level == "mismatch"]
        if wrong:
            raise GateFailed("; ".join(wrong))
        return f"{len(findings)} notes, no mismatch"

    def start(self, stack: ExitStack) -> str:
        """A server of its own, ready once the warm-up has run."""
        check_repository(self.scratch / "new")
        began_s = time.monotonic()
        try:
            self._servers["new"] = self._serve(stack, "new")
        except InputError as error:
            raise GateFailed(f"it does not come up: {error}") from None
        return f"ready after {time.monotonic() - began_s:.1f} s"

    def _serve(self, stack: ExitStack, side: str) -> EmbeddedServer:
        return stack.enter_context(
            EmbeddedServer(
                self.scratch / side,
                http_port=0,
                grpc_port=0,
                metrics_port=0,
                log_path=self.journal.folder / f"triton-{side}.log",
                timeout_s=self.args.start_timeout_s,
            )
        )

    def parity(self) -> str:
        """What it serves against fp32 PyTorch."""
        server = self._servers["new"]
        flags = ("--url", server.grpc_url, "--http-url", server.http_url, "--json")
        rows = ("--rows", str(self.args.parity_rows)) if self.args.parity_rows else ()
        answer = self._ask("export.parity", *flags, *rows)
        if answer.data is not None:
            self.journal.keep("parity.json", answer.data)
        self._parity = answer.checked()
        return f"{len(self._parity['checks'])} checks over HTTP and gRPC"

    def accuracy(self) -> str:
        """Its task metric against that of the version that is served: a build may be true to a model that is worse."""
        metric = self._parity["metric"]
        if not metric:
            return LeftOut("no precision.metric in deploy.toml")
        value = min(each["value"] for each in metric["served"].values())
        if self.before is None:
            return LeftOut(f"{metric['name']} {value:.4f}; nothing is served to compare with")
        served = self._recorded(metric["name"])
        if served is None:
            return LeftOut(f"{metric['name']} {value:.4f}; version {self.before} has none in its manifest")
        said = f"{metric['name']} {value:.4f}, version {self.before} has {served:.4f}"
        if not value >= served * (1 - metric["max_drop"]):
            raise GateFailed(f"{said}: it may lose {metric['max_drop']:.2%}")
        return said

    def shadow(self, stack: ExitStack) -> str:
        """The same requests to it and to a server over the version that is served."""
        if self.before is None:
            return LeftOut("nothing is served to compare with")
        lay_out(self.model, self.before, number=self.before, folder=self.scratch / "base")
        self._servers["base"] = self._serve(stack, "base")
        urls = ("--base-url", self._servers["base"].grpc_url, "--new-url", self._servers["new"].grpc_url)
        how = ("--requests", str(self.args.requests), "--threshold", str(self.args.threshold), "--json")
        found = self._ask("loadtests.shadow", *urls, *how)
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
            f"{name} {each['same']:.1%} the same" for name, each in data["outputs"].items() if each["same"] is not None
        ]
        speed = (
            f"p50 {median['new_ms']:.2f} ms, {median['ratio']:.2f} ({median['low']:.2f} to {median['high']:.2f}) times"
        )
        return f"{speed} version {self.before}'s; {', '.join(same)}"

    def objectives(self) -> str:
        """Every line of the SLO, under load, on both; the candidate's decide."""
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
        """A load test of one server, judged; made again where the generator was at fault."""
        url = self._servers[side].grpc_url
        how = ("--url", url, "--target", self.args.target, "--duration-s", str(self._duration_s()), "--json")
        rate = ("--rate", str(self.args.rate)) if self.args.rate else ()
        for attempt in range(1, MOST_ATTEMPTS + 1):
            answer = self._ask("loadtests.run", *how, *rate)
            made = answer.checked(3)
            if made is None:
                raise InvalidMeasurement(answer.reason)
            kept = self.journal.folder / f"run-{side}-{attempt}"
            shutil.move(made["run"], kept)  # else it were the latest run of the model
            if answer.code == 0:
                break
        verdict: dict[str, Any] = self._ask("loadtests.slo", "--run", str(kept), "--json").checked(1, 3)
        return verdict

    def _duration_s(self) -> int:
        """Long enough for what the SLO's percentiles need to be told."""
        lines = self.spec.slo.all_objectives()
        lowest = min((line.limit for line in lines if line.kind == "throughput"), default=None)
        needed = 0.0
        for line in lines:
            rate = self.args.rate or line.rate_rps or self.spec.slo.rate_rps or lowest
            if line.percent is not None and rate:
                needed = max(needed, SPARE * math.log(0.01) / math.log(line.percent / 100) / rate)
        return max(self.args.duration_s, math.ceil(needed))

    def _recorded(self, metric: str) -> float | None:
        """What the manifest of the version that is served says of a task metric."""
        if self.before is None or not (self.model / str(self.before) / MANIFEST).is_file():
            return None
        found: float | None = (self._manifest(self.model, self.before).accuracy or {}).get("metrics", {}).get(metric)
        return found

    def _manifest(self, model: Path, version: int) -> PublishedManifest:
        return PublishedManifest.load(model / str(version) / MANIFEST)


def _compared(line: dict[str, Any], base: dict[str, Any] | None) -> str:
    """An objective of the candidate beside the served version's."""
    beside = "" if base is None else f", served {_number(base['seen'])}"
    limit = f"{line['relation']} {_number(line['limit'])}"
    note = f", {line['note']}" if line["note"] and line["status"] != "holds" else ""
    return f"{line['name']} {_number(line['seen'])} ({limit}{beside}): {line['status']}{note}"


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.4g}"
