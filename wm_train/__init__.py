"""Train video world models. Import this package's parts; this file stays empty so that `--help` is
instant."""
