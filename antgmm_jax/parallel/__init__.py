"""Sharding over devices and synchronisation of processes."""
