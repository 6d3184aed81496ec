"""Steps of ``benchmarks/gpu.py``: one module each, with ``ITEMS``, functions that yield measures.

    machine ──> probe ──> attention ──> parity ──> step ──> trl ──> adapters ──> job
                                                    └─ speed of this project, which trl compares with

Only ``job`` imports Ray; no step imports vLLM.
"""
