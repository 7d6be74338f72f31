"""Remove secrets from what a run shows and stores, by the rules of `data_shards.redact`, whose
commands show addresses and errors of stores too."""

from data_shards.redact import clean_output, clean_text, clean_value, environment_secrets, logins_in

__all__ = ["clean_output", "clean_text", "clean_value", "environment_secrets", "logins_in"]
