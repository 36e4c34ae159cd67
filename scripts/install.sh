#!/usr/bin/env bash
# Fill a virtual environment: install.sh VENV [EXTRA]. Used by make and by the Dockerfile.
# TORCH=cpu|cuda chooses the torch build; by default CUDA where nvidia-smi is, CPU elsewhere.
set -euo pipefail
venv=$1 extra=${2:-}
cd "$(dirname "$0")/.."

python=""
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "adapterhub needs Python 3.11 or newer; none was found. Set PYTHON=/path/to/python." >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

torch=${TORCH:-$(command -v nvidia-smi >/dev/null && echo cuda || echo cpu)}
cpu_index=https://download.pytorch.org/whl/cpu
index=()
# On Linux the package index's own torch carries gigabytes of CUDA. The CPU build lives on an index of its own;
# where that cannot be reached, pip takes what it finds.
if [ "$torch" = cpu ] && [ "$(uname -s)" = Linux ] &&
    "$venv/bin/python" - "$cpu_index" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)
except OSError:
    sys.exit(1)
PY
then
    index=(--extra-index-url "$cpu_index")
fi
# pip also warns of what a machine's configuration names and does not have: kept for when something fails.
log=$venv/install.log
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile ${index[@]+"${index[@]}"} \
    --constraint constraints.txt --editable ".${extra:+[$extra]}" >"$log" 2>&1 || {
    cat "$log" >&2
    echo "pip could not fill $venv: its message is above, and in $log." >&2
    exit 1
}
# pip compiles one file after the other, and every package's own tests. Files that cannot be compiled (templates, other
# Pythons') were never to be imported.
"$venv/bin/python" -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' "$venv/lib" || true
