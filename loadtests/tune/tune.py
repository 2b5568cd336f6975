"""Finds the batch size, queue delay, instances and threads that serve the SLO best on this machine.

Measured batches predict the p99 of every setting; the few that could win are published as `make engine` does it, each
served by its own real server, and compared with the default of `deploy.toml` in pairs of short runs
(`loadtests.tune.settings_search`). If a setting is proved better, it is written to the file that the key `tuned` of
`deploy.toml` names, and `make engine` publishes it.

Contract: the result is `build/<model>/tuning.json` (`loadtests.tune.tune_result.TuneResult`), drawn as `tuning.html`.
docs/tuning.md is the user's page.

Exit codes: 0 the search finished, with or without a gain; 2 bad input; 3 inconclusive: the load generator was the
limit, the default does not answer, or the time ran out before anything was compared.
"""

import argparse
import os
import platform
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, TunedFile, build_dir
from deepseek.spec.command import end_at_sigterm
from deepseek.spec.files.folders import alone_in, write_whole
from deepseek.spec.machine.cpu import this_cpu
from loadtests.report.searches import tuning_page
from loadtests.search.local_server import EMBEDDED, server_command, settings_of_local
from loadtests.search.slo_at_rate import objective_lines
from loadtests.tune.candidate_server import TuneConditions
from loadtests.tune.search_space import SearchSpace, ServingSettings
from loadtests.tune.settings_search import SettingsSearch
from loadtests.tune.tune_result import TuneResult, tuning_path


def main(options: argparse.Namespace) -> int:
    end_at_sigterm()
    result = tune(options, Console(stderr=True, markup=False))
    if options.json:
        print(result.model_dump_json(indent=2))
    else:
        Console(markup=False).print(result.conclusion, style="bold", soft_wrap=True)
        path = tuning_path(result.model)
        print(path, path.with_suffix(".html"), sep="\n")
    return 0


def default_and_space(
    options: argparse.Namespace, server: str, spec: DeploymentSpec, cores: int
) -> tuple[ServingSettings, SearchSpace]:
    """The settings of `deploy.toml` as the server serves them, and what to vary.

    The embedded Triton serves every queue delay as 0 (`serving.embedded.verified_repository`).
    """
    default, delays_us = ServingSettings.of(spec, options.target, cores), options.delay_us
    if server == EMBEDDED:
        if any(delays_us or ()):
            raise InputError(
                f"--delay-us: seen {max(delays_us)}; the embedded Triton serves only 0 (docs/triton.md); for others, "
                "give the command of Triton 26.08 or newer: --server"
            )
        default, delays_us = default.model_copy(update={"max_queue_delay_us": 0}), (0,)
    named = {"max_batch": options.max_batch, "instances": options.instances, "threads": options.threads}
    return default, SearchSpace.of(spec, options.target, cores, delays_us=delays_us, **named)


def conditions_of(options: argparse.Namespace, folder: Path, console: Console) -> TuneConditions:
    spec = DeploymentSpec.of_model(options.model, options.models, tuned=os.devnull).for_target(options.target)
    server = server_command(options.server, spec, options.target, options.env_file)
    return TuneConditions(
        spec=spec,
        settings=settings_of_local(options, spec, server),
        precision=None if options.precision == "auto" else options.precision,
        server=server,
        folder=folder,
        least_s=options.least_s,
        ends_at=time.monotonic() + options.max_s,
        console=console,
    )


def tune(options: argparse.Namespace, console: Console) -> TuneResult:
    """Searches, confirms the best candidate, writes the result and its page, and tuned.toml if a gain is proved."""
    folder, started = build_dir(options.model) / "tuning", datetime.now(UTC).isoformat(timespec="seconds")
    with alone_in(folder):
        conditions, cores = conditions_of(options, folder, console), this_cpu().cores
        spec = conditions.spec
        tuned = None if spec.tuned is None else options.models / options.model / spec.tuned
        if tuned is not None:
            TunedFile.read(tuned)  # a broken file is reported now, not after the search
        default, space = default_and_space(options, conditions.server, spec, cores)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        search = SettingsSearch(
            conditions=conditions,
            default=default,
            space=space,
            cores=cores,
            sizes=options.max_batch,
            most_pairs=options.pairs,
        )
        result = TuneResult(
            model=options.model,
            target=options.target,
            objectives=objective_lines(spec.slo),
            default=default,
            started=started,
            **search.run(),
        )
        path = tuning_path(options.model)
        result.save(path)  # first, in case tuned.toml cannot be written
        if result.best is not None and not options.dry_run:
            result = write_best(result, result.best, tuned)
            result.save(path)
        write_whole(path.with_suffix(".html"), tuning_page(result))
    return result


def write_best(result: TuneResult, best: ServingSettings, path: Path | None) -> TuneResult:
    """Writes the best settings to the file of tuned values, if there is one; the result's conclusion says so."""
    if path is None:
        hint = 'not written: deploy.toml names no file of tuned values; add tuned = "tuned.toml" at its top'
        return result.model_copy(update={"conclusion": f"{result.conclusion}; {hint}"})
    machine = result.machine
    where = f"{machine.get('cpu', platform.machine())}, {machine.get('cores', os.cpu_count())} cores"
    measured = f"{result.started}, {where}, {result.precision}, {', '.join(result.objectives)}: {result.gain}"
    TunedFile.read(path).with_target(result.target, best.tuned(measured)).write(path)
    hint = f"written to {path}; make engine MODEL={result.model} publishes it"
    if best.limits_requests and best.max_batch < result.default.max_batch:
        hint += f"; the server then refuses requests of more than {best.max_batch} rows"
    return result.model_copy(update={"applied": True, "conclusion": f"{result.conclusion}; {hint}"})
