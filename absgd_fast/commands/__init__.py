"""The commands of `absgd-fast`, one file each. common.py has what they share, settings.py the options of an experiment."""
