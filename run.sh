#!/usr/bin/env bash
# bash run.sh [toy|lcb|sciknoweval|math|eval|figures|test] [flags passed on]; no word = toy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

word=toy
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then word=$1; shift; fi
case $word in
  toy|lcb|sciknoweval|math|eval|figures|test) ;;
  *) echo "run.sh: error: unknown word '$word': toy, lcb, sciknoweval, math, eval, figures or test" >&2; exit 2 ;;
esac

# A virtual environment of our own unless one is active; pins are installed once per version of requirements.txt.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "run.sh: error: Python 3.11 or newer is needed" >&2; exit 2; }
    python3 -m venv .venv
  fi
  . .venv/bin/activate
fi
stamp=$VIRTUAL_ENV/.vpd-requirements
if ! cmp -s requirements.txt "$stamp"; then
  echo "installing the pins of requirements.txt into $VIRTUAL_ENV"
  python -m pip install -q --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    python -m pip install -q --disable-pip-version-check -r requirements.txt
  else
    grep -v '^vllm' requirements.txt | python -m pip install -q --disable-pip-version-check -r /dev/stdin
  fi
  cp requirements.txt "$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

case $word in
  test) exec python -m pytest -q tests "$@" ;;
  eval) exec python evaluate.py "$@" ;;
  figures) exec python figures.py "$@" ;;
esac

# Train, evaluate the first and the last weights on test problems, draw the curves.
out=
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    -h|--help) exec python vpd.py --help ;;
    --out=*) out=${!i#--out=} ;;
    --out) j=$((i + 1)); out=${!j:-} ;;
  esac
done
if [ -z "$out" ]; then out=runs/$word-$(date +%Y%m%d-%H%M%S); set -- --out "$out" "$@"; fi
python vpd.py --task "$word" "$@"
python evaluate.py --run "$out"
python figures.py "$out" --out "$out/curves.png"
