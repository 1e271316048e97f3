#!/usr/bin/env bash
# A quarter of an hour on a GPU without a network, in three calls. README.md beside this says how.
#
#   here:         bash tests/gpu/calls.sh prepare DATA    what is to travel, in .gpu; DATA: folder of CIFAR in shards
#   there:        bash tests/gpu/calls.sh one             is it right, how fast is it
#                 bash tests/gpu/calls.sh two             Table 2b: CIFAR-10, seed 0
#                 bash tests/gpu/calls.sh three           Table 1: CIFAR-100, seed 0
#                 bash tests/gpu/calls.sh more WHAT S     a table or figure, for S seconds
#   here again:   bash tests/gpu/calls.sh home FOLDER     results in FOLDER into nbs/results
#                 bash tests/gpu/calls.sh restore         the whole checkout is back
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
PYTHON=${PYTHON:-python3}

prepare() {
  local k data=${1:?folder of CIFAR in shards}
  [ -f "$data/cifar10-test.npz" ] || { echo "no cifar10-test.npz in $data"; exit 1; }
  [ -z "$(git status --porcelain)" ] || { echo "commit first, or the commit in the results is not what was run"; git status --short | head -n 5; exit 1; }
  grep -qx /.gpu/ .git/info/exclude 2>/dev/null || { mkdir -p .git/info; echo /.gpu/ >> .git/info/exclude; }
  rm -rf .gpu; mkdir -p .gpu/a .gpu/b .gpu/c
  cp "$data"/cifar10-train-{0,1,2,3}.npz .gpu/a
  cp "$data"/cifar10-{train-4,test}.npz "$data"/cifar100-train-{0,1}.npz .gpu/b
  cp "$data"/cifar100-{train-2,train-3,train-4,test}.npz .gpu/c
  $PYTHON - .gpu/a/joblib.zip <<< "import sys, zipfile, pathlib, joblib
home = pathlib.Path(joblib.__file__).parent
with zipfile.ZipFile(sys.argv[1], 'w', zipfile.ZIP_DEFLATED) as z:
    for f in home.rglob('*.py'): z.write(f, f.relative_to(home.parent))" || exit
  for k in a b c; do git rev-parse HEAD > .gpu/$k/COMMIT; done
  # nothing else is needed there, and the pages alone are 30 MB
  git sparse-checkout set --no-cone /settings.ini /kdc_nb/ '!/kdc_nb/_modidx.py' /tests/__init__.py /tests/shards.py /tests/gpu/ \
    /tests/benchmarks/training.py || exit
  for k in a b c; do echo "with .gpu/$k: $(( ($(git ls-files -z | xargs -0 du -cb 2>/dev/null | tail -n 1 | cut -f1) + $(du -sb .gpu/$k | cut -f1)) / 1024 )) KiB"; done
}

restore() { git sparse-checkout disable && git status --short | head -n 5; }

home() { # FOLDER, of each call in turn
  local f
  restore
  for f in check.txt facts.txt benchmark.txt benchmark_training.json; do [ -f "$1/$f" ] && cp "$1/$f" "nbs/results/gpu_$f"; done
  for f in "$1"/*.npz; do [ -f "$f" ] && $PYTHON -m tests.gpu.merge "nbs/results/gpu_$(basename "$f")" "$f"; done
  ls -l nbs/results/gpu_*
}

start() { # what came along, to a place that lasts as long as the machine
  W=${KDC_WORK:-$HOME/kdc_gpu} OUT=${OUT:-$PWD/.gpu/out}
  mkdir -p "$W/shards" "$W/site" "$OUT"
  [ -f .gpu/a/joblib.zip ] && $PYTHON -m zipfile -e .gpu/a/joblib.zip "$W/site"
  export KDC_CACHE=$W/cache PYTHONPATH=$PWD:$W/site PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TQDM_MININTERVAL=5
  cat .gpu/[abc]/COMMIT 2>/dev/null | head -n 1 > "$W/COMMIT.new"; [ -s "$W/COMMIT.new" ] && mv "$W/COMMIT.new" "$W/COMMIT"
  KDC_COMMIT=$(cat "$W/COMMIT"); export KDC_COMMIT
  mv .gpu/[abc]/*.npz "$W/shards/" 2>/dev/null
  DEVICE=${DEVICE:+--device $DEVICE}
}

one() { # 165 s at most
  local limit=${LIMIT:-160}
  start
  { nvidia-smi; $PYTHON -V; nproc; df -h /dev/shm; $PYTHON -m pip list; } > "$OUT/facts.txt" 2>&1 &
  timeout $((limit*6/10)) $PYTHON -m kdc_nb --check $DEVICE 2>&1 | tee "$OUT/check.txt"
  timeout $((limit - SECONDS)) $PYTHON tests/benchmarks/training.py --rounds 1 --seconds .8 --budget $((limit - 10 - SECONDS)) ${BENCHMARK:-} $DEVICE \
    --results "$OUT/benchmark_training.json" 2>&1 | tee "$OUT/benchmark.txt"
  cp "$OUT/benchmark_training.json" "$W/" # says how many runs side by side are fastest
}

more() { # WHAT SECONDS: as many rows as can be finished, the most telling first; goes on where a call before was
  [ -n "${W:-}" ] || start
  local data=cifar100; [ "$1" = table2b ] || [ "$1" = table2a ] && data=cifar10
  [ -n "${SMALL:-}" ] || $PYTHON -m tests.shards $data "$W/shards" || exit
  local slots; slots=${SLOTS:-$($PYTHON -c "import json; print(json.load(open('$W/benchmark_training.json'))['slots'] or 2)" 2>/dev/null || echo 2)}
  timeout -s INT -k 5 $(($2 - SECONDS + 10)) $PYTHON -m kdc_nb "$1" --recipe "${RECIPE:-fast}" --seeds 1 ${SMALL:+--small $SMALL} ${JOBS:---slots $slots} $DEVICE \
    --budget $(($2 - SECONDS - 15))s --store "$W/runs/$1" --results "$OUT/$1.npz" > "$OUT/$1.txt" 2>&1
  tr '\r' '\n' < "$OUT/$1.txt" | tail -n 60
  local run # weights and logits of the first runs, as many files as may come back
  for run in $(ls -tr "$W/runs/$1"/*.run | head -n 4); do
    run=$(basename "$run" .run)
    tar -cf "$OUT/store_$run.tar" -C "$W/runs/$1" "$run.run" "$run.net"
  done
  ls -l "$OUT"
}

two() { start; more table2b 270; }
three() { start; more table1 240; }

case "${1:-}" in prepare|restore|home|one|two|three|more) "$@" ;; *) sed -n 2,11p "$0"; exit 2 ;; esac
