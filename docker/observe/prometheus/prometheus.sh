#!/bin/sh
# Runs Prometheus and reloads it when its configuration or rules change (make engine, make release, make rollback write
# rules). Arguments go to prometheus. If a new file is invalid, Prometheus logs why and keeps the old one. Only /bin/sh:
# Prometheus's own image has busybox.
set -eu
config="${CONFIG:-/etc/prometheus/prometheus.yml}"
rules="${RULES:-/rules}"

watched() { cat "$config" "$rules"/*.yml 2>/dev/null | cksum; }

before="$(watched)"
prometheus --config.file="$config" "$@" &
prometheus=$!
trap 'kill -TERM "$prometheus"' TERM INT
trap 'kill -HUP "$prometheus"' HUP
while kill -0 "$prometheus" 2>/dev/null; do
    sleep "${WATCH_S:-2}" &
    wait $! || true  # a signal ends the wait
    after="$(watched)"
    if [ "$after" != "$before" ]; then
        kill -HUP "$prometheus" || true
        before="$after"
    fi
done
wait "$prometheus"
