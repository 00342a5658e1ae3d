"""MLflow, apart from training: a process of its own ships the run's folder to the store.

Belongs here: every import of mlflow. The folder is the queue. The sender keeps how far it came in tracking.json, so that it can
be killed, restarted, or run long afterwards (`alpha-maml sync`) without losing or doubling a point: a point sent again with the
timestamp of its line is the same point. Training never waits for it, whatever the store does.
May import: `alpha_maml.errors`, `trainer.config`, `trainer.runs`; `serving`, which MLflow itself runs, `trainer.learner`.
Offers: `sender.Sender`, `sender.sync`, `state.link`, `client.log_model`.
"""
