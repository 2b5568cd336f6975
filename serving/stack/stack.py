"""The command `stack`: what `docker compose up` needs to serve a repository.

Contract: reads the repository and each model's `deploy.toml`, from --models or from where the last build had it. Writes
the env file (`serving.stack.write_env_file`), a certificate and `limits.conf` in the gateway's folder
(`serving.stack.gateway_limits`), and in `observe/` beside it Prometheus's rules, Grafana's dashboard and a copy of
`docker/observe/`. Engines that need a GPU get NVIDIA's Triton, all others the embedded one.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import asdict

from deepseek.spec import InputError
from deepseek.spec.files.folders import alone_in, let_all_read, write_whole
from deepseek.spec.files.read_env_file import gpu_stack_tag, setting_before
from deepseek.spec.machine.triton_release import TRITON_TAG, check_tag
from serving.observe.alerts import RUNBOOK
from serving.repository.served_models import ServedModel, served_models
from serving.stack.certificate import give
from serving.stack.gateway_folder import ensure_folder, gateway_folder, observe_folder, results_folder, source_file
from serving.stack.refresh import folders_of, source_of, write_limits, write_observed, write_settings
from serving.stack.write_env_file import environment, write_env_file

PROJECT = "deepseek"
GATEWAY_PORT = 8443
LOCAL_PORTS = (8000, 8001)  # HTTP and gRPC, where the commands look for a server
PROJECT_NAME = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")  # what Compose accepts, and an image's name


def local_ports(text: str) -> tuple[int, ...]:
    """Ports on loopback for HTTP and gRPC; none for 0, the default for ""."""
    if text == "0":
        return ()
    ports = tuple(int(part) for part in text.split(",") if part.isdecimal()) if text else LOCAL_PORTS
    if len(ports) != 2 or len(set(ports)) != 2 or not all(0 < port < 65536 for port in ports) or text.count(",") > 1:
        raise InputError(f"LOCAL_PORTS: seen {text!r}; use two ports, HTTP,GRPC, such as 8000,8001, or 0 for none")
    return ports


def _check(options: argparse.Namespace) -> None:
    """Fills in earlier choices; raises InputError for values that no stack can have."""
    options.folder = options.folder or gateway_folder()
    if options.gateway_port is None:
        before = setting_before(options.env_file, "GATEWAY_PORT")
        options.gateway_port = int(before) if before.isdigit() else GATEWAY_PORT
    options.local_ports = local_ports(options.local_ports or setting_before(options.env_file, "LOCAL_PORTS"))
    options.project = options.project or setting_before(options.env_file, "COMPOSE_PROJECT_NAME") or PROJECT
    options.triton_tag = options.triton_tag or gpu_stack_tag(options.env_file) or TRITON_TAG
    if options.gateway_port in options.local_ports:
        raise InputError(f"GATEWAY_PORT={options.gateway_port} is one of LOCAL_PORTS; use three different ports")
    if not PROJECT_NAME.fullmatch(options.project):
        raise InputError(
            f"PROJECT: seen {options.project!r}; use lower-case letters and digits, with single - or _ between them"
        )
    check_tag(options.triton_tag)
    for path in (options.repository, options.models, options.folder):
        where = os.fsencode(path.resolve()).decode(errors="replace")
        if "'" in where or "\ufffd" in where:
            raise InputError(f"{where}: Compose cannot read ' and bytes that are not UTF-8 in a path; use another")


def _write(options: argparse.Namespace, models: list[ServedModel], runbook: str) -> None:
    """Everything but the env file."""
    folder = options.folder
    ensure_folder(folder, options.host)
    write_limits(models, folder)
    write_observed(models, observe_folder(folder), runbook)
    write_settings(observe_folder(folder))
    places = {"repository": str(options.repository.resolve()), "models": str(options.models.resolve())}
    folders = {model.name: str(model.models.resolve()) for model in models if model.models}
    source = {**places, "folders": folders, "runbook": runbook}
    write_whole(source_file(folder), json.dumps(source, indent=2) + "\n")
    let_all_read(options.repository)
    results_folder(folder).mkdir(exist_ok=True)
    give(results_folder(folder), folder)


def main(options: argparse.Namespace) -> None:
    _check(options)
    with alone_in(options.folder):  # else the files of an older look at the repository may replace those of a newer one
        before = source_of(options.repository, options.folder)
        models = served_models(options.repository, options.models, folders_of(before))
        names = [model.name for model in models]
        if options.model and options.model not in names:
            raise InputError(f"--model {options.model!r}: not in {options.repository}, which has {', '.join(names)}")
        _write(options, models, options.runbook or before.get("runbook") or RUNBOOK)
        write_env_file(options.env_file, environment(models, options))
    _report(options, models)


def _report(options: argparse.Namespace, models: list[ServedModel]) -> None:
    for model in (model for model in models if not model.models):
        print(
            f"note: {model.name}: no deploy.toml in {options.models}, so no alert watches its SLO; name its folder: "
            "make stack MODELS=...",
            file=sys.stderr,
        )
    for model in (model for model in models if not model.has_image):
        print(
            f"note: {model.name}: no image has the execution provider {model.provider!r}, so the stack cannot serve "
            "it; make serve does, with this machine's ONNX Runtime",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps([asdict(model) for model in models], indent=2, default=str))
        return
    names = ", ".join(model.name for model in models)
    server = "NVIDIA's Triton" if any(model.needs_gpu for model in models) else "the embedded Triton, no GPU"
    print(f"stack     {options.env_file}: docker compose up serves {names} ({server})", file=sys.stderr)
