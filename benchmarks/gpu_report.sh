#!/usr/bin/env bash
# One command that turns a machine into a report:
#
#     bash benchmarks/gpu_report.sh OUT [--device cpu] [--quick] [--minutes 9]
#
# From a copy without git, say what is measured: --commit "$(git rev-parse --short=12 HEAD)".
#
# Needs python3 with torch, triton, numpy, pillow and matplotlib, and nvcc for the extension; installs nothing and needs no
# network. Packages that are missing (the peer, diffusers, tyro) are taken from wheels in the folder .whl, which
# `make wheels` fills on a machine that has a network. OUT then holds results.json, report.md, log.txt and pictures; whatever
# stops the run, what was measured before is there.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/report.py" "$@"
