"""Losses, one a file: (outputs, targets) of one task -> (mean loss over its examples, accuracy or nan), both scalars; with an
axis of tasks in front of outputs and targets, the same of each task. May import: torch alone. The registry is `data.LOSSES`."""
