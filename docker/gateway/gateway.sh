#!/bin/bash
# Starts nginx as the gateway and reloads it when server addresses, certificate or limits change. If it cannot read or load a
# change, the old files stay in effect and the metric gateway_reload_pending is 1. SIGTERM lets requests in flight finish.
#
#   FOLDER=build/gateway TRITON_HTTP=127.0.0.1:8000 TRITON_GRPC=127.0.0.1:8001 TRITON_OPENAI=127.0.0.1:8003 docker/gateway/gateway.sh
#
# FOLDER has ca.crt, tls.crt, tls.key, limits.conf and keys/ (deepseek keys, deepseek stack).
# With LOCAL_PORTS (any value but 0) it also listens without TLS at LOCAL_LISTEN, by default 8000 and 8001.
# TRITON_HTTP, TRITON_GRPC and TRITON_OPENAI (the process of the /v1 routes) are host:port, separated by commas; a name means all
# of its addresses.
set -euo pipefail
# Each connection takes file descriptors, and Docker starts with 1024. Not unlimited: some programs walk all of them.
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
# What nginx writes. A caller may put its key into the query or another place by mistake: it is not logged. nginx opens its
# standard output by name and must own it.
exec 3> >(exec stdbuf --output=L sed --regexp-extended 's/dsk_[A-Za-z0-9_-]{43}/an API key/g')
log=$!
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="$(cd "${FOLDER:-/etc/gateway}" && pwd)"
run="${RUN_FOLDER:-/tmp/gateway}"
every_s="${WATCH_S:-2}"

for name in tls.crt tls.key limits.conf keys; do
    [ -r "$folder/$name" ] || { echo "error: $folder/$name cannot be read by user $(id -u); it must exist (make stack) and belong to that user" >&2; exit 2; }
done
mkdir -p "$run"
[ -O "$run" ] || { echo "error: $run belongs to another user, who could change what nginx runs; set RUN_FOLDER to a folder of your own" >&2; exit 2; }
cp "$here"/{nginx.conf,grpc_pass.conf,grpc_error.conf,gateway.js} "$run/"
ln -sfn "$folder/limits.conf" "$run/limits.conf"
printf 'pid %s/nginx.pid;\nworker_processes %s;\n' "$run" "${WORKERS:-2}" >"$run/main.conf"
# Root here means a rootless Docker, where it is your own user outside. nginx would otherwise switch to another user.
[ "$(id -u)" != 0 ] || echo 'user root;' >>"$run/main.conf"
printf 'listen %s ssl backlog=4096;\nssl_certificate "%s/tls.crt";\nssl_certificate_key "%s/tls.key";\n' \
    "${LISTEN:-8443}" "$folder" "$folder" >"$run/listen.conf"
[ "${LOCAL_PORTS:-0}" = 0 ] || printf 'listen %s backlog=4096;\n' ${LOCAL_LISTEN:-8000 8001} >>"$run/listen.conf"
# Docker passes on calls to a published port of 127.0.0.1 from the host's address on the bridge: the default gateway. No
# other container has it.
{
    printf 'geo $from_this_machine {\n    default "";\n    127.0.0.0/8 1;\n'
    while read -r _ destination via _; do
        [ "$destination" != 00000000 ] ||
            printf '    %d.%d.%d.%d 1;\n' "0x${via:6:2}" "0x${via:4:2}" "0x${via:2:2}" "0x${via:0:2}"
    done </proc/net/route
    printf '}\n'
} >"$run/local.conf"
printf 'listen %s;\n' "${INTERNAL_LISTEN:-9145}" >"$run/internal.conf"

# Prints one upstream with each address of each host:port. Connections are short-lived, because a stopping Triton waits for
# open ones, even idle, until its exit time-out. A failed server is ejected for a second. A late answer counts as a failure,
# so an overload can eject all servers: each is also listed as a backup. If a look-up fails, the old addresses stay.
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
    [ "$count" -gt 1 ] || spares=""  # nginx never ejects a single server
    printf 'upstream %s {\n%s%s    keepalive 128;\n    keepalive_timeout 1s;\n    keepalive_time 5s;\n}\n' "$name" \
        "${servers:-    server 127.0.0.1:9 down;
}" "$spares"
}

endpoints() {
    upstream triton_http "${TRITON_HTTP:-triton:8000}"
    upstream triton_grpc "${TRITON_GRPC:-triton:8001}"
    upstream triton_openai "${TRITON_OPENAI:-triton:8003}"
    # shellcheck disable=SC2016  # nginx's variables, not the shell's
    printf 'js_var $folder "%s";\njs_var $run "%s";\n' "$folder" "$run"
    for kind in client_body proxy fastcgi uwsgi scgi; do
        printf '%s_temp_path %s/%s;\n' "$kind" "$run" "$kind"
    done
}

# A checksum of the files that nginx loads. A copy of the certificate is kept, since the metrics report the served one.
watched() {
    cat "$folder/tls.crt" >"$run/next.crt" &&
        cat "$run"/{endpoints.conf,next.crt} "$folder"/{tls.key,limits.conf} | sha256sum
}
# nginx also loads a key of another kind than the certificate's (RSA, EC), and then no caller can connect.
is_pair() {
    [ "$(openssl x509 -in "$run/next.crt" -noout -pubkey)" = "$(openssl pkey -in "$folder/tls.key" -passin pass: -pubout)" ] ||
        { echo "error: tls.crt and tls.key: key values mismatch; put a certificate and its own key into $folder" >&2; return 1; }
}
loads() { is_pair && nginx -p "$run" -c "$run/nginx.conf" -t -q; }

endpoints >"$run/endpoints.conf"
before="$(watched)"
loads
mv "$run/next.crt" "$run/served.crt"
rm -f "$run/pending"
nginx -p "$run" -c "$run/nginx.conf" >&3 2>&3 3>&- &
nginx=$!

watch() {
    set +e  # what fails, such as a write into a full /tmp, is tried again
    while sleep "$every_s" && kill -0 "$nginx" 2>/dev/null; do
        endpoints >"$run/endpoints.conf.part" && mv "$run/endpoints.conf.part" "$run/endpoints.conf"
        if ! after="$(watched)"; then  # a file is being replaced, or is not readable
            : >"$run/pending"
        elif [ "$after" = "$before" ]; then
            rm -f "$run/pending"
        elif loads; then
            kill -HUP "$nginx"  # it may just have stopped
            mv "$run/next.crt" "$run/served.crt"
            rm -f "$run/pending"
            before="$after"
        else
            : >"$run/pending"
        fi
    done
}
# In a process of its own: bash 5.2 fails if a signal with a trap arrives while it reads a "$(...)".
watch 3>&- &
watcher=$!
trap 'kill "$watcher" 2>/dev/null || true' EXIT
trap 'kill -QUIT "$nginx"' TERM INT
while kill -0 "$nginx" 2>/dev/null; do
    wait "$nginx" || true  # a signal ends it too
done
wait "$nginx" && status=0 || status=$?
exec 3>&-
wait "$log" || true  # its last lines
exit "$status"
