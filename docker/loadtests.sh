#!/bin/bash
# Measures $MODEL, then judges the run: the exit code is the verdict's. Arguments go to loadtests.run.
set -euo pipefail
python -m loadtests.run --model "$MODEL" --models /models --target "$TARGET" --inputs /inputs.npz "$@"
python -m loadtests.slo --model "$MODEL" --models /models
