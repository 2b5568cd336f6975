#!/bin/bash -p
# Exit 0 if http://127.0.0.1:PORT/PATH answers 200. Only bash: the images have no curl. -p skips $BASH_ENV: in NVIDIA's images
# that file takes seconds, longer than a health check may.
set -euo pipefail
exec 3<>"/dev/tcp/127.0.0.1/$1"
printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3
read -r _ status _ <&3
[ "$status" = 200 ]
