#!/usr/bin/env bash
# Trains examples/aquila/tiny.yaml on this machine; further arguments are Megatron's.
#
#   NPROC       processes (default 1)
#   OUTPUT_DIR  the run directory (default outputs/tiny in the project)
#   DATA_DIR    the prepared data (default outputs/tiny_data in the project)
set -euo pipefail

root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." >/dev/null && pwd)
export OUTPUT_DIR=${OUTPUT_DIR:-$root/outputs/tiny}
export DATA_DIR=${DATA_DIR:-$root/outputs/tiny_data}

PY=$("$root/scripts/bootstrap.sh" run)
"$PY" "$root/tools/prepare_tiny_data.py" --output-dir "$DATA_DIR"
exec "$PY" -m flagscale.launch "$root/examples/aquila/tiny.yaml" "$@"
