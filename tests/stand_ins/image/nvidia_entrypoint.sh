#!/bin/bash
echo "== A stand-in for NVIDIA's image =="
exec "$@"
