"""Our load test beside perf_analyzer."""

from __future__ import annotations

from tests.bench.setting import Bench


def peer(bench: Bench) -> None:
    """Our load test beside perf_analyzer: throughput and p50 on the same server under the same load."""
    with bench.server(bench.repository("encoder")) as server:
        for protocol in ("grpc", "http"):
            ours, theirs = [], []
            for _ in range(max(3, bench.pairs // 2)):
                ours.append(bench.loadtest(server, "encoder", protocol, "--users", "4"))
                theirs.append(bench.peer_figures(server, "encoder", protocol, 4))
            for key, title in (("throughput", "throughput"), ("p50_us", "p50")):
                ratios = [own[key] / other[key] for own, other in zip(ours, theirs, strict=True)]
                bench.record(f"load test over perf_analyzer, {title}, {protocol}", ratios, "goal: 0.9 to 1.1")
