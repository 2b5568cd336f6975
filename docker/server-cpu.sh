#!/bin/bash
# The doctor, then the embedded Triton: it serves the newest good version of a model, and only one without any ends the
# container. SIGTERM reaches the launcher, which lets requests in flight finish. It ends with 1
# where a model's process was killed and cannot be replaced: the restart policy starts the container again. It waits for
# its models as long as the health checks do (docker/server-cpu.Dockerfile, kubernetes/base/triton.yaml).
set -euo pipefail
# Descriptors, one or more a connection: a current Docker starts with 1024. A limit of a billion would cost some programs dear.
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
python -m serving.doctor --repository /models --preflight --embedded
exec python -m serving.embedded --repository /models --address 0.0.0.0 --behind-gateway --echo-log --timeout-s 300 "$@"
