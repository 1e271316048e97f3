#!/usr/bin/env bash
# A quarter of an hour on a GPU without a network. README.md beside this says how.
#
#   here:         bash tests/gpu/calls.sh prepare DATA WHAT    what is to travel, in .gpu/1, .gpu/2, ...
#   there:        bash tests/gpu/calls.sh bring                what came along is put where it lasts
#                 bash tests/gpu/calls.sh check                is it right, how fast is it
#                 bash tests/gpu/calls.sh more WHAT SECONDS    a table or figure of the paper
#   here again:   bash tests/gpu/calls.sh home FOLDER          what came back, into nbs/results and the store
#                 bash tests/gpu/calls.sh restore              the whole checkout is back
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
PYTHON=${PYTHON:-python3}

prepare() { # DATA: a folder of CIFAR in shards; WHAT: a table or figure
  local tree
  [ -z "$(git status --porcelain)" ] || { echo "commit first, or the commit in the results is not what was run"; git status --short | head -n 5; exit 1; }
  grep -qx /.gpu/ .git/info/exclude 2>/dev/null || { mkdir -p .git/info; echo /.gpu/ >> .git/info/exclude; }
  # nothing else is needed there, and the pages alone are 30 MB
  git sparse-checkout set --no-cone /settings.ini /kdc_nb/ '!/kdc_nb/_modidx.py' /tests/__init__.py /tests/shards.py /tests/gpu/ \
    /tests/benchmarks/training.py || exit
  tree=$(git ls-files -z | xargs -0 du -cb 2>/dev/null | tail -n 1 | cut -f1)
  $PYTHON -m tests.gpu.pack "$@" --limit $((65536 - 256 - tree/1024)) || exit
  git rev-parse HEAD > .gpu/1/COMMIT
}

restore() { git sparse-checkout disable && git status --short | head -n 5; }

home() { # FOLDER, of each call in turn
  local f store
  [ -f tests/test_ids.py ] || restore
  for f in check.txt benchmark_training.json; do [ -f "$1/$f" ] && cp "$1/$f" "nbs/results/gpu_$f"; done
  for f in "$1"/*.npz; do [ -f "$f" ] && $PYTHON -m tests.gpu.merge "nbs/results/$(basename "$f")" "$f"; done
  store=$($PYTHON -c "from kdc_nb.experiments.store import Store; print(Store().folder)") && mkdir -p "$store"
  for f in "$1"/store_*.tar; do [ -f "$f" ] && tar -xf "$f" -C "$store"; done
  git status --short nbs/results
}

bring() {
  W=${KDC_WORK:-$HOME/kdc_gpu} OUT=${OUT:-$PWD/.gpu/out}
  mkdir -p "$W/shards" "$W/site" "$W/runs" "$OUT"
  for f in .gpu/*/joblib.zip; do [ -f "$f" ] && $PYTHON -m zipfile -e "$f" "$W/site" && rm "$f"; done
  mv .gpu/*/COMMIT "$W/" 2>/dev/null
  mv .gpu/*/*.npz "$W/shards/" 2>/dev/null
  mv .gpu/*/*.run .gpu/*/*.net "$W/runs/" 2>/dev/null
  export KDC_CACHE=$W/cache PYTHONPATH=$PWD:$W/site PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TQDM_MININTERVAL=5
  KDC_COMMIT=$(cat "$W/COMMIT"); export KDC_COMMIT
  DEVICE=${DEVICE:+--device $DEVICE}
}

check() { # 160 s at most
  local limit=${LIMIT:-160}
  bring
  { nvidia-smi; $PYTHON -V; nproc; df -h /dev/shm; $PYTHON -m pip list; } > "$OUT/facts.txt" 2>&1 &
  timeout $((limit*6/10)) $PYTHON -m kdc_nb --check $DEVICE 2>&1 | tee "$OUT/check.txt"
  timeout $((limit - SECONDS)) $PYTHON tests/benchmarks/training.py --rounds 1 --seconds .8 --budget $((limit - 10 - SECONDS)) ${BENCHMARK:-} $DEVICE \
    --results "$OUT/benchmark_training.json" 2>&1 | tee "$OUT/benchmark.txt"
}

more() { # WHAT SECONDS: as many rows as can be finished, the most telling first; goes on where a call before was
  local data=cifar100 run
  bring
  touch "$W/began"
  [ "$1" = table2b ] || [ "$1" = table2a ] && data=cifar10
  [ -n "${SMALL:-}" ] || $PYTHON -m tests.shards $data "$W/shards" || exit
  timeout -s INT -k 5 $(($2 - SECONDS + 10)) $PYTHON -m kdc_nb "$1" --recipe "${RECIPE:-fast}" --seeds 1 ${SMALL:+--small $SMALL} ${JOBS:---slots ${SLOTS:-8}} \
    $DEVICE --budget $(($2 - SECONDS - 15))s --store "$W/runs" --results "$OUT/$1.npz" > "$OUT/$1.txt" 2>&1
  tr '\r' '\n' < "$OUT/$1.txt" | tail -n 60
  # weights and logits of the first new runs, which teach others; as many files as may come back
  for run in $(find "$W/runs" -name '*.run' -newer "$W/began" -printf '%T@ %f\n' | sort -n | head -n 4 | cut -d' ' -f2); do
    run=$(basename "$run" .run)
    tar -cf "$OUT/store_$run.tar" -C "$W/runs" "$run.run" "$run.net"
  done
  ls -l "$OUT"
}

case "${1:-}" in prepare|restore|home|bring|check|more) "$@" ;; *) sed -n 2,10p "$0"; exit 2 ;; esac
