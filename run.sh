#!/usr/bin/env bash
# bash run.sh [toy|lcb|sciknoweval|math|eval|figures|bench|test|test-slow] [flags passed on]; no word = toy
# lcb, sciknoweval and math take --smoke: the same path on a CPU, tiny random models, the project's own fixtures
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

word=toy
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then word=$1; shift; fi
case $word in
  toy|lcb|sciknoweval|math|eval|figures|bench|test|test-slow) ;;
  *) echo "run.sh: error: unknown word '$word': toy, lcb, sciknoweval, math, eval, figures, bench, test or test-slow" >&2; exit 2 ;;
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
  test) exec python -m pytest -q -m "not slow" tests "$@" ;;
  test-slow) exec python -m pytest -q -m slow tests "$@" ;;
  eval) exec python evaluate.py "$@" ;;
  figures) exec python figures.py "$@" ;;
  bench) exec python bench.py "$@" ;;
esac

# Train, evaluate the first and the last weights on test problems, draw the curves.
train_and_evaluate() {
  python vpd.py --task "$word" "$@"
  python evaluate.py --run "$out"
  python figures.py "$out" --out "$out/curves.png"
}

out=
smoke=
only=
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    -h|--help) exec python vpd.py --help ;;
    --smoke) j=$((i + 1)); case ${!j:-} in qwen3|olmo3) ;; *) smoke=$i ;; esac ;;
    --out=*) out=${!i#--out=} ;;
    --out) j=$((i + 1)); out=${!j:-} ;;
    --feedback) j=$((i + 1)); only=${!j:-} ;;
  esac
done
if [ -n "$smoke" ]; then  # every feedback source that the task has, the second model family with the first of them
  set -- "${@:1:smoke-1}" "${@:smoke+1}"
  case $word in
    lcb) sources="environment sibling solution_first both" ;;
    *) sources="sibling critique" ;;
  esac
  sources=${only:-$sources}
  base=${out:-runs/$word-smoke}
  for pair in $(printf 'qwen3:%s ' $sources) "olmo3:${sources%% *}"; do
    out=$base-${pair%:*}-${pair#*:}
    echo "---- smoke: $word, ${pair%:*}, feedback ${pair#*:}"
    train_and_evaluate "$@" --smoke "${pair%:*}" --feedback "${pair#*:}" --out "$out" --overwrite
  done
  exit
fi
if [ -z "$out" ]; then out=runs/$word-$(date +%Y%m%d-%H%M%S); set -- --out "$out" "$@"; fi
train_and_evaluate "$@"
