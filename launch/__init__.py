"""How a run is started: the command line, the ranks, what a person sees, SLURM.

Belongs here: what knows a terminal, a signal, an environment variable or a scheduler. May import: everything.
Offers: `cli.main`.
"""
