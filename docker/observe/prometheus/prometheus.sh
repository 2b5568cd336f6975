#!/bin/sh
# Prometheus, which reads its configuration and rules again where they have changed: make engine, make release and make
# rollback write the rules anew. Arguments go to prometheus. What is wrong with a new file, Prometheus logs, and keeps
# the old one. /bin/sh alone: Prometheus's own image has busybox.
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
