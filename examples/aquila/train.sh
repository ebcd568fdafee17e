#!/usr/bin/env bash
# Trains examples/aquila/RECIPE.yaml; train_RECIPE.sh calls it. Further arguments are Megatron's, or
# the launcher's (--dry-run, --nodes N, ...: docs/launch.md).
#
#   NPROC       processes a machine (default: the recipe's, or 1)
#   OUTPUT_DIR  the run directory (default outputs/RECIPE in the project)
#   DATA_DIR    the prepared data (default outputs/tiny_data for tiny, else data, in the project)
set -euo pipefail

recipe=$1
shift
root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." >/dev/null && pwd)
export OUTPUT_DIR=${OUTPUT_DIR:-$root/outputs/$recipe}

PY=$("$root/scripts/bootstrap.sh" run)
if [[ $recipe == tiny ]]; then
  export DATA_DIR=${DATA_DIR:-$root/outputs/tiny_data}
  "$PY" "$root/tools/prepare_tiny_data.py" --output-dir "$DATA_DIR"
else
  export DATA_DIR=${DATA_DIR:-$root/data}
fi
exec "$PY" -m flagscale.launch "$root/examples/aquila/$recipe.yaml" "$@"
