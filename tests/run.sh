#!/usr/bin/env bash
# Every check of the project: the linters, then the tests that take moments, then the slow ones.
# Arguments go to pytest, for example: tests/run.sh -k patches
set -euo pipefail
shopt -s nullglob
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null

PY=$(scripts/bootstrap.sh test)
cores=$(env -u OMP_NUM_THREADS nproc) # it would take that for its answer
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --- linters: all of them are shown, then the first failure ends the run -------------------------

failed=()
lint() { # NAME COMMAND...
  printf '== %s\n' "$1"
  "${@:2}" || failed+=("$1")
}
lint "ruff check" "$PY" -m ruff check
lint "ruff format" "$PY" -m ruff format --check
lint "mypy" "$PY" -m mypy
lint "import-linter" "$PY" "$(dirname "$PY")/lint-imports" --no-logo
lint "codespell" "$PY" -m codespell_lib
if ((${#failed[@]})); then
  printf 'no test was run, because of:'
  printf ' [%s]' "${failed[@]}"
  printf '\n'
  exit 1
fi

# --- tests ----------------------------------------------------------------------------------------

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT

status=0
stage() { # NAME [FOLDER...]
  printf '== %s tests\n' "$1"
  local code=0
  "$PY" -m pytest --junit-xml="$reports/$1.xml" -n "$workers" --dist loadfile "${@:2}" \
    "${options[@]}" || code=$?
  # pytest says 5 when it ran nothing. A -k that leaves one stage empty is fine: what counts is
  # that the whole is not empty.
  if ((code != 0 && !(code == 5 && ${#options[@]}))); then status=$code; fi
}
options=("$@")
# Much of a test is waiting for processes to start; more workers than that only get in their way.
workers=$((cores < 4 ? cores : 4))
stage fast tests/unit
# In processes of their own: they run in Triton's interpreter, which is chosen once for a process.
if ((status == 0)); then TRITON_INTERPRET=1 stage kernels tests/kernels; fi
slow=()
for folder in tests/distributed tests/functional; do
  if [[ -d $folder ]]; then slow+=("$folder"); fi
done
if ((status == 0 && ${#slow[@]})); then stage slow "${slow[@]}"; fi
# Apart, for they wait for seconds of a clock, which a machine full of other tests stretches.
if [[ $status == 0 && -d tests/slurm ]]; then stage slurm tests/slurm; fi

# Ends with the line "N passed, N failed, N skipped in S s", and fails if nothing passed.
"$PY" - "$SECONDS" "$reports"/*.xml <<'PYTHON' || status=1
import sys
from collections import Counter
from xml.etree import ElementTree

counts = Counter()
for report in sys.argv[2:]:
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        counts["failed" if bad else "skipped" if "skipped" in kinds else "passed"] += 1
print(", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")), end=" ")
print(f"in {sys.argv[1]} s")
sys.exit(counts["passed"] == 0)
PYTHON
exit "$status"
