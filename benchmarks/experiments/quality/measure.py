"""Measures an iterate on files of rows: greedy and sampled answers, log p(y), lengths, distinct n-grams.

    python benchmarks/experiments/quality/measure.py --model FOLDER --rows dev=FILE test=FILE --out FILE.json

Uses plain transformers in fp32, not the run's engine and trainer. Samples of all models use the same uniform numbers
(row, sample, token), so that differences come from the models.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from arms import json_lines
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spin_ray.config.sections import DataConfig
from spin_ray.inputs.answers import is_correct
from spin_ray.inputs.conversations import conversations_of
from spin_ray.inputs.rendering import ChatRenderer, Rendered, load_tokenizer
from spin_ray.report.responses import distinct_ngrams
from spin_ray.runtime import cpu

SAMPLES = 4
SEED = 20240102
BATCH = 48
"""Prompts computed together."""
LIKELY = 64
"""Tokens that are looked at before all are sorted; nearly always enough."""


def measure(
    model: Any,
    renderer: ChatRenderer,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    extractor: str,
    longest: int,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Returns measures of rows with ``messages`` and ``answer``; lists have a value for each row.

    Args:
        longest: tokens of an answer; 0: log p(y) alone, a fifth of the work.
        temperature: of the samples.
    """
    data = DataConfig(train="", system="")
    rendered = renderer.render_all([conversations_of(row, data)[0] for row in rows])
    usable = [each for each in rendered if isinstance(each, Rendered)]
    assert len(usable) == len(rows), "a row that cannot be rendered"
    written: list[list[list[int]]] = [[] for _ in rows]
    logps = [0.0] * len(rows)
    uniform = torch.rand(len(rows), SAMPLES, longest, generator=torch.Generator().manual_seed(SEED))
    for chosen in torch.tensor([len(each.prompt_ids) for each in usable]).argsort().split(BATCH):
        answers, real = answer_batch(
            model, [usable[i] for i in chosen.tolist()], uniform[chosen], renderer.end_of_turn_id, temperature
        )
        for row, answer, logp in zip(chosen.tolist(), answers, real, strict=True):
            written[row], logps[row] = answer, logp
    real_measures = {
        "real_logp": [round(logp, 3) for logp in logps],
        "real_tokens": [len(each.real_ids) for each in usable],
        "real_length": sum(len(each.real_ids) for each in usable) / len(usable),
    }
    if not longest:
        return real_measures
    sampled = [response for answer in written for response in answer[1:]]
    graded = [
        [
            is_correct(text, row["answer"], extractor)
            for text in tokenizer.batch_decode(answer, skip_special_tokens=True)
        ]
        for row, answer in zip(rows, written, strict=True)
    ]
    return {
        "greedy": [each[0] for each in graded],
        "sampled": [each[1:] for each in graded],
        **real_measures,
        "generated_length": sum(map(len, sampled)) / len(sampled),
        "cut": sum(ids[-1] != renderer.end_of_turn_id for ids in sampled) / len(sampled),
        "distinct_1": distinct_ngrams(sampled, 1),
        "distinct_2": distinct_ngrams(sampled, 2),
    }


@torch.inference_mode()
def answer_batch(
    model: Any,
    rows: list[Rendered],
    uniform: Tensor,
    stop: int,
    temperature: float | Tensor = 1.0,
    greedy: bool = True,
) -> tuple[list[list[list[int]]], list[float]]:
    """Returns each row's answers (the greedy one, then one for each sample of ``uniform``), and log p(y).

    Args:
        uniform: [rows, samples, longest].
        temperature: one number, or one for each answer of a row.
    """
    count, samples, longest = uniform.shape
    each = samples + greedy
    widest = max(len(row.prompt_ids) for row in rows)
    prompts = torch.tensor([[stop] * (widest - len(row.prompt_ids)) + row.prompt_ids for row in rows])
    mask = torch.tensor([[0] * (widest - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in rows])
    lengths = mask.sum(1)
    cache = DynamicCache()
    first = model(
        input_ids=prompts, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    real = _real_logps(model, rows, first, mask, lengths, cache, stop)
    if not longest:
        return [[] for _ in rows], real
    cache.crop(-max(len(row.real_ids) for row in rows))

    draws = torch.cat([torch.full((count, int(greedy), longest), -1.0), uniform], dim=1).flatten(0, 1)
    heat = torch.as_tensor(temperature).expand(each).repeat(count)
    answers: list[list[int]] = [[] for _ in range(count * each)]
    running = torch.arange(len(answers))
    # Answers of a row that have been the same so far are one sequence: most of them, for most of their length.
    logits, position, sequence = first, lengths, running // each
    for step in range(longest):
        tokens = draw(logits[sequence] / heat[running, None], draws[running, step])
        for place, token in zip(running.tolist(), tokens.tolist(), strict=True):
            answers[place].append(token)
        going = tokens != stop
        if not going.any() or step == longest - 1:
            break
        running, grown = running[going], torch.stack([sequence[going], tokens[going]], dim=1)
        grown, sequence = grown.unique(dim=0, return_inverse=True)
        before, tokens = grown.unbind(1)
        cache.batch_select_indices(before)
        mask = torch.cat([mask[before], mask.new_ones(len(before), 1)], dim=1)
        position = position[before]
        out = model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache
        )
        logits, position = out.logits[:, -1], position + 1
    return [answers[i : i + each] for i in range(0, len(answers), each)], real


def _real_logps(
    model: Any, rows: list[Rendered], first: Tensor, mask: Tensor, lengths: Tensor, cache: DynamicCache, stop: int
) -> list[float]:
    """Returns log p(y|x) of human responses, in nats; leaves the responses in ``cache``."""
    longest = max(len(row.real_ids) for row in rows)
    real = torch.tensor([row.real_ids + [stop] * (longest - len(row.real_ids)) for row in rows])
    inside = torch.tensor([[1] * len(row.real_ids) + [0] * (longest - len(row.real_ids)) for row in rows])
    following = model(
        input_ids=real, attention_mask=torch.cat([mask, inside], dim=1),
        position_ids=lengths[:, None] + torch.arange(longest), past_key_values=cache,
    ).logits[:, :-1]  # fmt: skip
    logps = torch.cat([first[:, None], following], dim=1).log_softmax(-1)
    return (logps.gather(-1, real[..., None]).squeeze(-1) * inside).sum(1).tolist()


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Returns the token at quantile ``uniform`` of each row of logits, likeliest first; negative: the likeliest."""
    probabilities = logits.softmax(-1)
    likely, tokens = probabilities.topk(min(LIKELY, logits.shape[-1]), dim=-1)
    place = (likely.cumsum(-1) <= uniform[:, None]).sum(-1)
    found = tokens.gather(-1, place.clamp(max=tokens.shape[-1] - 1)[:, None]).squeeze(1)
    beyond = place == tokens.shape[-1]
    if beyond.any():
        ordered, all_tokens = probabilities[beyond].sort(dim=-1, descending=True)
        place = (ordered.cumsum(-1) <= uniform[beyond, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
        found[beyond] = all_tokens.gather(-1, place[:, None]).squeeze(1)
    return found


def attend_in_groups(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attends with SDPA; when decoding, a key head's query heads are its queries.

    transformers' own function copies keys and values for each query head.
    """
    rows, heads, tokens, width = query.shape
    if tokens > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    grouped = query.view(rows, key.shape[1], -1, width)
    attended = functional.scaled_dot_product_attention(
        grouped, key, value, attention_mask, scale=settings.get("scaling")
    )
    return attended.reshape(rows, 1, heads, width), None


AttentionInterface.register("in_groups", attend_in_groups)
AttentionMaskInterface.register("in_groups", sdpa_mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", required=True, help="NAME=FILE.jsonl")
    parser.add_argument("--extractor", default="equals")
    parser.add_argument("--longest", type=int, default=48, help="tokens of an answer; 0: log p(y) alone")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cpu.prepare(options.threads)
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(str(options.model))
    renderer = ChatRenderer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="in_groups")
    found = {}
    for each in options.rows:
        name, _, file = each.partition("=")
        rows = [json.loads(line) for line in json_lines(Path(file))]
        found[name] = measure(model, renderer, tokenizer, rows, options.extractor, options.longest, options.temperature)
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
