#!/usr/bin/env bash
# Builds the wheel of the Python client, installs it apart, and runs its tests from there. What needs a VM is skipped where
# CLADE, CLADE_LINUX_GUEST, CLADE_AGENT and CLADE_PYTHON_IMAGE do not say where one can be had; with `client` in CLADE_REQUIRE
# that is a failure.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/clade/python-client
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python=
for name in python3 python3.13 python3.12 python3.11; do
    # A name that is there may be a shim of nothing.
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$name; break; fi
done
[ -n "$python" ] || { echo "check.sh: Python 3.11 or newer is needed" >&2; exit 1; }

[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install -q 'build>=1.2' 'hatchling>=1.26' 'mypy>=1.10' 'pytest>=8' 'httpx>=0.27,<1'
# Of a copy: nothing is written beside the sources.
cp -r "$here" "$work/source"
"$venv/bin/python" -m build -q --wheel --no-isolation --outdir "$work" "$work/source"
"$venv/bin/pip" uninstall -q -y clade-vmm 2>/dev/null || true
"$venv/bin/pip" install -q --no-deps "$work"/*.whl

cd "$work"
"$venv/bin/mypy" --config-file "$here/pyproject.toml" --strict -p clade
if [ -n "${CLADE:-}" ]; then
    "$venv/bin/python" "$here/generate.py" --check "$CLADE"
    "$venv/bin/python" "$here/../docs/generate-api.py" --check "$CLADE"
fi
exec env PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" -m pytest -q -p no:cacheprovider --durations=5 "$here/tests"
