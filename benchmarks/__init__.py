"""Attention timed beside its peers on one machine; results are kept as files."""
