#!/usr/bin/env bash
# Set-up, lint and all tests on two CPU cores. GENPOCCL_DATA=folder adds the tests on real pictures.
set -euo pipefail
. "$(dirname "$0")/setup.sh" requirements.txt tests/requirements.txt
"$python" -m ruff check .
"$python" -m ruff format --check .
# Two processes, one thread each: a whole test file stays in one of them.
# What a passed test wrote goes with it: 1 GB at most on the disk, not 10.
OMP_NUM_THREADS=1 "$python" -m pytest -q -n 2 --dist loadfile --durations=8 \
  -o tmp_path_retention_policy=failed tests "$@"
