#!/usr/bin/env bash
# Makes the project's virtual environment and prints the path of its Python:
#
#   PY=$(scripts/bootstrap.sh run)      # what training needs
#   PY=$(scripts/bootstrap.sh test)     # and what the checks need: as root, by apt-get, Chromium and
#                                       # Slurm too
#
# Takes no time when nothing is to do; run again after an interruption, it starts afresh. Messages
# go to stderr. Exit code 2, with the cure, when there is no Python, no space or no network.
#
#   PYTHON           the interpreter to make it with (default: search PATH, pyenv's and uv's)
#   FLAGSCALE_VENV   where it lies (default: .venv in the project)
#   PIP_*            pip's own settings hold
set -euo pipefail

# A fresh environment takes 5.8 GiB, and its wheels 2.9 more until pip is done.
readonly SPACE_KIB=$((9 * 1024 * 1024))

say() { printf 'bootstrap: %s\n' "$*" >&2; }

die() { # WHAT CURE...
  say "$1"
  shift
  printf '  cure:     %s\n' "$1" >&2
  shift
  if (($#)); then printf '            %s\n' "$@" >&2; fi
  exit 2
}

# --- the interpreter ----------------------------------------------------------------------------

# Prints "major minor" if $1 is a CPython that can make environments. A pyenv shim exists and fails.
probe() {
  "$1" -I -c 'import sys, ensurepip, venv
sys.implementation.name == "cpython" or sys.exit(1)
print(*sys.version_info[:2])' 2>/dev/null </dev/null
}

candidates() {
  local name
  for name in python3.12 python3.13 python3 python; do type -aP "$name" || true; done
  printf '%s\n' "${PYENV_ROOT:-${HOME-}/.pyenv}"/versions/*/bin/python
  printf '%s\n' "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME-}/.local/share}/uv/python}"/*/bin/python3
}

# megatron-core's wheels are built for one Python each (0.19.2: 3.12 and 3.13), so 3.12 is taken
# wherever it lies, then 3.13; a newer one would need a compiler and is the last resort.
find_python() {
  local path found minor rank best='' best_rank=99 seen=''
  if [[ -n ${PYTHON-} ]]; then
    found=$(probe "$PYTHON") || found=
    [[ $found == "3 "* && ${found#3 } -ge 12 ]] || die \
      "PYTHON=$PYTHON is not a usable Python >= 3.12 (it says: ${found:-nothing})" \
      "name one that is, or unset PYTHON to have one searched"
    printf '%s\n' "$PYTHON"
    return
  fi
  while IFS= read -r path; do
    [[ -x $path ]] && found=$(probe "$path") || continue
    minor=${found#3 }
    seen+=" $path (${found/ /.})"
    [[ $found == "3 "* && $minor -ge 12 ]] || continue
    rank=$minor
    if ((rank < best_rank)); then best=$path best_rank=$rank; fi
    if ((rank == 12)); then break; fi
  done < <(candidates)
  [[ -n $best ]] || die "no usable Python >= 3.12; found:${seen:- none}" \
    "install one without root: uv python install 3.12, or pyenv install 3.12" \
    "or with it:               apt install python3.12 python3.12-venv" \
    "or name one that has the venv module: PYTHON=/path/to/python3.12"
  printf '%s\n' "$best"
}

# --- the environment ----------------------------------------------------------------------------

# What the environment was made from. The place counts too: an editable install points to it.
fingerprint() {
  local version
  version=$("$python" -I -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null) || return
  printf '%s %s %s\n' "$version" "$(cat pyproject.toml setup.py constraints.txt | cksum)" "$PWD"
}

# The stamp is written last: "MODE FINGERPRINT". What suffices for the tests suffices to run.
is_ready() {
  local wanted stamp
  [[ -f $venv/flagscale.stamp ]] && wanted=$(fingerprint) || return
  stamp=$(<"$venv/flagscale.stamp")
  [[ $stamp == "$mode $wanted" || $stamp == "test $wanted" ]]
}

need_space() {
  local place=$venv free
  until [[ -d $place ]]; do place=$(dirname "$place"); done
  free=$(df -Pk "$place" | awk 'NR == 2 { print $4 }')
  ((free >= SPACE_KIB)) || die \
    "too little space in $place: $((free / 1024)) MiB free, $((SPACE_KIB / 1024)) MiB needed" \
    "make room there, or put the environment elsewhere: FLAGSCALE_VENV=/big/disk/venv"
}

# Makes a new environment unless there is a whole one. Only what this script made is ever removed:
# flagscale.made is put there first, and without a stamp its install was cut short.
make_venv() {
  local base
  if [[ -f $venv/flagscale.made ]]; then
    if [[ -f $venv/flagscale.stamp ]] && "$python" -I -m pip --version >/dev/null 2>&1; then return; fi
    say "$venv is incomplete: starting afresh"
  elif [[ -d $venv && -n $(ls -A "$venv") ]]; then
    [[ -f $venv/pyvenv.cfg ]] && "$python" -I -m pip --version >/dev/null 2>&1 &&
      "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 12))' && return
    die "$venv exists, was not made by this script, and has no working Python >= 3.12 with pip" \
      "remove it, or choose another place: FLAGSCALE_VENV=/path/to/venv"
  fi
  base=$(find_python)
  need_space
  rm -rf "$venv"
  mkdir -p "$venv"
  touch "$venv/flagscale.made"
  say "making $venv with $base"
  "$base" -I -m venv "$venv" >&2 || die "$base could not make an environment in $venv" \
    "see the message above; PYTHON=/path/to/another/python names another interpreter"
}

install() {
  local target=. log=$venv/flagscale.pip.log stamp=$venv/flagscale.stamp
  if [[ $mode == test ]]; then target='.[test]'; fi
  say "installing $target with its dependencies (the first time: about 3 GB, some minutes)"
  if [[ -f $stamp ]]; then mv "$stamp" "$stamp.before"; fi
  # /tmp may be small, and what an interruption leaves there stays: pip unpacks in here instead.
  mkdir -p "$venv/tmp"
  # Only the big downloads are worth a line; the whole of it is in the log.
  if TMPDIR=$venv/tmp "$python" -I -m pip install --progress-bar off -c constraints.txt \
    -e "$target" 2>&1 | tee "$log" |
    sed -unE 's/^ *(Downloading .*[0-9]{3}\.[0-9] MB.*)/bootstrap:   \1/p' >&2; then
    rm -rf "$venv/tmp" "$stamp.before"
    printf '%s %s\n' "$mode" "$(fingerprint)" >"$stamp"
    return
  fi
  grep -E '^ *(ERROR|error):?' "$log" | tail -n 5 >&2 || tail -n 5 "$log" >&2
  if grep -qE 'No space left|Errno 28|Disk quota' "$log"; then
    die "pip ran out of space (log: $log)" \
      "make room in $venv and in pip's cache, or move them: FLAGSCALE_VENV, PIP_CACHE_DIR"
  fi
  # Unlike a kill or a full disk, a failure that pip reports leaves what was there before whole.
  if [[ -f $stamp.before ]]; then mv "$stamp.before" "$stamp"; fi
  if grep -qE 'connection broken|ConnectTimeout|ReadTimeout|Max retries|Network is unreachable|name resolution|Could not fetch URL|CERTIFICATE_VERIFY_FAILED' "$log"; then
    die "pip could not reach its package index (log: $log)" \
      "behind a proxy:  HTTPS_PROXY=http://host:port" \
      "with a mirror:   PIP_INDEX_URL=https://mirror/simple" \
      "without network: PIP_NO_INDEX=1 PIP_FIND_LINKS=/folder/of/wheels (pip download fills one)"
  fi
  die "pip failed (log: $log)" "see the message above, then run this again"
}

# Reports are tested in a real browser, and launching on a real Slurm. Where one of them cannot be
# installed, the tests that need it say so.
install_programs() {
  local log=$venv/flagscale.apt.log wanted=() names fails=''
  if [[ -z $(type -P chromium chromium-browser google-chrome) ]]; then wanted+=(chromium); fi
  # Where daemons lie may be on root's PATH only.
  if [[ -z $(PATH+=:${PATH//\/bin//sbin} && type -P slurmctld) ]]; then
    wanted+=("slurmctld slurmd slurm-client munge")
  fi
  if ((${#wanted[@]} == 0)); then return; fi
  if [[ $(id -u 2>/dev/null) != 0 ]] || ! type -P apt-get >/dev/null; then
    say "some tests need programs that are missing; an administrator: apt-get install ${wanted[*]}"
    return
  fi
  say "installing ${wanted[*]}"
  # Lists that cannot be brought up to date may still do.
  apt-get update -q -o Acquire::http::Timeout=20 >"$log" 2>&1 </dev/null || true
  for names in "${wanted[@]}"; do
    # shellcheck disable=SC2086  # several packages
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
      -o DPkg::Lock::Timeout=300 $names >>"$log" 2>&1 </dev/null || fails+=" $names"
  done
  if [[ -n $fails ]]; then
    say "apt-get could not install$fails, so some tests cannot run (log: $log)"
  fi
}

main() {
  case $* in
    run | test) mode=$1 ;;
    *) die "expected one argument, run or test; got: ${*:-nothing}" "scripts/bootstrap.sh run" ;;
  esac
  venv=${FLAGSCALE_VENV-}
  if [[ -n $venv && $venv != /* ]]; then venv=$PWD/$venv; fi
  cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
  venv=${venv:-$PWD/.venv}
  python=$venv/bin/python
  if ! is_ready; then
    mkdir -p "$(dirname "$venv")"
    if type -P flock >/dev/null; then # two starts at once: the second waits and finds it done
      exec 9>"$venv.lock"
      flock -n 9 || { say "another bootstrap is at work: waiting"; flock 9; }
    fi
    if ! is_ready; then
      make_venv
      install
      say "ready"
    fi
  fi
  if [[ $mode == test ]]; then install_programs; fi
  printf '%s\n' "$python"
}

main "$@"
