"""Steps of ``benchmarks/gpu.py``: a module each, with ``ITEMS``, functions that yield measures.

    machine ──> probe ──> attention ──> parity ──> step ──> trl ──> adapters ──> job
                                                    └─ speed of this project, which trl compares with

No step but ``job`` imports Ray; none imports vLLM.
"""
