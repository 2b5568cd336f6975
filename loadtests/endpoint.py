"""What a load test is sent to, and with: command-line flags that are alike wherever a running server is loaded.

Example:
    add_endpoint_arguments(parser)
    Settings(model=args.model, inputs=inputs_of(args.model), rate_rps=50.0, duration_s=10.0, **endpoint_of(args, slo))
"""

from __future__ import annotations

import argparse
import os
from typing import Any, get_args

from deepseek.spec import Parser, SloSpec, Target, add_model_arguments, build_dir
from loadtests import limits

DEFAULT_PORTS = {"grpc": 8001, "http": 8000}


def add_endpoint_arguments(parser: Parser) -> None:
    """--model, --models, --target and how to reach the endpoint, alike wherever a running server is loaded."""
    add_model_arguments(parser)
    parser.add_argument(
        "--target", choices=get_args(Target), default="onnxruntime", help="what runs the graph (default: %(default)s)"
    )
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    parser.add_argument("--url", help="host:port (default: 127.0.0.1, port 8001 for grpc, 8000 for http)")
    parser.add_argument("--tls", action="store_true", help="speak TLS, trusting the system's authorities")
    parser.add_argument(
        "--ca-cert", metavar="FILE", help="speak TLS, trusting this authority; $DEEPSEEK_API_KEY is sent"
    )


def endpoint_of(args: argparse.Namespace, *slos: SloSpec) -> dict[str, Any]:
    """The fields of `Settings` that they and --workers, --max-in-flight, --arrivals, --warmup-s, --timeout-s are.

    `slos` are those that the answers are judged by.
    """
    return {
        "models": args.models,
        "target": args.target,
        "protocol": args.protocol,
        "url": args.url or f"127.0.0.1:{DEFAULT_PORTS[args.protocol]}",
        "tls": args.tls,
        "ca_cert": args.ca_cert,
        "arrivals": args.arrivals,
        "warmup_s": args.warmup_s,
        "timeout_s": limits.timeout_for(args.timeout_s, *slos),
        "max_in_flight": args.max_in_flight,
        "workers": len(os.sched_getaffinity(0)) if args.workers == -1 else args.workers,
    }


def inputs_of(model: str) -> str:
    """Where `make engine` leaves a model's real inputs."""
    return str(build_dir(model) / "evaluation.npz")
