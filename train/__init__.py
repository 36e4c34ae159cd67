"""Train adapters: data sets, objectives, the training loop and run records."""
