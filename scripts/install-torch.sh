#!/bin/sh
# Install the pinned torch for this machine: scripts/install-torch.sh PYTHON
#
# TORCH=auto  CUDA build where an NVIDIA driver is loaded, otherwise the CPU build (default)
# TORCH=cuda  the build that pip takes by default on Linux, several GB
# TORCH=cpu   the CPU build, about 200 MB
# TORCH_INDEX_URL  the index of CPU builds, if not PyTorch's own
#
# The CPU build falls back to pip's default build when that index does not answer.
set -eu
python=$1
here=$(cd "$(dirname "$0")/.." && pwd)
index=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}
build=${TORCH:-auto}
pip="$python -m pip install --quiet --constraint $here/constraints.txt"

case $build in
    auto) if [ -e /proc/driver/nvidia/version ]; then build=cuda; else build=cpu; fi ;;
    cpu | cuda) ;;
    *) echo "TORCH must be auto, cpu or cuda, not '$build'" >&2; exit 2 ;;
esac
if ! "$python" -c 'import torch' 2>/dev/null; then
    if [ "$build" = cpu ] && [ "$(uname -s)" = Linux ]; then
        # One short try: an index that is out of reach must not hold up the installation. What torch needs comes from
        # the default index.
        $pip --retries 0 --timeout 15 --index-url "$index" --no-deps torch ||
            echo "The index of CPU builds has no torch for this Python or did not answer; taking the default build." >&2
    fi
    $pip torch
fi
"$python" -c 'import torch; print("torch", torch.__version__)'
