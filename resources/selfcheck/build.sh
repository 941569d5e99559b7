#!/usr/bin/env bash
# Builds the program that checks the machine it runs on: resources/selfcheck/build.sh FILE
set -euo pipefail
if [ $# != 1 ]; then
    echo "usage: $0 FILE" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gcc -O2 -Wall -Wextra -Werror -static -pthread -o "$1" "$here/selfcheck.c"
