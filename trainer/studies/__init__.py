"""Many runs: grids of them, trained in turn or as one program, and the figures over them.

Belongs here: what works on more than one run. May import: all of `trainer`.
Offers: `sweep.cells`, `sweep.work`, `vectorised.train`, `report.curves`.
"""
