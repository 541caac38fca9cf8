"""Estimators of the score gradient: one class in one file each, registered by name in `args.ESTIMATORS`."""
