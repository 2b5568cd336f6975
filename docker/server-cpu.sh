#!/bin/bash
# The embedded Triton. It checks every version and serves the newest intact one of each model; a model without one ends the
# container. On SIGTERM the launcher lets requests in flight finish. If a model's process dies and cannot be replaced, it
# ends with 1, and the restart policy starts the container again. It waits for its models as long as the health checks do
# (docker/server-cpu.Dockerfile, kubernetes/base/triton.yaml).
set -euo pipefail
exec python -m cli serve --repository /models --address 0.0.0.0 --behind-gateway --echo-log --timeout-s 300 "$@"
