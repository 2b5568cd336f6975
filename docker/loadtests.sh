#!/bin/bash
# Measures $MODEL, then judges the run: the exit code is the verdict's. Arguments go to `deepseek loadtest`.
# Without --url it calls $URL and trusts $CA_CERT. Without $TARGET it takes the model's target from $TARGETS, which is
# "model=target model=target …".
set -euo pipefail
for each in ${TARGETS:-}; do
    [ "${each%%=*}" != "$MODEL" ] || TARGET="${TARGET:-${each#*=}}"
done
[ -n "${TARGET:-}" ] || { echo "error: MODEL=$MODEL: the stack serves ${TARGETS:-no model}; set MODEL to one of these" >&2; exit 2; }
[[ " $* " == *" --url"[\ =]* ]] || set -- --url "$URL" --ca-cert "$CA_CERT" "$@"
python -m cli loadtest --model "$MODEL" --models /models --target "$TARGET" --inputs /inputs.npz "$@"
python -m cli verdict --model "$MODEL" --models /models
