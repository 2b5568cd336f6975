#!/bin/bash
# Measures $MODEL, then judges the run: the exit code is the verdict's. Arguments go to loadtests.run.
# Without --url: what answers at $URL, with the certificates of $CA_CERT. Without $TARGET: what $TARGETS has for the model,
# which is "model=target model=target …".
set -euo pipefail
for each in ${TARGETS:-}; do
    [ "${each%%=*}" != "$MODEL" ] || TARGET="${TARGET:-${each#*=}}"
done
[ -n "${TARGET:-}" ] || { echo "error: MODEL=$MODEL: the stack serves ${TARGETS:-nothing}; name one of them" >&2; exit 2; }
[[ " $* " == *" --url"[\ =]* ]] || set -- --url "$URL" --ca-cert "$CA_CERT" "$@"
python -m loadtests.run --model "$MODEL" --models /models --target "$TARGET" --inputs /inputs.npz "$@"
python -m loadtests.slo --model "$MODEL" --models /models
