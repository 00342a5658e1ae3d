"""A run's folder: its metrics, checkpoints, summary and figures.

Belongs here: what is written to a run's folder and read from it, free of MLflow. May import: `alpha_maml.errors`,
`trainer.config`, `trainer.core` for the names of tensors.
Offers: `folder.lock`, `metrics.Recorder`, `checkpoint.Saver`, `summary.begin`, `figures.draw_curves`.
"""
