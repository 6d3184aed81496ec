"""Side of training benchmarks: a bare PyTorch loop over the packs, without Ray, FSDP2, logs. A turn is one step."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_steps.sizes import table_of
from harness import MODEL, THREADS, replies, side_options, timed

from spin_ray.inputs.embedded import resolve


def main() -> None:
    options = side_options(__doc__).parse_args()

    import torch

    from spin_ray.learner.hf_folder import load_model
    from spin_ray.learner.losses import margins, pair_logps, spin_loss
    from spin_ray.learner.scoring import ResponseScorer
    from spin_ray.learner.step import PackShape, pair_lengths, plan

    torch.set_num_threads(THREADS)
    table = table_of(json.loads(options.pairs.read_text()))
    shape = PackShape(pack_length=options.pack_length, global_batch_pairs=options.batch, pad_id=2)
    parts = [table.slice(start, options.batch) for start in range(0, table.num_rows, options.batch)]
    batches = [
        [shape.build(pack, part) for pack in plan(pair_lengths([part]), shape, epochs=1, seed=0)[0][0].packs]
        for part in parts
    ]
    scorer = ResponseScorer(load_model(resolve(MODEL), trust_remote_code=False))
    masters = [weight.detach().clone() for weight in scorer.parameters()]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    scorer.to(dtype)
    weights = list(scorer.parameters())
    optimizer = torch.optim.RMSprop(masters, lr=1e-6, foreach=True)
    with torch.no_grad():
        references = [[pair_logps(scorer(batch), batch) for batch in step] for step in batches]
    answer, turns = replies(options.reply)
    answer(matmul_flops=matmul_rate(scorer.model, options.pack_length, dtype))
    for number in turns:
        with timed() as spent:
            total = 0.0
            for master in masters:
                master.grad = torch.zeros_like(master)
            for batch, reference in zip(batches[number], references[number], strict=True):
                margin = margins(*pair_logps(scorer(batch), batch), *reference, 0.1)
                loss = spin_loss(margin) / options.batch
                loss.backward()
                total += loss.item()
                for master, weight in zip(masters, weights, strict=True):
                    master.grad += weight.grad
                    weight.grad = None
            torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
            optimizer.step()
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        useful = sum(batch.num_useful_tokens for batch in batches[number])
        answer(**spent, loss=total, tokens=useful, flops=flops(scorer.model, batches[number]))


def linear_shapes(model) -> list[tuple[int, int]]:
    """Returns (in, out) of every matrix in the decoder layers."""
    from torch import nn

    return [
        (module.in_features, module.out_features)
        for module in model.get_decoder().modules()
        if isinstance(module, nn.Linear)
    ]


def flops(model, batches) -> float:
    """Returns 6 FLOPs for each useful token and weight outside the embedding; the head counts predicted tokens only."""
    head = model.get_output_embeddings().weight.numel()
    weights = sum(wide * tall for wide, tall in linear_shapes(model))
    tokens = sum(batch.num_useful_tokens for batch in batches)
    targets = sum(len(batch.target_ids) for batch in batches)
    return 6.0 * (weights * tokens + head * targets)


def matmul_rate(model, tokens: int, dtype) -> float:
    """Returns FLOP/s of the layers' matrix products alone, forward and backward; median of 5."""
    import statistics

    import torch

    products = []
    for wide, tall in linear_shapes(model):
        shapes = [(tokens, wide), (tall, wide), (tokens, tall)]
        inputs = [torch.randn(shape).to(dtype) for shape in shapes]
        products.append((*inputs, *(torch.empty(shapes[place], dtype=dtype) for place in (2, 0, 1))))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        for x, w, g, out, grad_x, grad_w in products:
            torch.mm(x, w.T, out=out)
            torch.mm(g, w, out=grad_x)
            torch.mm(g.T, x, out=grad_w)
        seconds.append(time.perf_counter() - started)
    return sum(6.0 * tokens * x.shape[1] * w.shape[0] for x, w, *_ in products) / statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
