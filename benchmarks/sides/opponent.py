"""Side of the iteration benchmark: this project's warm vLLM engine. A turn answers the prompts of one batch."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import MODEL, THREADS, replies, side_options, timed

from spin_ray.config.sections import EngineConfig, SamplingConfig
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.runtime.engine import EngineSpec, VllmEngine


def main() -> None:
    parser = side_options(__doc__)
    parser.add_argument("--max-tokens", type=int, required=True)
    options = parser.parse_args()
    rows = json.loads(options.pairs.read_text())
    model = resolve(MODEL)
    engine = VllmEngine(
        EngineSpec(
            model=Path(model), max_length=options.pack_length,
            stop_token_id=ChatRenderer(load_tokenizer(model)).end_of_turn_id, threads=THREADS,
            config=EngineConfig(
                dtype={"fp32": "float32", "bf16": "bfloat16"}[options.precision], enforce_eager=True, cpu_kv_cache_gib=1
            ),
        )
    )  # fmt: skip
    sampling = SamplingConfig(max_tokens=options.max_tokens)

    def play(start: int) -> list[list[int]]:
        batch = range(start, min(start + options.batch, len(rows)))
        completions = engine.generate([rows[row]["prompt_ids"] for row in batch], sampling, list(batch))
        return [completion.token_ids for completion in completions]

    answer, turns = replies(options.reply)
    answer(generated=[ids for start in range(0, len(rows), options.batch) for ids in play(start)])
    for number in turns:
        with timed() as spent:
            generated = play(number * options.batch)
        answer(**spent, tokens=sum(map(len, generated)))


if __name__ == "__main__":
    main()
