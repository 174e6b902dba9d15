#!/usr/bin/env bash
# Everything that is to be measured on a GPU, the most important first.
#
#     results/gpu.sh DATA OUT [SECTION ...]      # DATA holds MNIST/raw and cifar10-images; OUT gets small JSON files
#
# Sections: tests card bench short long. A row that fails doesn't stop the next.
cd "$(dirname "$0")/.." || exit
data=$1 out=$2
shift 2
mkdir -p "$out/runs"

row() { # name, flags of train.py
    name=$1
    shift
    rm -rf "runs/$name"
    python train.py "$@" --data-dir "$data" --device cuda --out "runs/$name" | tail -2
    cp "runs/$name/result.json" "$out/runs/$name.json"
}

for section in "${@:-tests card bench short long}"; do
    for part in $section; do
        case $part in
        tests)
            pytest -q test_smoke.py
            python diagnose.py --model vit --data "$data/cifar10-images" --data-dir "$data"
            torchrun --nproc_per_node 1 train.py --model mlp --data mnist --data-dir "$data" --epochs 2 --out runs/nccl
            ;;
        card) row gpu-vit-cifar10-jpeg --model vit --opt adamw --sched cosine --data "$data/cifar10-images" ;;
        bench)
            python bench.py --data-dir "$data" --data "$data/cifar10-images" --models "cnn --arch plain" vit \
                --out "$out/bench-cuda-cifar10.json"
            python bench.py --data-dir "$data" --models mlp --out "$out/bench-cuda-mnist.json"
            python bench.py --data-dir "$data" --until 0.975 --out "$out/until-cuda.json"
            ;;
        short)
            row gpu-mlp-mnist --model mlp --data mnist --runs 3
            row gpu-mlp-mnist-strong --model mlp --data mnist --hidden 1024,1024,1024 --epochs 100 --augment strong \
                --dropout 0 --lr 3e-3 --ema 0.999 --tta
            row gpu-cnn-cifar10-jpeg --model cnn --data "$data/cifar10-images" --epochs 7.5 --val-split 2000 --tta --runs 3
            row gpu-cnn-cifar10-jpeg-compiled --model cnn --data "$data/cifar10-images" --epochs 7.5 --val-split 2000 \
                --tta --compile
            row gpu-cnn-cifar10-jpeg-1-minute --model cnn --data "$data/cifar10-images" --minutes 1 --tta \
                --widths 128,384,512 --augment strong
            ;;
        long)
            row gpu-vit-cifar10-jpeg-5-minutes --model vit --data "$data/cifar10-images" --minutes 5 --tta --stem conv \
                --opt muon --batch-size 512 --augment strong --cutmix 1 --ema 0.999
            ;;
        esac
    done
done
