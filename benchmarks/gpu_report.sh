#!/usr/bin/env bash
# One command that turns a machine into numbers:
#
#     bash benchmarks/gpu_report.sh OUT --triage               a GPU in 90 seconds: triage.json and triage.log
#     bash benchmarks/gpu_report.sh OUT --minutes 4|6|9        the report: results.json, report.md and log.txt
#     bash benchmarks/gpu_report.sh OUT --device cpu [--quick] [--minutes 20]
#
# In a copy without git, pass the commit: --commit "$(git rev-parse --short=12 HEAD)".
#
# Needs python3 with torch, triton, numpy, pillow, matplotlib and pytest, and nvcc for the extension; installs nothing and
# needs no network. Packages that are missing are taken from wheels in the folder .whl, which `make wheels` fills on a
# machine that has a network. A run that is stopped leaves its results so far in OUT. Pictures of a GPU's report are
# drawn elsewhere, by render.py --draw OUT or --keep OUT.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/report.py" "$@"
