#!/bin/bash
# Starts nginx as the gateway, and has it read its files again, without a restart, where the addresses of the servers,
# the certificate or the limits have changed. What it cannot read or load waits (the metric gateway_reload_pending), and
# what it had serves on. SIGTERM lets requests in flight finish.
#
#   FOLDER=build/gateway TRITON_HTTP=127.0.0.1:8000 TRITON_GRPC=127.0.0.1:8001 docker/gateway/gateway.sh
#
# FOLDER has ca.crt, tls.crt, tls.key, limits.conf and keys/ (python -m serving.keys, python -m serving.stack).
# TRITON_HTTP and TRITON_GRPC are host:port, several with commas; a name stands for all of its addresses.
set -euo pipefail
# Descriptors, one or more a connection: a current Docker starts with 1024. A limit of a billion would cost some programs dear.
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
exec > >(exec cat)  # nginx opens its standard output by name, which it may only where it is ours
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="$(cd "${FOLDER:-/etc/gateway}" && pwd)"
run="${RUN_FOLDER:-/tmp/gateway}"
every_s="${WATCH_S:-2}"

for name in tls.crt tls.key limits.conf keys; do
    [ -r "$folder/$name" ] || { echo "error: $folder/$name cannot be read by user $(id -u); make keys and make stack write it" >&2; exit 2; }
done
mkdir -p "$run"
cp "$here"/{nginx.conf,grpc_pass.conf,grpc_error.conf,gateway.js} "$run/"
ln -sfn "$folder/limits.conf" "$run/limits.conf"
printf 'pid %s/nginx.pid;\nworker_processes %s;\n' "$run" "${WORKERS:-2}" >"$run/main.conf"
# Root is meant here only where it is nobody outside: in a rootless engine. nginx would change to another user.
[ "$(id -u)" != 0 ] || echo 'user root;' >>"$run/main.conf"
printf 'listen %s ssl backlog=4096;\nssl_certificate "%s/tls.crt";\nssl_certificate_key "%s/tls.key";\n' \
    "${LISTEN:-8443}" "$folder" "$folder" >"$run/listen.conf"
printf 'listen %s;\n' "${INTERNAL_LISTEN:-9145}" >"$run/internal.conf"

# One upstream: each address of each host:port. Connections are kept for a while only: a Triton that is told to stop takes
# no new ones and waits for those that are open, idle or not, until its exit time-out. One that failed is left alone for a
# second. An answer that is too late is a failure, too, so that in an overload all of them may be left alone: each is
# therefore a spare as well, and whoever is alive is asked. Where a look-up finds nothing, the addresses found before stay.
declare -A known=()
upstream() {
    local name="$1" servers="" spares="" host found address count=0
    for target in ${2//,/ }; do
        host="${target%:*}"
        found="$(getent ahostsv4 "$host" | awk '$2 == "STREAM" { print $1 }' | sort -u)" || true
        known[$target]="${found:-${known[$target]:-}}"
        for address in ${known[$target]}; do
            servers+="    server $address:${target##*:} max_fails=1 fail_timeout=1s;"$'\n'
            spares+="    server $address:${target##*:} max_fails=0 backup;"$'\n'
            count=$((count + 1))
        done
    done
    [ "$count" -gt 1 ] || spares=""  # nginx never leaves a single one alone
    printf 'upstream %s {\n%s%s    keepalive 128;\n    keepalive_timeout 1s;\n    keepalive_time 5s;\n}\n' "$name" \
        "${servers:-    server 127.0.0.1:9 down;
}" "$spares"
}

endpoints() {
    upstream triton_http "${TRITON_HTTP:-triton:8000}"
    upstream triton_grpc "${TRITON_GRPC:-triton:8001}"
    # shellcheck disable=SC2016  # nginx's variables, not the shell's
    printf 'js_var $folder "%s";\njs_var $run "%s";\n' "$folder" "$run"
    for kind in client_body proxy fastcgi uwsgi scgi; do
        printf '%s_temp_path %s/%s;\n' "$kind" "$run" "$kind"
    done
}

# What nginx reads again. Of the certificate a copy is kept: which one is served, not which one lies there, is told.
watched() {
    cat "$folder/tls.crt" >"$run/next.crt" &&
        cat "$run"/{endpoints.conf,next.crt} "$folder"/{tls.key,limits.conf} | sha256sum
}
loads() { nginx -p "$run" -c "$run/nginx.conf" -t -q; }

endpoints >"$run/endpoints.conf"
before="$(watched)"
loads
mv "$run/next.crt" "$run/served.crt"
rm -f "$run/pending"
nginx -p "$run" -c "$run/nginx.conf" &
nginx=$!
trap 'kill -QUIT "$nginx"' TERM INT
while kill -0 "$nginx" 2>/dev/null; do
    sleep "$every_s" &
    wait -n "$nginx" $! || break
    endpoints >"$run/endpoints.conf.part" && mv "$run/endpoints.conf.part" "$run/endpoints.conf"
    # A full /tmp, which has no room for the mark, ends no gateway.
    if ! after="$(watched)"; then  # one of them is being replaced, or not ours to read
        : >"$run/pending" || true
    elif [ "$after" = "$before" ]; then
        rm -f "$run/pending"
    elif loads; then
        kill -HUP "$nginx"
        mv "$run/next.crt" "$run/served.crt"
        rm -f "$run/pending"
        before="$after"
    else
        : >"$run/pending" || true
    fi
done
wait "$nginx"
