#!/usr/bin/env bash
# Fill a virtual environment with every part of adapterhub: install.sh VENV [MORE_EXTRAS]. Used by make and Docker.
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
# On Linux the torch of the package index includes gigabytes of CUDA. The CPU build has its own index; if that cannot be
# reached, pip installs what it finds.
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
# pip also prints warnings about a machine's configuration, so its output is shown only if it fails.
log=$venv/install.log
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile ${index[@]+"${index[@]}"} \
    --constraint constraints.txt --editable ".[all${extra:+,$extra}]" >"$log" 2>&1 || {
    cat "$log" >&2
    echo "pip could not fill $venv: its message is above, and in $log." >&2
    exit 1
}
# pip would compile files one at a time, including every package's own tests. Files that cannot be compiled, such as
# templates, are never imported.
"$venv/bin/python" -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' "$venv/lib" || true
