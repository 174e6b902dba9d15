#!/usr/bin/env bash
# Everything that is to be measured on a GPU, the most important first.
#
#     results/gpu.sh DATA OUT [SECTION ...]      # DATA holds MNIST/raw and cifar10-images; OUT gets small files
#
# Sections: tests card bench short long. A row that fails doesn't stop the next.
[ $# -ge 2 ] || { echo "usage: results/gpu.sh DATA OUT [SECTION ...]" >&2; exit 2; }
data=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.." || exit
mkdir -p "$out/runs"

row() { # name, flags of train.py
    name=$1
    shift
    rm -rf "runs/$name"
    python3 train.py "$@" --data-dir "$data" --device cuda --out "runs/$name" | tail -2
    cp "runs/$name/result.json" "$out/runs/$name.json"
    for table in "runs/$name"{,/seed-0}/metrics.csv; do # the first epochs compile and warm up: see the later ones
        [ ! -f "$table" ] || cp "$table" "$out/runs/$name.csv"
    done
}

for section in "${@:-tests card bench short long}"; do
    for part in $section; do
        case $part in
        tests)
            python3 -m pytest -q
            python3 diagnose.py --model vit --data "$data/cifar10-images" --data-dir "$data"
            gpus=$(python3 -c "import torch; print(torch.cuda.device_count())") # NCCL is used from two on
            rm -rf runs/nccl
            python3 -m torch.distributed.run --nproc_per_node "$gpus" train.py --model mlp --data mnist \
                --data-dir "$data" --epochs 2 --out runs/nccl
            ;;
        card)
            row gpu-vit-cifar10-jpeg --model vit --opt adamw --sched cosine --data "$data/cifar10-images"
            row gpu-vit-cifar10-jpeg-graph --model vit --opt adamw --sched cosine --data "$data/cifar10-images" --cuda-graph
            ;;
        bench)
            python3 bench.py --data-dir "$data" --data "$data/cifar10-images" --models "cnn --arch plain" vit \
                --out "$out/bench-cuda-cifar10.json"
            python3 bench.py --data-dir "$data" --models mlp --out "$out/bench-cuda-mnist.json"
            python3 bench.py --data-dir "$data" --until 0.975 --out "$out/until-cuda.json"
            ;;
        short)
            row gpu-mlp-mnist --model mlp --data mnist --runs 3
            row gpu-mlp-mnist-graph --model mlp --data mnist --runs 3 --cuda-graph
            row gpu-mlp-mnist-strong --model mlp --data mnist --hidden 1024,1024,1024 --epochs 100 --augment strong \
                --dropout 0 --lr 3e-3 --ema 0.999 --tta
            row gpu-cnn-cifar10-jpeg --model cnn --data "$data/cifar10-images" --epochs 7.5 --val-split 2000 --tta --runs 3
            row gpu-cnn-cifar10-jpeg-graph --model cnn --data "$data/cifar10-images" --epochs 7.5 --val-split 2000 --tta \
                --runs 3 --cuda-graph
            row gpu-cnn-cifar10-jpeg-compiled --model cnn --data "$data/cifar10-images" --epochs 7.5 --val-split 2000 \
                --tta --compile
            row gpu-cnn-cifar10-jpeg-1-minute --model cnn --data "$data/cifar10-images" --minutes 1 --patience 0 --tta \
                --widths 128,384,512 --augment strong
            ;;
        long)
            row gpu-vit-cifar10-jpeg-5-minutes --model vit --data "$data/cifar10-images" --minutes 5 --patience 0 --tta \
                --stem conv --opt muon --batch-size 512 --augment strong --cutmix 1 --ema 0.999
            ;;
        esac
    done
done
