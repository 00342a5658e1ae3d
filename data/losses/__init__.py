"""Losses, one a file: (outputs, batch) of one task -> (mean loss over its examples, {metric: scalar}), or the loss alone.

Belongs here: what a task's outputs are held against. `outputs` are what the model returns for the batch, support or query: a
pair (x, y), or a dict. May import: torch alone.
Offers: `contract.as_loss`, `contract.over_tasks`; the registry is `data.LOSSES`.
"""
