"""Placing workers: a `LaunchSpec` goes in, an exit code comes out. Knows nothing of training; imports nothing of ours."""
