#!/usr/bin/env bash
# The tests that need a GPU, then runs of README.md and results/README.md that were measured on one, then bench.py. Stops at the first failure.
# Writes into runs/; the folders runs/gpu-* must not exist yet.
#
#     results/gpu.sh IMAGES        # a folder of images, such as data/cifar10-images
set -eu
[ $# -eq 1 ] || { echo "usage: results/gpu.sh IMAGES" >&2; exit 2; }
images=$(realpath "$1")
cd "$(dirname "$0")/.."
python3 -m pytest -q tests/test_cuda.py tests/test_optimizers.py
python3 train.py --model mlp --device cuda --runs 3 --out runs/gpu-mlp-mnist
python3 train.py @recipes/mlp-5-minutes.args --device cuda --runs 3 --out runs/gpu-mlp-mnist-strong
python3 train.py @recipes/gpu-cnn-3-seconds.args --data "$images" --device cuda --runs 3 --out runs/gpu-cnn-cifar10-jpeg
python3 train.py --model vit --opt adamw --sched cosine --data "$images" --device cuda --out runs/gpu-vit-cifar10-jpeg
python3 train.py @recipes/gpu-cnn-49-seconds.args --data "$images" --device cuda
python3 train.py @recipes/gpu-vit-146-seconds.args --data "$images" --device cuda --out runs/gpu-vit-alone
python3 train.py @recipes/gpu-vit-153-seconds.args --data "$images" --device cuda --out runs/gpu-vit-taught
python3 bench.py --device cuda --out runs/bench-cuda.json
