"""The names of the reference package `absgd` 0.0.1: replace `absgd` by `absgd_fast.compat` in the import."""
