#!/bin/bash
# Measures $MODEL, then judges the run: the exit code is the verdict's. Arguments go to loadtests.run.
# Without --url: what answers at $URL, with the certificates of $CA_CERT.
set -euo pipefail
[[ " $* " == *" --url"[\ =]* ]] || set -- --url "$URL" --ca-cert "$CA_CERT" "$@"
python -m loadtests.run --model "$MODEL" --models /models --target "$TARGET" --inputs /inputs.npz "$@"
python -m loadtests.slo --model "$MODEL" --models /models
