#!/bin/bash
# The doctor, then Triton with the project's flags (serving/flags.py). Arguments go to serving.flags.
# Nobody looks after it from here: a plan runs in Triton's own process, and where that ends, the container does.
set -euo pipefail
# Descriptors, one or more a connection: a current Docker starts with 1024. A limit of a billion would cost some programs dear.
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
# NVIDIA's images choose the CUDA libraries that suit the driver here.
# shellcheck source=/dev/null
if [ -n "${BASH_ENV:-}" ] && [ -r "$BASH_ENV" ]; then . "$BASH_ENV"; fi
python -m serving.doctor --repository /models --preflight
mapfile -t flags < <(python -m serving.flags --repository /models --address 0.0.0.0 --behind-gateway "$@")
[ "${#flags[@]}" -gt 0 ] || exit 2  # the reason has been printed
# Triton's batcher in time (serving/wakeup.c); the loader passes over a library that does not fit.
export LD_PRELOAD=/opt/serving/serving/libwakeup.so${LD_PRELOAD:+:$LD_PRELOAD}
# Histograms of latency, which the embedded Triton does not have; clients' shared memory is off by default since 26.04.
exec tritonserver "${flags[@]}" --metrics-config=histogram_latencies=true
