"""Reading weights that others made: their containers, their names, their graphs.

Nothing here trusts a file. Whatever is wrong with one ends as `WeightsRefused` with a reason for the person who has it;
where files come from strangers, run `python -m chains.importers.check` in a process that may not do harm.
"""
