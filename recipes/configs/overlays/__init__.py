"""Configurations that are added to a recipe or to a file of your own: `--config wide_fc --config +NAME`."""
