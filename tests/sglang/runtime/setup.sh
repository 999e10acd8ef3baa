#!/usr/bin/env bash
# setup.sh VENV [PYTHON]: the real SGLang for a Linux x86-64 machine without a GPU. 620 MB to download, 2.7 GB on disk.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1 python=${2:-python3}

"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
# Everything without dependencies: SGLang names a CUDA build of torch, and several gigabytes would follow it.
"${pip[@]}" install "torch==$(sed -n 's/^torch==//p' "$here/../../../constraints.txt")"
"${pip[@]}" install --no-deps -r "$here/requirements.lock"
"${pip[@]}" install --no-deps -e "$here/../../.."
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$here/sgl_kernel" "$here/sglang_on_cpu.py" "$site/"
echo "import sglang_on_cpu" > "$site/sglang_on_cpu.pth"
SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -c 'import sglang.srt.entrypoints.http_server' 2>/dev/null ||
	{ echo "SGLang was installed and can't be imported: SGLANG_USE_CPU_ENGINE=1 $venv/bin/python -c 'import sglang.srt.entrypoints.http_server'"; exit 1; }
