#!/usr/bin/env bash
# Run a command as if on a lesser x86 processor: as_cpu.sh avx512|avx2|generic COMMAND...
# torch, MKL, oneDNN and bitsandbytes use no later instructions, and our kernels are compiled without them. `avx512` is
# AVX-512 without BF16.
set -euo pipefail
level=$1
shift
case $level in
avx512) export ATEN_CPU_CAPABILITY=avx512 DNNL_MAX_CPU_ISA=AVX512_CORE_VNNI MKL_ENABLE_INSTRUCTIONS=AVX512; march=x86-64-v4 ;;
avx2) export ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2; march=x86-64-v3 ;;
generic) export ATEN_CPU_CAPABILITY=default DNNL_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2; march=x86-64 ;;
*) echo "as_cpu.sh: unknown processor '$level': expected avx512, avx2 or generic." >&2; exit 2 ;;
esac
here=$(cd "$(dirname "$0")/.." && pwd)
bin=$here/.cache/as-$level
mkdir -p "$bin"
compiler=$(command -v cc)
cat >"$bin/cc.$$" <<CC
#!/usr/bin/env bash
exec "$compiler" "\${@/#-march=native/-march=$march}"
CC
chmod +x "$bin/cc.$$" && mv "$bin/cc.$$" "$bin/cc"
export PATH=$bin:$PATH PYTHONPATH=$here/tests/lesser_cpu${PYTHONPATH:+:$PYTHONPATH}
exec "$@"
