"""Settings from the options that all commands share which load a running server."""

import argparse
from typing import Any

from deepseek.spec import InputError, SloSpec, build_dir
from deepseek.spec.machine.cpu import this_cpu
from loadtests.results.settings import ROUTES
from loadtests.slo.slo_demands import timeout_for


def settings_fields(args: argparse.Namespace, *slos: SloSpec) -> dict[str, Any]:
    """Fields of `LoadSettings`; `slos` judge the answers and set the default time-out."""
    return {
        "models": str(args.models),
        "target": args.target,
        "protocol": args.protocol,
        "url": args.url,
        "route": _route(args),
        "tls": args.tls,
        "ca_cert": args.ca_cert,
        "names": args.names,
        "arrivals": args.arrivals,
        "warmup_s": args.warmup_s,
        "timeout_s": timeout_for(args.timeout_s, *slos),
        "max_in_flight": args.max_in_flight,
        "priority": args.priority,
        "workers": args.workers if args.workers > 0 else this_cpu().cores,
    }


def _route(args: argparse.Namespace) -> str | None:
    """host:port/path of --route. A path alone: at --url if that is given, else at the port of `make serve`."""
    if args.route is None:
        return None
    place, _, path = args.route.partition("/")
    if f"/{path}" not in ROUTES:
        raise InputError(f"--route {args.route}: allowed: {', '.join(ROUTES)}, or one of them after host:port")
    return f"{place or (args.url if 'url' in args.given else f'127.0.0.1:{args.openai_port}')}/{path}"


def inputs_of(model: str) -> str:
    """The file of real inputs that `make engine` writes for a model."""
    return str(build_dir(model) / "evaluation.npz")
