"""wm_train: the training system for video world models. Import its parts; this file stays empty so
that `--help` is instant."""
