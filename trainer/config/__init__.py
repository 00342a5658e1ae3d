"""A run's configuration: its keys, where they are read from, and what binds them.

Belongs here: everything that is known of a key, which stands once, in `keys`. Imports neither torch nor anything slow, so that
`--help` answers at once. May import: `alpha_maml.errors` and the registries of models, data, rules, optimisers and engines.
Offers: what is imported below.
"""
from alpha_maml.trainer.config.identity import check_ownership, flat_values, optimizer_of, run_dir, to_yaml, trajectory
from alpha_maml.trainer.config.keys import Config, storage, table
from alpha_maml.trainer.config.read import build, checked, from_keys, from_text, of_run, read_yaml, with_key
from alpha_maml.trainer.config.together import check_together

__all__ = ["Config", "build", "check_ownership", "check_together", "checked", "flat_values", "from_keys", "from_text",
           "of_run", "optimizer_of", "read_yaml", "run_dir", "storage", "table", "to_yaml", "trajectory", "with_key"]
