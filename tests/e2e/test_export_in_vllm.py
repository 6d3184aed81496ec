"""vLLM opens an exported folder by itself, as people serve it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.inputs.model_folder import folder_entries
from spin_ray.report.export import export
from spin_ray.run_dir.artefact import Manifest
from spin_ray.run_dir.storage import MANIFEST
from spin_ray.runtime.cpu import environment
from tests.support.made_up_run import TINY, made_up_run

pytestmark = pytest.mark.e2e

CHAT = [{"role": "user", "content": "2 + 2?"}]
SERVES = f"""
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=1)
    (said,) = llm.chat({CHAT!r}, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    print(json.dumps([said.prompt_token_ids, list(said.outputs[0].token_ids)]))
"""


def test_vllm_says_from_an_exported_folder_what_transformers_does(tmp_path):
    """The folder's own template, tokenizer and weights: same ids of the prompt, same greedy ids of the answer."""
    run = made_up_run(tmp_path / "run")
    trained = run.storage.path(run.model(2).path)
    shutil.copytree(TINY, trained)
    (trained / MANIFEST).write_bytes(Manifest.of(folder_entries(trained), {}, {}).to_bytes())
    folder = export(run, "1", str(tmp_path / "out"))
    script = tmp_path / "serves.py"
    script.write_text(SERVES)
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    finished = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | environment(1) | vllm,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    prompt, said = json.loads(finished.stdout.splitlines()[-1])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.float().generate(**asked, max_new_tokens=8, do_sample=False)[0].tolist()
    assert [*prompt, *said] == expected[: len(prompt) + len(said)]
    assert len(said) == 8 or len(expected) == len(prompt) + len(said)
    assert Path(folder, "README.md").exists()
