#!/bin/bash
# Runs the compose stack's Triton alone over another repository, until SIGTERM. docker compose run does not pass SIGTERM on.
#
#   docker/stack-server.sh REPOSITORY HTTP_PORT GRPC_PORT [ENV_FILE]
set -euo pipefail
export STACK_REPOSITORY="$1" TUNE_HTTP_PORT="$2" TUNE_GRPC_PORT="$3"
name="deepseek-stack-server-$3"
trap 'docker rm --force "$name" >/dev/null 2>&1 || true' EXIT
trap 'exit 143' TERM INT
docker compose --env-file "${4:-.env}" run --rm --no-TTY --no-deps --service-ports --name "$name" triton &
wait $!
