"""Factorized Distillation (Ren and Li, arXiv 1811.08073): one teacher that sees the whole person, from several networks
that see a part each or from one foreign network; a teacher that a chain can be made of."""
