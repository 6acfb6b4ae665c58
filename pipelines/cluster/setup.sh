#!/usr/bin/env bash
# Run on each node by `ray up`, before Ray starts. What is done already is not done again.
#
# The environment's packages, mmcv's compiled ops among them, and our op are cached on the shared
# storage by kind of node (CPU, or the GPUs' compute capability), so that only the first node of a
# kind compiles.
set -euo pipefail
cd "$(dirname "$0")/../.."
checkout=$PWD
settings=$HOME/.config/elsa/cluster.env
# shellcheck source=/dev/null
[ ! -f "$settings" ] || . "$settings"

missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v git >/dev/null || missing+=(git)
command -v make >/dev/null || missing+=(make)
python3 -c "import venv, ensurepip" 2>/dev/null || missing+=(python3-venv)
[ -z "${ELSA_NFS:-}" ] || command -v mount.nfs4 >/dev/null || missing+=(nfs-common)
if [ ${#missing[@]} -gt 0 ]; then
  sudo apt-get update -qq
  sudo apt-get install -yqq --no-install-recommends "${missing[@]}"
fi

# data/, storage/ and .runs/ of every node are those of the shared storage: what one writes all
# see, and a new head finds the runs of the old one.
if [ -n "${ELSA_NFS:-}" ]; then
  shared=/mnt/elsa
  sudo mkdir -p $shared
  mountpoint -q $shared || sudo mount -t nfs4 -o nfsvers=4.1,hard,timeo=600,noresvport "$ELSA_NFS" $shared
  for name in data storage .runs; do
    sudo mkdir -p "$shared/$name"
    sudo chown "$(id -u):$(id -g)" "$shared/$name"
    mkdir -p "$name"
    mountpoint -q "$name" || sudo mount --bind "$shared/$name" "$name"
  done
fi
cache=$checkout/storage/cache
mkdir -p "$cache"

kind=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd ';')
  export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1 CUDA_HOME=${CUDA_HOME:-/usr/local/cuda-13.0}
  kind=cuda-${TORCH_CUDA_ARCH_LIST//;/-}
fi

# pyproject.toml pins every package, so all nodes get the same set. A
# cache for each kind: uv would take a wheel of mmcv that was built without CUDA for one with it.
UV_CACHE_DIR=$cache/uv-$kind UV_LINK_MODE=copy XDG_CACHE_HOME=$cache flock "$cache/uv-$kind.lock" make setup

fits() {
  .venv/bin/python - "$1" "$kind" <<'PYTHON'
import sys
from pathlib import Path

from ops import library

try:
    record = library.verify(Path(sys.argv[1]))
except (FileNotFoundError, library.StaleLibraryError):
    sys.exit(1)
sys.exit(not record["cuda"] and sys.argv[2] != "cpu")
PYTHON
}
if ! fits build/op; then
  (
    flock 9
    fits "$cache/op-$kind" || .venv/bin/python -m ops.build --quiet --out "$cache/op-$kind"
  ) 9>"$cache/op-$kind.lock"
  rm -rf build/op
  mkdir -p build
  cp -r "$cache/op-$kind" build/op
fi

# Into .dvc/config.local, which git ignores.
if [ -n "${ELSA_BUCKET:-}" ]; then
  .venv/bin/dvc remote add --local --force --default remote "s3://$ELSA_BUCKET/dvc"
fi

line="source $checkout/pipelines/cluster/env.sh && export RAY_ADDRESS=auto && cd $checkout"
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >>~/.bashrc
