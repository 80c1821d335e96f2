"""pagelens beside llama.cpp, OpenVINO, transformers and torch: `make bench-peers`; docs/performance.md explains it.

run.py starts one process for each engine (the peers' in environments of their own), lets them take turns with ours,
and measures the machine's limits before and after every pair. rows.py says what is compared and what is aimed at.
"""
