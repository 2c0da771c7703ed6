#!/usr/bin/env bash
# The tests that torch and transformers can break, with the oldest and the newest versions of both that the code runs on:
#
#     bash tests/versions.sh FOLDER
#
# makes an environment for each in FOLDER (11 GB; outside of the repository; found again by the next run). The newest has
# torchvision, so that test_tokenizer.py compares with transformers' own processor. requirements.txt pins all the rest.
set -euo pipefail
folder=$(realpath -m "${1:?name a folder for the environments}")
cd "$(dirname "$0")/.."
pinned=$(grep -E '^(pillow|requests|numpy|pytest)==' requirements.txt)
tests=$(printf 'tests/test_%s.py ' model rollout grpo exact update ranks rows tools reward cost)
export OMP_NUM_THREADS=1

status=0
for versions in "torch==2.11.0 transformers==5.17.0" "torch==2.14.1 torchvision==0.29.1 transformers==5.24.0"; do
    echo "== $versions"
    environment="$folder/${versions// /-}"
    python3 -m venv "$environment"
    # shellcheck disable=SC2086  # lists, to be split
    "$environment/bin/python" -m pip install --quiet $versions $pinned
    "$environment/bin/python" -m pytest -q -p no:cacheprovider $tests || status=1
    "$environment/bin/python" -m pytest -q -p no:cacheprovider -m thorough tests/test_tokenizer.py || status=1
done
exit $status
