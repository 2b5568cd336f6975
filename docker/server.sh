#!/bin/bash
# The doctor, then Triton with the project's flags (serving/embedded/flags.py). Arguments go to deepseek flags.
# No supervisor: a plan runs in Triton's own process, and if that ends, the container ends.
# bash has read $BASH_ENV, with which NVIDIA's images choose the CUDA libraries for the driver. Do not source it here: it
# does not run under the next line.
set -euo pipefail
# Each connection takes file descriptors, and Docker starts with 1024. Not unlimited: some programs walk all of them.
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
python -m cli doctor --repository /models --preflight
mapfile -t flags < <(python -m cli flags --repository /models --address 0.0.0.0 --behind-gateway "$@")
[ "${#flags[@]}" -gt 0 ] || exit 2  # deepseek flags has printed the reason
# Latency histograms, which the embedded Triton does not have. Clients' shared memory is off by default since 26.04.
exec tritonserver "${flags[@]}" --metrics-config=histogram_latencies=true
