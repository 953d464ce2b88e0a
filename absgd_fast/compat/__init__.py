"""The names of the reference package `absgd` 0.0.1. To switch to absgd_fast, import `absgd_fast.compat` in place of `absgd`."""
