"""DEAP: one trained network per target, its layers pruned unevenly while it is distilled (Xie et al., Pattern
Recognition 152, 2024). `chains.compress.run.compress` does it; `docs/explanation/compression.md` says what is the
paper's and what is ours. What comes out is a terminal chain: one width, sizes of its own in every layer
(`Chain.sizes`).
"""
